"""`memory.events` of memcgs, as one descriptor that an event loop can wait for."""

from __future__ import annotations

import os
import select
from collections.abc import Sequence
from contextlib import suppress


class MemoryEvents:
    """A descriptor that is readable when the kernel has counted in a `memory.events`: at max, at high, an OOM.

    An epoll of its own: kernfs always reports such a file as readable, and says by EPOLLPRI that it changed, until it
    is read again (kernfs_generic_poll); event loops wait for the former only.
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._fds: dict[str, int] = {}

    def follow(self, paths: Sequence[str]) -> None:
        """These and no others. What cannot be opened is tried again when this is called again."""
        for path in self._fds.keys() - set(paths):
            os.close(self._fds.pop(path))
        for path in paths:
            if path not in self._fds:
                with suppress(OSError):
                    self._open(path)

    def fileno(self) -> int:
        """What to wait for."""
        return self._epoll.fileno()

    def read(self) -> None:
        """Until the next change it is not readable any more."""
        for path, fd in list(self._fds.items()):
            try:
                os.pread(fd, 4096, 0)
            except OSError:  # the memcg is gone
                os.close(self._fds.pop(path))

    def close(self) -> None:
        """Close every descriptor."""
        self._epoll.close()
        for fd in self._fds.values():
            os.close(fd)

    def _open(self, path: str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._epoll.register(fd, select.EPOLLPRI)
            os.pread(fd, 4096, 0)
        except BaseException:
            os.close(fd)
            raise
        self._fds[path] = fd
