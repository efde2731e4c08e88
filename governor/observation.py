"""What can be seen of a running daemon: the node's status socket, and metrics and health over HTTP.

Reads what the loop and its targets know anyway; opens no file of a memcg, and decides nothing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from governor import health, instance, status
from governor.decisions import boottime_ns
from governor.http_endpoint import HttpEndpoint
from governor.loop import Loop
from governor.subscribers import Subscribers


class Observation:
    """Of one loop, on its poller."""

    def __init__(self, loop: Loop, listen: str) -> None:
        """Raises ValueError for an address that is none, OSError for one that cannot be had."""
        self._loop, self._pid = loop, os.getpid()
        self._has_begun = False  # everything that the first scan found is protected; who comes later is no start
        self._subscribers = Subscribers(loop.poller, lambda: {"cgroup": "", "agent_pid": 0})
        self._subscribers.on_status = self._status
        path = instance.run_directory() / status.NODE_SOCKET
        try:
            self._subscribers.listen(path)
        except OSError as error:
            loop.note("no_socket", f"nobody can ask for the status: {path}: {error.strerror}")
        self._endpoint = HttpEndpoint(loop.poller, loop.children, lambda *a, **f: loop.note(*a, **f))
        self._endpoint.faults = lambda: health.faults(self._vitals())
        self._endpoint.not_ready = self._not_ready
        self._endpoint.exposition = self._exposition
        if listen:
            self._endpoint.listen(listen)

    def turn(self, now_ns: int) -> None:
        """Deadlines; to be called every second."""
        self._has_begun = self._has_begun or not self._not_ready()
        self._subscribers.check_deadlines(now_ns)
        self._endpoint.check_deadlines(now_ns)

    def close(self) -> None:
        """Nobody is answered any more."""
        self._subscribers.close()
        self._endpoint.close()

    def _not_ready(self) -> list[str]:
        return (health.faults if self._has_begun else health.not_ready)(self._vitals())

    def _vitals(self) -> health.Vitals:
        return self._loop.vitals(scanned=self._loop.tally.scans > 0)

    def _status(self, after: int) -> Iterable[status.Line]:
        standing_of = {slot: target.standing for slot, target in self._loop.targets.items()}
        faults = health.faults(self._vitals())
        return status.page(standing_of, after, self._loop.reflex_pid, boottime_ns(), faults)

    def _exposition(self, accept: str) -> tuple[str, bytes]:
        """In a child: what it imports here the resident process does without."""
        from governor.metrics import Exported, exposition

        standings = [(slot, target.standing()) for slot, target in self._loop.targets.items()]
        exported = Exported(self._loop.tally, standings, time.monotonic_ns())
        return exposition(exported, self._pid, self._loop.reflex_pid or None, accept)
