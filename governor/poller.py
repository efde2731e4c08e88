"""Descriptors, and who hears of each: epoll, so that a thousand that are quiet cost nothing."""

from __future__ import annotations

import select
import time
from collections.abc import Callable

Heard = Callable[[int], None]


def is_ready(fd: int, within_s: float = 0) -> bool:
    """Whether a descriptor can be read from; select() refuses those from 1024 on, and a node has more."""
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    return bool(poller.poll(within_s * 1000))


class Poller:
    """One epoll instance; whoever registers a descriptor is called with it when it is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._owners: dict[int, Heard] = {}
        self.woken_ns = time.monotonic_ns()  # when the last wait was over
        self.first_fd = -1  # whose owner is called before all others

    def register(self, fd: int, on_ready: Heard, events: int = select.EPOLLIN) -> None:
        """Have `on_ready` called while one of the events lasts; raises OSError for what cannot be waited for."""
        self._epoll.register(fd, events)
        self._owners[fd] = on_ready

    def modify(self, fd: int, events: int) -> None:
        """Wait for other events."""
        self._epoll.modify(fd, events)

    def unregister(self, fd: int) -> None:
        """To be called before the descriptor is closed; its number may be another one's then."""
        self._owners.pop(fd)
        self._epoll.unregister(fd)

    def wait(self, timeout_ns: int) -> bool:
        """Until something is ready, for so long at most; call whoever registered it. False: nothing was.

        What an owner closes may come up all the same if it was ready, too: owners cope with a call too many.
        """
        ready = self._epoll.poll(max(0, timeout_ns) / 1e9)
        self.woken_ns = time.monotonic_ns()
        for fd, _ in sorted(ready, key=lambda one: one[0] != self.first_fd):
            if on_ready := self._owners.get(fd):
                on_ready(fd)
        return bool(ready)
