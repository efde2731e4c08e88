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

_RECENT_NS = 5 * SECOND  # from a request to its victim's count, and from that to the end of a large process
_KILLER = "the kernel's OOM killer"


class OomKills:
    """The OOM kills in one memcg and below it. What the kernel had counted before is no news."""

    def __init__(self, memcg_path: str) -> None:
        """Never raises: what cannot be read counts as 0."""
        self._path = path = Path(memcg_path)
        self._requests = {each: _requests(each) for each in (path, *map(Path, ancestors(memcg_path)))}
        self._asked_ns: dict[Path, int] = {}  # when a request was last counted
        self._first = self._count = _kills(path)
        self._killed_ns: int | None = None
        self._cause = ""

    def look(self, now_ns: int) -> str:
        """What is to be said of kills since the last look; "" where there were none."""
        for path, before in self._requests.items():
            self._requests[path] = count = _requests(path)
            if count > before:
                self._asked_ns[path] = now_ns
        kills = _kills(self._path)
        new = kills - self._count
        if new <= 0:
            return ""
        self._count = kills
        self._killed_ns, self._cause = now_ns, f"{_KILLER}, {self._whose(now_ns)}"
        counted = f"{kills - self._first} since governor guards this memcg, {kills} since it was made"
        return f"killed by {self._cause}: {new} process{'es' * (new > 1)} here ({counted})"

    def what_killed(self, now_ns: int) -> str:
        """By which kind of OOM kill a process that ended now can have ended; "" for none."""
        return self._cause if since(self._killed_ns, now_ns) <= _RECENT_NS else ""

    def _whose(self, now_ns: int) -> str:
        asked = [path for path in self._requests if since(self._asked_ns.get(path), now_ns) <= _RECENT_NS]
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
