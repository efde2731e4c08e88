"""Whether the kernel's OOM killer chose somebody of a memcg, and for want of what."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path


class OomKills:
    """Of one memcg and those below it, since the last look()."""

    def __init__(self, memcg_path: str) -> None:
        self._path = memcg_path
        self.look()

    def look(self) -> None:
        """Forget what came before."""
        self._counted = _counts(self._path)

    def what_killed(self) -> str:
        """Which kind of OOM kill came since the last look; "" for none."""
        here, everywhere = _counts(self._path)
        if here > self._counted[0]:
            return "the kernel's OOM killer, at the limit of its memcg"
        return "the kernel's OOM killer, for want of memory on the machine" if everywhere > self._counted[1] else ""


def _counts(memcg_path: str) -> tuple[int, int]:
    """How often it chose somebody: in a memcg or below it, and on the whole machine."""
    return _count(f"{memcg_path}/memory.events") or _count(f"{memcg_path}/memory.oom_control"), _count("/proc/vmstat")


def _count(path: str) -> int:
    with suppress(OSError, ValueError):
        for line in Path(path).read_bytes().splitlines():
            if line.startswith(b"oom_kill "):
                return int(line.split()[1])
    return 0
