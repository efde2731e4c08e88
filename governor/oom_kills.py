"""OOM kills that got through: counted, and told apart by whose limit it was.

The kernel counts a victim in its memcg whoever asked for it (`oom_kill` of memory.events, commit 8e675f7af507), but
the request for one only where the limit is (`oom`, in that memcg and those above). A victim without a request at any
limit that can be seen died for want of memory on the machine, or at a limit above what a container sees. On cgroup v1
requests are not counted: there each charge that failed for a limit (memory.failcnt) stands for one.
"""

from __future__ import annotations

import os

from governor import cgroup
from governor.limits import ancestors
from governor.policy import SECOND
from governor.tiers import since

_RECENT_NS = 5 * SECOND  # from a victim's count to the end of a large process
_KILLER = "the kernel's OOM killer"


class OomKills:
    """The OOM kills in one memcg and below it. What the kernel had counted before is no news."""

    def __init__(self, memcg_path: str) -> None:
        """Never raises: what cannot be read counts as 0."""
        self._path = memcg_path
        self._v1 = not os.path.exists(f"{memcg_path}/memory.events")  # noqa: PTH110  as _figure
        self._requests = {path: self._asked_of(path) for path in (memcg_path, *ancestors(memcg_path))}
        self._asked: list[str] = []  # in the last look, and no victim came of it yet
        self._first = self._count = self._kills()
        self._killed_ns: int | None = None
        self._cause = ""

    @property
    def count(self) -> int:
        """Victims since this began to look."""
        return self._count - self._first

    def look(self, now_ns: int) -> str:
        """What is to be said of kills since the last look; "" where there were none."""
        kills = self._kills()  # before the requests: a victim that is counted has its request counted
        requests = {path: self._asked_of(path) for path in self._requests}
        asked = [path for path, count in requests.items() if count > self._requests[path]] or self._asked
        self._asked = asked if requests != self._requests else []
        self._requests = requests
        new = kills - self._count
        if new <= 0:
            return ""
        self._count, self._asked = kills, []
        self._killed_ns, self._cause = now_ns, f"{_KILLER}, {self._whose(asked)}"
        counted = f"{kills - self._first} since governor guards this memcg, {kills} since it was made"
        return f"killed by {self._cause}: {new} process{'es' * (new > 1)} here ({counted})"

    def what_killed(self, now_ns: int) -> str:
        """By which kind of OOM kill a process that ended now can have ended; "" for none."""
        return self._cause if since(self._killed_ns, now_ns) <= _RECENT_NS else ""

    def _kills(self) -> int:
        return _figure(f"{self._path}/{'memory.oom_control' if self._v1 else 'memory.events'}", b"oom_kill")

    def _asked_of(self, path: str) -> int:
        return _figure(f"{path}/memory.failcnt", b"") if self._v1 else _figure(f"{path}/memory.events", b"oom")

    def _whose(self, asked: list[str]) -> str:
        if not asked:
            return "for want of memory on the machine"
        return "at the limit of its memcg" if asked[0] == self._path else f"at the limit of {asked[0]}"


def _figure(path: str, key: bytes) -> int:
    """Once a second for each memcg and those above it: no pathlib, which takes twice as long."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        data = os.read(fd, 4096)
        return cgroup.figure(data, key) if key else int(data)
    except (OSError, ValueError):
        return 0
    finally:
        os.close(fd)
