"""One memcg's files, read through descriptors that stay open, and the pure parsers of what they say.

Writes nothing: `brake.py` owns the knobs. cgroup v2 only. Imported by the real-time process: named tuples, no
pathlib. A memcg that is gone is a value (None), not an exception.
"""

from __future__ import annotations

import os
from typing import NamedTuple

from governor.record import PAGE_BYTES

ROOT = "/sys/fs/cgroup"
UNLIMITED = -1
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


def parse_limit(data: bytes) -> int:
    """`memory.max`, `memory.high`: bytes, or UNLIMITED for "max"; raises ValueError otherwise."""
    return UNLIMITED if data.strip() == b"max" else int(data)


def memory_state(usage: bytes, limit: bytes, stat: bytes) -> MemoryState:
    """Put the contents of `memory.current`, `memory.max` and `memory.stat` together."""
    values = parse_flat_keyed(stat)
    return MemoryState(
        usage_bytes=int(usage),
        max_bytes=parse_limit(limit),
        anon_bytes=values.get(b"anon", 0),
        file_lru_bytes=values.get(b"inactive_file", 0) + values.get(b"active_file", 0),
        slab_reclaimable_bytes=values.get(b"slab_reclaimable", 0),
    )


class Memcg:
    """A memcg's files. Descriptors stay valid when the path is renamed, and say so when the memcg is gone."""

    def __init__(self, path: str) -> None:
        """Raises OSError when `path` is no memcg that may be read."""
        self.path = path
        self.directory_fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.cgroup_id = os.fstat(self.directory_fd).st_ino
        self._files: dict[str, int] = {}
        try:
            for name in ("memory.current", "memory.max", "memory.stat"):
                self.read(name)
        except OSError:
            self.close()
            raise

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
            return memory_state(self.read("memory.current"), self.read("memory.max"), self.read("memory.stat"))
        except (OSError, ValueError):
            return None

    def exists(self) -> bool:
        """Whether the directory that was opened is still a live memcg."""
        try:
            self.read("memory.current")
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
