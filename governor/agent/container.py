"""What may be held around this process, and what is held: the tightest memcg, a chosen limit, else the machine's RAM.

Reads /proc and cgroupfs, v2 and v1; keeps nothing open, so that a process that is moved and a limit that is changed
are followed by themselves. Decides nothing.
"""

from __future__ import annotations

import errno
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

_V1_UNLIMITED_BYTES = 1 << 60  # v1 says 2^63 rounded down to a page
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_MIB = 1 << 20
CHOSEN, RAM = "MEMORY_LIMIT_MB", "RAM"
_NOT_ITS_FAULT = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM})  # the memcg may be there all the same


@dataclass(frozen=True, slots=True)
class Reading:
    """One look; all in bytes. `bound_by` is the memcg's directory, "MEMORY_LIMIT_MB" or "RAM"."""

    max_bytes: int
    unreclaimable_bytes: int  # of everything that is bound, not of this process alone
    usage_bytes: int  # with page cache
    rss_bytes: int  # anonymous and mapped, of all that is bound
    own_rss_bytes: int  # of this process
    bound_by: str

    @property
    def ratio(self) -> float:
        """Share of max that cannot be reclaimed."""
        return self.unreclaimable_bytes / self.max_bytes if self.max_bytes > 0 else 0.0


class Memcg(NamedTuple):
    """A memcg directory as it is seen from here, the root of what is mounted there or one below."""

    path: str
    v1: bool
    is_mounted: bool


class _Held(NamedTuple):
    max_bytes: int
    unreclaimable_bytes: int
    usage_bytes: int
    rss_bytes: int
    bound_by: str


class Container:
    """The memcgs around this process, from its own up to the root that is mounted."""

    def __init__(self, limit_bytes: int | None = None, root: str = "/") -> None:
        """`limit_bytes` replaces MEMORY_LIMIT_MB; `root` is where proc, sys and run are.

        Raises ValueError for a MEMORY_LIMIT_MB that is no positive number, OSError where there is no /proc.
        """
        self.root = root.rstrip("/")
        self.chosen_bytes = _chosen_bytes() if limit_bytes is None else limit_bytes
        self._mounts = memory_mounts(self._read("/proc/self/mountinfo"))
        self._ram_bytes = _meminfo(self._read("/proc/meminfo"))[b"MemTotal"]

    def memcgs(self) -> list[Memcg]:
        """This process's memcg first, then those above it."""
        return memcgs_around(self._read("/proc/self/cgroup"), self._mounts)

    def look(self) -> Reading:
        """The limit with the highest ratio; raises OSError where there is no /proc, or no descriptor to be had."""
        memcgs = self.memcgs()
        bounds = [held for memcg in memcgs if (held := self._held(memcg)) and 0 < held.max_bytes < self._ram_bytes]
        if self.chosen_bytes:
            bounds.append(self._under_the_chosen(memcgs, bounds))
        tightest = max(bounds or [self._machine()], key=lambda held: held.unreclaimable_bytes / held.max_bytes)
        return Reading(**tightest._asdict(), own_rss_bytes=own_rss_bytes())

    def events_paths(self) -> list[str]:
        """`memory.events` of every memcg that has one."""
        found = (f"{self.root}{memcg.path}/memory.events" for memcg in self.memcgs() if not memcg.v1)
        return [path for path in found if os.access(path, os.R_OK)]

    def _under_the_chosen(self, memcgs: list[Memcg], bounds: list[_Held]) -> _Held:
        """What counts against MEMORY_LIMIT_MB: the container where this is one, else this process and its children.

        A login session's memcg has no limit, and holds everything else of that user.
        """
        own = next((held for memcg in memcgs if (held := self._held(memcg))), None)
        is_container = bool(bounds) or (memcgs and memcgs[0].is_mounted)
        if own and is_container:
            return own._replace(max_bytes=self.chosen_bytes, bound_by=CHOSEN)
        resident_bytes = _resident_bytes()
        return _Held(self.chosen_bytes, resident_bytes, resident_bytes, resident_bytes, CHOSEN)

    def _machine(self) -> _Held:
        about = _meminfo(self._read("/proc/meminfo"))
        total_bytes = about[b"MemTotal"]
        mapped_bytes = about.get(b"AnonPages", 0) + about.get(b"Mapped", 0)
        return _Held(
            total_bytes, total_bytes - about[b"MemAvailable"], total_bytes - about[b"MemFree"], mapped_bytes, RAM
        )

    def _held(self, memcg: Memcg) -> _Held | None:
        """None for a root, a directory that is no memcg, one that is gone or may not be read. No limit: 0."""
        try:
            if memcg.v1:
                return self._held_v1(memcg.path)
            limit = self._read(f"{memcg.path}/memory.max").strip()
            usage_bytes = int(self._read(f"{memcg.path}/memory.current"))
            stat = _flat_keyed(self._read(f"{memcg.path}/memory.stat"))
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno in _NOT_ITS_FAULT:
                raise
            return None
        cache_bytes = sum(stat.get(key, 0) for key in (b"inactive_file", b"active_file", b"slab_reclaimable"))
        mapped_bytes = stat.get(b"anon", 0) + stat.get(b"file_mapped", 0)
        max_bytes = 0 if limit == b"max" else int(limit)
        return _Held(max_bytes, max(0, usage_bytes - cache_bytes), usage_bytes, mapped_bytes, memcg.path)

    def _held_v1(self, path: str) -> _Held | None:
        if os.path.exists(f"{self.root}{path}/cgroup.sane_behavior"):  # noqa: PTH110  CFTYPE_ONLY_ON_ROOT
            return None  # the machine's own: it counts every process, and has no limit
        max_bytes = int(self._read(f"{path}/memory.limit_in_bytes"))
        usage_bytes = int(self._read(f"{path}/memory.usage_in_bytes"))
        stat = _flat_keyed(self._read(f"{path}/memory.stat"))
        # total_: with the children. tmpfs is in total_cache, but on the anon lists: it stays counted.
        cache_bytes = stat.get(b"total_inactive_file", 0) + stat.get(b"total_active_file", 0)
        mapped_bytes = stat.get(b"total_rss", 0) + stat.get(b"total_mapped_file", 0)
        if max_bytes >= _V1_UNLIMITED_BYTES:
            max_bytes = 0
        return _Held(max_bytes, max(0, usage_bytes - cache_bytes), usage_bytes, mapped_bytes, path)

    def _read(self, path: str) -> bytes:
        return _read_whole(self.root + path)


def memory_mounts(mountinfo: bytes) -> dict[bool, tuple[str, str]]:
    """`/proc/self/mountinfo`: for v1 (True) and v2 (False) the root of the memory hierarchy's mount and its place."""
    found: dict[bool, tuple[str, str]] = {}
    for line in mountinfo.decode(errors="surrogateescape").split("\n"):
        about, _, of_type = line.partition(" - ")
        fields, kind = about.split(" "), of_type.split(" ")
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            found.setdefault(False, (_unescaped(fields[3]), _unescaped(fields[4])))
        elif kind[0] == "cgroup" and "memory" in kind[2].split(","):
            found.setdefault(True, (_unescaped(fields[3]), _unescaped(fields[4])))
    return found


def memcgs_around(membership: bytes, mounts: dict[bool, tuple[str, str]]) -> list[Memcg]:
    """`/proc/self/cgroup` and the mounts: the directories of this process's memcg and of those above, nearest first.

    Where the process's path is not below what is mounted (a namespace's root, a process that was moved out of it),
    the mount is the nearest that can be seen.
    """
    paths = {}
    for line in membership.decode(errors="surrogateescape").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        paths.update(dict.fromkeys(controllers.split(","), path))
    v1 = "memory" in paths and True in mounts
    if not v1 and ("" not in paths or False not in mounts):
        return []
    root, place = mounts[v1]
    path = paths["memory" if v1 else ""]
    below = path[len(root.rstrip("/")) :] if f"{path}/".startswith(f"{root.rstrip('/')}/") else ""
    parts = [part for part in below.split("/") if part]
    if ".." in parts:
        parts = []
    return [
        Memcg("/".join([place.rstrip("/"), *parts[:count]]), v1, count == 0) for count in range(len(parts), -1, -1)
    ]


def own_rss_bytes() -> int:
    """Of this process."""
    return _rss_bytes("self")


def _rss_bytes(pid: int | str) -> int:
    return int(_read_whole(f"/proc/{pid}/statm").split()[1]) * _PAGE_BYTES


def _read_whole(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:  # noqa: PTH123  read ten times a look
        data: bytes = file.read()
        return data


def _chosen_bytes() -> int:
    """MEMORY_LIMIT_MB in bytes; 0 where there is none."""
    text = os.environ.get("MEMORY_LIMIT_MB", "")
    if not text:
        return 0
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or not (chosen_bytes := int(float(text) * _MIB)):
        raise ValueError(f"MEMORY_LIMIT_MB: found {text!r}, expected MiB as a positive number, such as 512")
    return chosen_bytes


def _resident_bytes() -> int:
    """RSS of this process and its descendants: an upper bound, as pages that a fork shares count for each."""
    pending, total_bytes = [os.getpid()], own_rss_bytes()
    children = _children if os.path.exists("/proc/thread-self/children") else _children_of_all  # noqa: PTH110
    while pending:
        for child in children(pending.pop()):
            with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
                total_bytes += _rss_bytes(child)
                pending.append(child)
    return total_bytes


def _children(pid: int) -> list[int]:
    """By CONFIG_PROC_CHILDREN: without a look at every process of the machine."""
    found: list[int] = []
    with suppress(FileNotFoundError, ProcessLookupError):
        for thread in os.listdir(f"/proc/{pid}/task"):  # noqa: PTH208  names are enough
            with suppress(FileNotFoundError, ProcessLookupError):
                found += map(int, _read_whole(f"/proc/{pid}/task/{thread}/children").split())
    return found


def _children_of_all(pid: int) -> list[int]:
    import psutil

    try:
        return [child.pid for child in psutil.Process(pid).children()]
    except psutil.NoSuchProcess:
        return []


def _flat_keyed(data: bytes) -> dict[bytes, int]:
    return {
        key: int(value) for key, _, value in (line.partition(b" ") for line in data.splitlines()) if value.isdigit()
    }


def _meminfo(data: bytes) -> dict[bytes, int]:
    """The lines of /proc/meminfo in bytes."""
    words = (line.split() for line in data.splitlines())
    return {word[0].rstrip(b":"): int(word[1]) << 10 for word in words if len(word) > 1 and word[1].isdigit()}


def _unescaped(text: str) -> str:
    """mountinfo writes blanks and backslashes as three octal digits."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), text)
