"""A person's veto: `governor hold 10m` writes until when, the loop reads it. A file, so that it survives restarts."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from governor import instance

_READ_BYTES = 64


def path_for(cgroup_id: int) -> Path:
    """Where the veto for a memcg is kept; raises OSError."""
    return instance.run_directory() / f"memcg-{cgroup_id}.hold"


def hold(cgroup_id: int, for_ns: int) -> None:
    """Forbid everything but the brake for so long; 0 ends a veto. Raises OSError."""
    path = path_for(cgroup_id)
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(str(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + for_ns))
    beside.rename(path)


def is_over(path: Path) -> bool:
    """Whether the time of a veto has passed."""
    return _left_ns(_read(path)) <= 0


def _read(path: Path) -> int:
    """Until when, on the boottime clock; 0 where that cannot be read."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # at each sample: mostly there is none
    except OSError:
        return 0
    try:
        return int(os.read(fd, _READ_BYTES))
    except (OSError, ValueError):
        return 0
    finally:
        os.close(fd)


def _left_ns(until_ns: int) -> int:
    return max(0, until_ns - time.clock_gettime_ns(time.CLOCK_BOOTTIME))


class Veto:
    """The veto on one memcg, as the loop sees it."""

    def __init__(self, cgroup_id: int) -> None:
        self._path = path_for(cgroup_id)
        self._until_ns = 0

    def changed(self) -> int | None:
        """What is left of a veto that is new, 0 for one that was ended or is over; None if all is as it was."""
        until_ns = _read(self._path)
        left_ns = _left_ns(until_ns)
        if not left_ns:
            until_ns = 0
        if until_ns == self._until_ns:
            return None
        self._until_ns = until_ns
        if not until_ns:
            with suppress(OSError):
                self._path.unlink()
        return left_ns
