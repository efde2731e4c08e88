"""The policies of a node: the *.toml of a directory, in the order of their names; every fault of every file at once.

    /etc/governor/policies/10-agents.toml, 20-gentle.toml, ...

Each is read as `policy_file` reads one, so it may extend a preset; presets by themselves are not among them. Here
belongs what a file can be held against only beside the others. Which policy a container gets is in `selection`.
"""

from __future__ import annotations

from pathlib import Path

from governor import policy_file
from governor.journal import Note
from governor.policy_file import Loaded, PolicyError
from governor.policy_keys import shown
from governor.selection import NONE, is_given
from governor.toml_file import Fault

DIRECTORY = Path("/etc/governor/policies")
_FILES_LIMIT = 256

Policies = dict[str, Loaded]  # by file, in their order


class PoliciesError(Exception):
    """A directory that cannot be used; `errors` by file, in the files' order."""

    def __init__(self, errors: list[PolicyError]) -> None:
        super().__init__("; ".join(map(str, errors)))
        self.errors = errors


def load(directory: Path) -> Policies:
    """All policies of a directory, none if it is empty; raises PoliciesError."""
    policies: Policies = {}
    errors: list[PolicyError] = []
    for path in _files(directory):
        where = str(path)
        try:
            loaded = policy_file.load(where)
        except PolicyError as error:
            errors.append(error)
            continue
        if faults := _beside(where, loaded, policies):
            errors.append(PolicyError(where, faults))
        policies[where] = loaded
    if errors:
        raise PoliciesError(errors)
    return policies


def reload(old: Policies, directory: Path, note: Note) -> Policies:
    """The policies of a directory as they are now; the old ones, and every fault is said, where one is bad."""
    try:
        policies = load(directory)
    except PoliciesError as error:
        note("policy_refused", f"all policies stay as they were: {error}")
        return old
    names = ", ".join(loaded.policy.name for loaded in policies.values()) or "none: nothing is governed"
    found = f"{len(policies)}, as before" if policies == old else names
    note("policies", f"policies were read again from {directory}: {found}", path=str(directory))
    return policies


def _files(directory: Path) -> list[Path]:
    """Where Kubernetes mounts a ConfigMap there are also directories of it, whose names begin with a dot."""
    try:
        found = sorted(path for path in directory.iterdir() if path.suffix == ".toml" and path.name[0] != ".")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        expected = "a directory of policies, such as 10-agents.toml"
        raise PoliciesError([PolicyError(str(directory), [Fault(0, "", reason, expected)])]) from None
    if len(found) > _FILES_LIMIT:
        fault = Fault(0, "", f"{len(found)} policies", f"at most {_FILES_LIMIT}")
        raise PoliciesError([PolicyError(str(directory), [fault])])
    return found


def _beside(where: str, loaded: Loaded, before: Policies) -> list[Fault]:
    """What is wrong with a good file among the others."""
    policy = loaded.policy
    line = loaded.sources["name"].removeprefix(f"{where}:")  # the file alone where it does not say its name
    line_number = int(line) if line.isdecimal() else 0
    faults = []
    for path, other in before.items():
        if other.policy.name == policy.name:
            faults.append(Fault(line_number, "name", shown(policy.name), f"another name: {path} has this one"))
            break
    if policy.name == NONE:
        faults.append(Fault(line_number, "name", shown(NONE), 'another name: to choose "none" is not to be governed'))
    if not is_given(policy.select) and not policy.select.selectable:
        expected = (
            'whom it is for, such as namespace = ["agents"], cgroup = ["*"] for everybody, or selectable = true'
        )
        faults.append(Fault(0, "", "nothing in [select]", expected))
    return faults
