"""What TARGET means on the command line: which memcg a person has in mind.

    4711                          the memcg of this process
    /sys/fs/cgroup/a.slice/b      a memcg by its path; also as "a.slice/b", below the root of the hierarchy
    self                          the memcg that the command runs in, as in a container
    agent.service                 a unit of systemd; ".service" may be left out
    agents/claude-0               the containers of a pod, by NAMESPACE/POD; one of them by NAMESPACE/POD/CONTAINER
    3f2a9c                        a container, by how its id begins: 6 characters or more

Names of pods are asked of a governor that runs here, then looked up in the runtimes' bundles. Reads only. What is
inside a container is never taken for a unit: who may make cgroups there chooses their names.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governor import cgroup, node_containers, watch_place
from governor.bundle import read_bundle
from governor.pods import is_root, place_of

KINDS = "a pod (NAMESPACE/POD[/CONTAINER]), a cgroup path, a pid, a systemd unit or self"
_UNIT = (".service", ".scope", ".slice", ".socket", ".mount", ".swap")
_SEARCH_MAX = 8192  # directories looked into for a unit
_SHORTEST_ID = 6


@dataclass(frozen=True, slots=True)
class Target:
    """One memcg, and what it is called; texts are as found: escape them before they are shown."""

    path: str
    namespace: str = ""
    pod: str = ""
    container: str = ""

    @property
    def name(self) -> str:
        """For people."""
        named = "/".join(part for part in (self.namespace, self.pod, self.container) if part)
        if not named and self.path == cgroup.ROOT:  # with a cgroup namespace of its own, a container is the root
            return "this container"
        return named or self.path.rsplit("/", 1)[-1] or self.path


class Unknown(Exception):
    """No such target; says what was found and what was expected."""


def resolve(text: str, standings: Callable[[], Iterable[dict[str, Any]]]) -> list[Target]:
    """The memcgs that are meant, one or, for a pod, one for each of its containers; raises Unknown.

    `standings` asks the governors that run here how their targets stand; it is called for names only.
    """
    root = node_containers.root()
    if text == "self" or text.isdecimal():
        return [_of_process(text, root)]
    if text.startswith(("/", ".")):
        return [_by_path(os.path.realpath(text), text, root)]
    with suppress(Unknown):
        return [_by_path(f"{root}/{text}", text, root)]
    found = _governed(text, standings()) or _units(text, root) or _bundles(text)
    if found:
        return found
    raise Unknown(
        f"found nothing called {text!r} here, expected {KINDS}; governor watch, without a target, shows what there is"
    )


def _of_process(text: str, root: str) -> Target:
    v1 = root == cgroup.ROOT_V1
    path = cgroup.memcg_of("self" if text == "self" else int(text), v1)
    if path is None:
        raise Unknown(f"found no process {text}; expected {KINDS}")
    return _by_path(path, path, root)


def _by_path(path: str, given: str, root: str) -> Target:
    for name in ("memory.current", "memory.usage_in_bytes"):
        if Path(path, name).exists():
            return Target(path.rstrip("/"))
    raise Unknown(f"found no memcg at {given}, expected a directory below {root} with a memory.current, or {KINDS}")


def _governed(text: str, standings: Iterable[dict[str, Any]]) -> list[Target]:
    every = [target_of(one) for one in standings if one.get("pod")]
    return [one for one in every if text in (f"{one.namespace}/{one.pod}", one.name)]


def target_of(standing: dict[str, Any]) -> Target:
    """Of a line that a governor answers with."""
    texts = [str(standing.get(key, "")) for key in ("namespace", "pod", "container")]
    path = str(standing.get("cgroup", ""))
    return Target(path, *texts) if texts[1] else Target(path)


def with_names(path: str, root: str) -> Target | None:
    """A memcg, by the names that the runtime's bundle has for it; None for a pod's pause container."""
    place = place_of(path[len(root) :])
    bundle = read_bundle(place, watch_place.host_root()) if place else None
    if bundle is None:
        return Target(path)
    return None if bundle.is_sandbox else Target(path, bundle.namespace, bundle.pod, bundle.name)


def _units(text: str, root: str) -> list[Target]:
    """A unit's memcg, looked for by its name; system.slice before users' own managers."""
    if "/" in text:
        return []
    name = text if text.endswith(_UNIT) else f"{text}.service"
    found = []
    to_look = deque([root])
    for _ in range(_SEARCH_MAX):
        if not to_look:
            break
        directory = to_look.popleft()
        for inner in directories(directory):
            if inner.rsplit("/", 1)[-1] == name:
                found.append(inner)
            elif not is_closed(inner, root):
                to_look.append(inner)
    if len(found) > 1 and not (
        found := [each for each in found if each.startswith(f"{root}/system.slice/")] or found
    ):
        return []
    if len(found) > 1:
        raise Unknown(f"found {len(found)} units {name}: {', '.join(sorted(found))}; expected the path of one")
    return [Target(path) for path in found]


def is_closed(path: str, root: str) -> bool:
    """Whether what is below a cgroup is its own business: a container's, a service's, a scope's."""
    name = path.rsplit("/", 1)[-1]
    if name.startswith("user@"):
        return False  # a user's own manager, with units of its own
    return name.endswith((".service", ".scope")) or is_root(name) or place_of(path[len(root) :]) is not None


def directories(path: str) -> list[str]:
    """What is directly below; empty where that cannot be read, or is gone."""
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:
        return []


def _bundles(text: str) -> list[Target]:
    if "/" not in text and len(text) < _SHORTEST_ID:
        return []
    try:
        here = node_containers.containers(node_containers.root(), watch_place.host_root())
    except OSError:
        return []
    return [Target(one.cgroup, one.namespace, one.pod, one.name) for one in node_containers.named(here, text)]
