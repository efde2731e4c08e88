"""One memcg's files, read through descriptors that stay open, and the pure parsers of what they say.

Writes nothing: `brake.py` owns the knobs. cgroup v2, and v1 where that is all there is. Imported by the real-time
process: named tuples, no pathlib. A memcg that is gone is a value (None), not an exception.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from governor.record import PAGE_BYTES

ROOT = "/sys/fs/cgroup"
ROOT_V1 = "/sys/fs/cgroup/memory"
UNLIMITED = -1
_V1_UNLIMITED_BYTES = 1 << 60  # v1 says 2^63 rounded down to a page; no machine has a tenth of it
_READ_BYTES = 8192


class MemoryState(NamedTuple):
    """What a memcg holds, all in bytes; `max_bytes` is UNLIMITED where there is no limit."""

    usage_bytes: int
    max_bytes: int
    anon_bytes: int
    file_lru_bytes: int
    slab_reclaimable_bytes: int

    @property
    def unreclaimable_bytes(self) -> int:
        """usage - file LRU - reclaimable slab; shmem is on the anon lists and stays counted."""
        return max(0, self.usage_bytes - self.file_lru_bytes - self.slab_reclaimable_bytes)

    @property
    def unreclaimable_ratio(self) -> float:
        """Share of max that cannot be reclaimed, 0 to 1; 0 without a limit."""
        return self.unreclaimable_bytes / self.max_bytes if self.max_bytes > 0 else 0.0


def parse_flat_keyed(data: bytes) -> dict[bytes, int]:
    """`memory.stat`, `memory.events`: a dict of its lines; lines that are no "key number" are left out."""
    parsed = {}
    for line in data.splitlines():
        key, _, value = line.partition(b" ")
        if value.isdigit():
            parsed[key] = int(value)
    return parsed


def figure(data: bytes, key: bytes) -> int:
    """One number of such a file; 0 where there is none. For a few of many lines: a tenth of parsing them all."""
    begin = (b"\n" + data).find(b"\n" + key + b" ")
    value = data[begin + len(key) + 1 :].partition(b"\n")[0] if begin >= 0 else b""
    return int(value) if value.isdigit() else 0


def parse_limit(data: bytes) -> int:
    """`memory.max`, `memory.high`: bytes, or UNLIMITED for "max"; raises ValueError otherwise."""
    return UNLIMITED if data.strip() == b"max" else int(data)


def memory_state(usage: bytes, limit: bytes, stat: bytes) -> MemoryState:
    """Put the contents of `memory.current`, `memory.max` and `memory.stat` together."""
    return MemoryState(
        usage_bytes=int(usage),
        max_bytes=parse_limit(limit),
        anon_bytes=figure(stat, b"anon"),
        file_lru_bytes=figure(stat, b"inactive_file") + figure(stat, b"active_file"),
        slab_reclaimable_bytes=figure(stat, b"slab_reclaimable"),
    )


def parse_limit_v1(data: bytes) -> int:
    """`memory.limit_in_bytes`: bytes, or UNLIMITED for its largest value; raises ValueError."""
    found_bytes = int(data)
    return UNLIMITED if found_bytes >= _V1_UNLIMITED_BYTES else found_bytes


def memory_state_v1(usage: bytes, limit: bytes, stat: bytes) -> MemoryState:
    """As memory_state, of v1's files: its `total_` figures are the hierarchical ones.

    v1 counts tmpfs as file, in `total_cache`, but on the anon lists, as wanted; reclaimable slab it does not tell.
    """
    return MemoryState(
        usage_bytes=int(usage),
        max_bytes=parse_limit_v1(limit),
        anon_bytes=figure(stat, b"total_rss"),
        file_lru_bytes=figure(stat, b"total_inactive_file") + figure(stat, b"total_active_file"),
        slab_reclaimable_bytes=0,
    )


def parse_membership(data: bytes) -> dict[str, str]:
    """`/proc/PID/cgroup`: for each v1 controller, and "" for v2, the path below the root of that hierarchy."""
    found = {}
    for line in data.decode(errors="surrogateescape").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if path.startswith("/"):
            for controller in controllers.split(","):
                found[controller] = path
    return found


def memcg_of(pid: int | str, v1: bool = False) -> str | None:
    """The directory of a process's memcg; None when the process is gone. `pid` may be "self"."""
    try:
        with open(f"/proc/{pid}/cgroup", "rb") as listed:  # noqa: PTH123  no pathlib here
            found = parse_membership(listed.read()).get("memory" if v1 else "")
    except OSError:
        return None
    return None if found is None else (ROOT_V1 if v1 else ROOT) + found.rstrip("/")


def is_inside(path: str | None, memcg_path: str) -> bool:
    """Whether a memcg directory is another one or lies below it."""
    return path is not None and (path == memcg_path or path.startswith(memcg_path.rstrip("/") + "/"))


class Memcg:
    """A memcg's files. Descriptors stay valid when the path is renamed, and say so when the memcg is gone."""

    def __init__(self, path: str) -> None:
        """Raises OSError when `path` is no memcg that may be read."""
        self.path = path
        self.directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.cgroup_id = os.fstat(self.directory_fd).st_ino
        self._files: dict[str, int] = {}
        self.v1 = False
        try:
            try:
                self.read("memory.stat")
                self.read("memory.current")
            except FileNotFoundError:
                self.v1 = True
            for name in ("memory.usage_in_bytes", "memory.limit_in_bytes") if self.v1 else ("memory.max",):
                self.read(name)
        except OSError:
            self.close()
            raise

    @property
    def own_path(self) -> str:
        """A path, until close(), of the memcg that was opened, whatever has `path` by now; for children as well."""
        return f"/proc/{os.getpid()}/fd/{self.directory_fd}"

    def open(self, name: str, flags: int) -> int:
        """Open a file of the memcg; raises OSError."""
        return os.open(name, flags | os.O_CLOEXEC, dir_fd=self.directory_fd)

    def read(self, name: str) -> bytes:
        """The whole of a small file through a kept descriptor; raises OSError (ENODEV: the memcg is gone)."""
        fd = self._files.get(name)
        if fd is None:
            fd = self._files[name] = self.open(name, os.O_RDONLY)
        return os.pread(fd, _READ_BYTES, 0)

    def read_or_none(self, name: str) -> bytes | None:
        """As read(), None where the file cannot be read."""
        try:
            return self.read(name)
        except OSError:
            return None

    def memory_state(self) -> MemoryState | None:
        """A fresh look; None when the memcg is gone or cannot be read now."""
        try:
            stat = self.read("memory.stat")
            if self.v1:
                return memory_state_v1(self.read("memory.usage_in_bytes"), self.read("memory.limit_in_bytes"), stat)
            return memory_state(self.read("memory.current"), self.read("memory.max"), stat)
        except (OSError, ValueError):
            return None

    def limit_bytes(self) -> int:
        """`memory.max` alone; UNLIMITED also when it cannot be read."""
        try:
            return (
                parse_limit_v1(self.read("memory.limit_in_bytes"))
                if self.v1
                else parse_limit(self.read("memory.max"))
            )
        except (OSError, ValueError):
            return UNLIMITED

    def exists(self) -> bool:
        """Whether the directory that was opened is still a live memcg."""
        try:
            self.read("memory.usage_in_bytes" if self.v1 else "memory.current")
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Close every descriptor."""
        for fd in self._files.values():
            os.close(fd)
        self._files.clear()
        os.close(self.directory_fd)


def pages(size_bytes: int) -> int:
    """Whole pages in so many bytes."""
    return size_bytes // PAGE_BYTES
