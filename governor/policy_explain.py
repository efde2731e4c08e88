"""What `governor policy explain` is asked about and what it answers; which policy a container gets is in `selection`.

A container that is described in a file needs no node: so policies can be tested where they are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from typing import Any

from governor.container import Container
from governor.policy_directory import Policies
from governor.policy_keys import hint, shown
from governor.selection import Choice
from governor.toml_file import FILE_LIMIT_BYTES, Fault, FileError, read_file

_PATH_LIMIT, _NAME_LIMIT = 4096, 253  # PATH_MAX; Kubernetes' own for names
_TEXTS = tuple(field.name for field in fields(Container) if field.type == "str")
_TABLES = tuple(field.name for field in fields(Container) if field.default_factory is not MISSING)


def read_container(path: str) -> Container:
    """The container that a JSON file describes, fields that it leaves out unknown; raises FileError, every fault."""
    data = read_file(path)
    if len(data) > FILE_LIMIT_BYTES:
        raise FileError(path, [Fault(0, "", "a larger file", f"at most {FILE_LIMIT_BYTES} bytes")])
    try:
        described = json.loads(data)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError as well
        raise FileError(path, [Fault(0, "", "no JSON", f"an object of a container's fields ({error})")]) from None
    if not isinstance(described, dict):
        raise FileError(path, [Fault(0, "", shown(described), "an object of a container's fields")])
    faults = []
    known = [*_TEXTS, *_TABLES]
    for name, value in described.items():
        if name not in known:
            expected = f"one of {', '.join(known)}{hint(name, known)}"
            faults.append(Fault(0, name[:100], shown(value), expected))
        elif name in _TEXTS and not isinstance(value, str):
            faults.append(Fault(0, name, shown(value), "text"))
        elif name in _TABLES and not _is_texts(value):
            faults.append(Fault(0, name, shown(value), 'an object of texts, such as {"app": "agent"}'))
    if faults:
        raise FileError(path, faults)
    given: dict[str, Any] = dict.fromkeys(_TEXTS, "") | described
    return Container(**given)


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def answer(container: Container, choice: Choice, policies: Policies) -> list[str]:
    """Lines for people: what the container gets, then each wish and each policy with its file; not escaped."""
    files = _files(policies)
    chosen = choice.policy
    got = f"policy {chosen.name} ({files[chosen.name]})" if chosen else "not governed"
    told = [f"{_who(container)}: {got}: {choice.reason}"]
    if container.cgroup:
        told.append(f"  cgroup {_cut(container.cgroup, _PATH_LIMIT)}")
    told += [f"  {wish.line}" for wish in choice.wishes]
    for verdict, loaded in zip(choice.verdicts, policies.values(), strict=True):
        key = f"{verdict.key}: " if verdict.key else ""
        where = f" [{loaded.sources[verdict.key]}]" if verdict.key else ""
        told.append(f"  {verdict.subject}: {key}{verdict.text}{where}")
    return told


def as_object(container: Container, choice: Choice, policies: Policies) -> dict[str, object]:
    """The same for scripts, as JSON can hold it; texts of the container are cut, those of verdicts are escaped."""
    files = _files(policies)
    identity = {name: _cut(getattr(container, name), _PATH_LIMIT) for name in _TEXTS}
    return {
        "container": identity,
        "governed": choice.policy is not None,
        "policy": choice.policy.name if choice.policy else None,
        "file": files[choice.policy.name] if choice.policy else None,
        "reason": choice.reason,
        "wishes": [asdict(wish) for wish in choice.wishes],
        "verdicts": [asdict(verdict) for verdict in choice.verdicts],
    }


def _files(policies: Policies) -> Mapping[str, str]:
    return {loaded.policy.name: path for path, loaded in policies.items()}


def _who(container: Container) -> str:
    if not container.pod:
        return _cut(container.container_id, _NAME_LIMIT) or "the container"
    return "/".join(_cut(name, _NAME_LIMIT) or "?" for name in (container.namespace, container.pod, container.name))


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
