"""OOM kills that got through: counted, and told apart by whose limit it was.

The kernel counts a victim in its memcg whoever asked for it (`oom_kill` of memory.events, commit 8e675f7af507), but
the request for one only where the limit is (`oom`, in that memcg and those above). A victim without a request at any
limit that can be seen died for want of memory on the machine, or at a limit above what a container sees. On cgroup v1
requests are not counted: there each charge that failed for a limit (memory.failcnt) stands for one.
"""

from __future__ import annotations

from pathlib import Path

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
        self._path = path = Path(memcg_path)
        self._requests = {each: _requests(each) for each in (path, *map(Path, ancestors(memcg_path)))}
        self._asked: list[Path] = []  # in the last look, and no victim came of it yet
        self._first = self._count = _kills(path)
        self._killed_ns: int | None = None
        self._cause = ""

    @property
    def count(self) -> int:
        """Victims since this began to look."""
        return self._count - self._first

    def look(self, now_ns: int) -> str:
        """What is to be said of kills since the last look; "" where there were none."""
        kills = _kills(self._path)  # before the requests: a victim that is counted has its request counted
        requests = {path: _requests(path) for path in self._requests}
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

    def _whose(self, asked: list[Path]) -> str:
        if not asked:
            return "for want of memory on the machine"
        return "at the limit of its memcg" if asked[0] == self._path else f"at the limit of {asked[0]}"


def _kills(path: Path) -> int:
    return _figure(path / "memory.events", b"oom_kill") or _figure(path / "memory.oom_control", b"oom_kill")


def _requests(path: Path) -> int:
    return _figure(path / "memory.events", b"oom") or _figure(path / "memory.failcnt", b"")


def _figure(path: Path, key: bytes) -> int:
    try:
        data = path.read_bytes()
        return cgroup.parse_flat_keyed(data).get(key, 0) if key else int(data)
    except (OSError, ValueError):
        return 0
