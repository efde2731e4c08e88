"""What the kernel may hold for a stream in a small container: received and not read yet, written and not on disk yet.

Both are charged to the memcg and cannot be reclaimed there and then. What a socket receives is charged even past the
limit, so that everything else has to make room for it: 6 of 32 MiB were seen, while the reader waited for a CPU.
Dirty pages the kernel bounds itself where the file system writes back by memcg (SB_I_CGROUPWB; on ext4, of 32 MiB, 4
were dirty and 4 on their way at the most), but not on others, such as network file systems.
"""

from __future__ import annotations

import ctypes
import errno
import os
from contextlib import suppress

from governor.agent.container import RAM, Container

_SHARE = 16  # of the limit, for each of the two
_LOST = frozenset({errno.EIO, errno.ENOSPC, errno.EDQUOT})  # by others it says that there is no waiting here
_WAIT_WRITE_WAIT = 7  # SYNC_FILE_RANGE_WAIT_BEFORE | WRITE | WAIT_AFTER, sync_file_range(2)


def under_way_bytes() -> int | None:
    """As much as may be; None where the machine's RAM is the limit."""
    with suppress(OSError):
        reading = Container(limit_bytes=0).look()
        if reading.bound_by != RAM:
            return reading.max_bytes // _SHARE
    return None


class GrowingFile:
    """A file that is written at its end, and of which in a small container no more than a share is dirty."""

    def __init__(self, fd: int, size_bytes: int = 0) -> None:
        self.size_bytes = size_bytes
        self._fd = fd
        self._on_disk_bytes = size_bytes
        self._dirty_bytes = under_way_bytes()

    def write(self, data: bytes | bytearray) -> None:
        """Append, and wait for the disk where too much waits for it: to be called in a thread. Raises OSError."""
        left = memoryview(data)
        while left:
            written = os.pwrite(self._fd, left, self.size_bytes)
            self.size_bytes += written
            left = left[written:]
        if self._dirty_bytes is not None and self.size_bytes - self._on_disk_bytes >= self._dirty_bytes:
            _write_out(self._fd, self._on_disk_bytes, self.size_bytes)
            self._on_disk_bytes = self.size_bytes

    def clear(self) -> None:
        """From the beginning."""
        os.ftruncate(self._fd, 0)
        self.size_bytes = self._on_disk_bytes = 0


def _write_out(fd: int, begin: int, end: int) -> None:
    """Raises OSError where it is lost. No fdatasync: the pages are to be reclaimed, not to survive a power cut."""
    libc = ctypes.CDLL(None, use_errno=True)
    failed = libc.sync_file_range(fd, ctypes.c_int64(begin), ctypes.c_int64(end - begin), _WAIT_WRITE_WAIT)
    if failed and (error := ctypes.get_errno()) in _LOST:
        raise OSError(error, os.strerror(error))
