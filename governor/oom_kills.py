"""Whether the kernel's OOM killer chose somebody of a memcg, and for want of what.

A memcg counts its killed processes whoever was out of memory, it or the machine (`oom_kill`, __oom_kill_process). A
memcg whose limit was reached counts that as well: `oom` in memory.events, which v1 has as memory.failcnt only.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from governor.limits import ancestors


class OomKills:
    """Of one memcg and those below it, since the last look()."""

    def __init__(self, memcg_path: str) -> None:
        self._path = memcg_path
        self._limiting = [memcg_path, *ancestors(memcg_path)]
        self.look()

    def look(self) -> None:
        """Forget what came before."""
        self._killed, self._reached = self._count_killed(), self._count_reached()

    def what_killed(self) -> str:
        """Which kind of OOM kill came since the last look; "" for none."""
        if self._count_killed() <= self._killed:
            return ""
        if self._count_reached() > self._reached:
            return "the kernel's OOM killer, at the limit of its memcg"
        return "the kernel's OOM killer, for want of memory on the machine"

    def _count_killed(self) -> int:
        return _count(f"{self._path}/memory.events", b"oom_kill") or _count(
            f"{self._path}/memory.oom_control", b"oom_kill"
        )

    def _count_reached(self) -> int:
        return sum(
            _count(f"{path}/memory.events", b"oom") + _count(f"{path}/memory.failcnt") for path in self._limiting
        )


def _count(path: str, name: bytes = b"") -> int:
    """The number behind a name, or the only one; 0 where there is none."""
    with suppress(OSError, ValueError):
        for line in Path(path).read_bytes().splitlines():
            *names, number = line.split()
            if b"".join(names) == name:
                return int(number)
    return 0
