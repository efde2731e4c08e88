"""All memcgs of a machine at a glance: what is governed, and the largest others; for watch without a target.

Cheap with many: `memory.current` of each through a kept descriptor, and further files only of those that are shown.
The tree is walked again now and then. Listed is what somebody made for something: services, scopes, containers, and
memcgs that have none below them.
"""

from __future__ import annotations

import os
import resource
from collections import deque
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from governor import cgroup
from governor.cgroup import Memcg, MemoryState
from governor.levels import CHARGE_BYTES
from governor.pods import is_root
from governor.watch_target import Target, directories, is_closed, target_of, with_names

WALK_NS = 15_000_000_000
CLOSELY_NS = 5_000_000_000
READS_MAX = 1000  # of memory.current, in one look; further ones take turns
_WALK_MAX = 8192
_SPARE_DESCRIPTORS = 64
SORTS = ("usage", "share of max", "growth", "name")


@dataclass(frozen=True, slots=True)
class Row:
    """One memcg. `usage_bytes` is of every look; `memory` only of those that are shown."""

    target: Target
    usage_bytes: int
    growth_bytes: int = 0  # of the usage, per second
    memory: MemoryState | None = None
    standing: Mapping[str, Any] | None = None  # as its governor tells it

    @property
    def ratio(self) -> float:
        """Unreclaimable share of max."""
        return ratio_of(self.standing, self.memory)


@dataclass(slots=True)
class _Kept:
    target: Target
    fd: int
    usage_bytes: int = 0
    growth_bytes: int = 0
    read_ns: int = 0
    memory: MemoryState | None = None  # as it was when it was looked at closely
    looked_bytes: int = 0
    looked_ns: int = 0


class All:
    """Every memcg below a root, from look to look."""

    def __init__(self, root: str, only: Iterable[Target] = ()) -> None:
        """`only`: these, such as the containers of one pod, and no others."""
        self._root = root
        self._only = tuple(only)
        self._kept: dict[str, _Kept] = {}
        self._opened: dict[str, Memcg] = {}  # of those that are shown
        self._paused: set[str] = set()  # pods' pause containers
        self._walk_ns = 0
        self._turn = 0
        self._file = "memory.usage_in_bytes" if root == cgroup.ROOT_V1 else "memory.current"
        self.standings: dict[str, Mapping[str, Any]] = {}  # by path
        self._left_out: set[str] = set()
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16), hard))
        self._room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - _SPARE_DESCRIPTORS

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._kept)

    @property
    def left_out(self) -> int:
        """How many further ones there are, which could not be opened for want of descriptors."""
        return len(self._left_out)

    def look(self, now_ns: int, shown: int, sort: str) -> list[Row]:
        """Read, and sort: the governed ones first, then others, `shown` in all."""
        if now_ns >= self._walk_ns:
            self._walk()
            self._walk_ns = now_ns + WALK_NS
        self._read(now_ns)
        kept = sorted(self._kept.items(), key=lambda item: self._key(item[0], item[1], sort))
        # By share of max only those can be sorted whose limit is known: the largest are looked at closely.
        shown_paths = [path for path, _ in kept[: 2 * shown if sort == SORTS[1] else shown]]
        for path in shown_paths:
            self._look_closely(path, self._kept[path], now_ns)
        shown_paths.sort(key=lambda path: self._key(path, self._kept[path], sort))
        self._forget(set(shown_paths))
        return [self._row(path) for path in shown_paths[:shown]]

    def _row(self, path: str) -> Row:
        kept = self._kept[path]
        return Row(kept.target, kept.usage_bytes, kept.growth_bytes, kept.memory, self.standings.get(path))

    def _key(self, path: str, kept: _Kept, sort: str) -> tuple[bool, float | str, int, str]:
        governed = self.standings.get(path)
        first: float | str = 0.0
        if sort == "name":
            first = kept.target.name
        elif sort == "growth":
            first = -kept.growth_bytes
        elif sort == "share of max":
            first = -ratio_of(governed, kept.memory)
        return governed is None, first, -kept.usage_bytes, path

    def govern(self, standings: Iterable[Mapping[str, Any]]) -> None:
        """How the governors here say that their targets stand."""
        self.standings = {str(one.get("cgroup", "")): one for one in standings}
        for path, one in self.standings.items():
            if path in self._kept:
                self._kept[path].target = target_of(dict(one))
            elif not self._only:
                self._keep(target_of(dict(one)))

    def close(self) -> None:
        """Close every descriptor."""
        for kept in self._kept.values():
            os.close(kept.fd)
        self._forget(set())
        self._kept.clear()

    def _read(self, now_ns: int) -> None:
        paths = list(self._kept)
        if len(paths) > READS_MAX:  # the governed ones each time, the others in turns
            self._turn = self._turn + READS_MAX if self._turn + READS_MAX < len(paths) else 0
            paths = [*self.standings.keys() & self._kept.keys(), *paths[self._turn : self._turn + READS_MAX]]
        for path in paths:
            kept = self._kept[path]
            try:
                usage_bytes = int(os.pread(kept.fd, 32, 0))
            except (OSError, ValueError):  # gone
                os.close(kept.fd)
                del self._kept[path]
                continue
            if kept.read_ns and now_ns > kept.read_ns:
                kept.growth_bytes = (usage_bytes - kept.usage_bytes) * 1_000_000_000 // (now_ns - kept.read_ns)
            kept.usage_bytes, kept.read_ns = usage_bytes, now_ns

    def _look_closely(self, path: str, kept: _Kept, now_ns: int) -> None:
        """memory.stat, which the kernel has to add up: only where the usage has changed since, or for long not."""
        changed = abs(kept.usage_bytes - kept.looked_bytes) >= CHARGE_BYTES
        if kept.memory is not None and not changed and now_ns - kept.looked_ns < CLOSELY_NS:
            return
        memcg = self._opened.get(path)
        if memcg is None:
            try:
                memcg = self._opened[path] = Memcg(path)
            except OSError:
                return
        kept.memory, kept.looked_bytes, kept.looked_ns = memcg.memory_state(), kept.usage_bytes, now_ns

    def _forget(self, but: set[str]) -> None:
        for path in self._opened.keys() - but:
            self._opened.pop(path).close()

    def _walk(self) -> None:
        self._left_out.clear()
        if self._only:
            found = [target for target in self._only if target.path not in self._kept]
        else:
            new = (path for path in leaves(self._root) if path not in self._kept and path not in self._paused)
            found = [target for path in new if (target := self._named(path))]
        for target in found:
            self._keep(target)

    def _named(self, path: str) -> Target | None:
        target = with_names(path, self._root)
        if target is None:
            self._paused.add(path)
        return target

    def _keep(self, target: Target) -> None:
        if len(self._kept) >= self._room:
            self._left_out.add(target.path)
            return
        with suppress(OSError):
            fd = os.open(f"{target.path}/{self._file}", os.O_RDONLY | os.O_CLOEXEC)
            self._kept[target.path] = _Kept(target, fd)


def leaves(root: str) -> list[str]:
    """Services, scopes and containers below a root, other memcgs with nothing below them, and a container's own."""
    found = [root] if os.access(f"{root}/memory.current", os.F_OK) else []  # a container's; the true root has none
    to_look = deque([root])
    for _ in range(_WALK_MAX):
        if not to_look:
            break
        directory = to_look.popleft()
        for inner in directories(directory):
            below = [] if _is_one(inner, root) else directories(inner)
            if below:
                to_look.append(inner)
            else:
                found.append(inner)
    return found


def _is_one(path: str, root: str) -> bool:
    return is_closed(path, root) and not is_root(path.rsplit("/", 1)[-1])


def ratio_of(standing: Mapping[str, Any] | None, memory: MemoryState | None) -> float:
    """Unreclaimable share of max; a governor's own figure is by the tightest limit above as well."""
    if told := (standing or {}).get("memory"):
        return float(told["unreclaimable_ratio"])
    return memory.unreclaimable_ratio if memory else 0.0
