"""Files that nobody uses any more: a killed governor's, removed at each start and by `governor off`."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from governor import instance, state_file, veto
from governor.brake import KnobFile

_YOUNG_S = 60.0  # whoever made it may be about to use it
_TOLD_S = 86400.0  # what was done to a tool is of interest for so long after the guard has gone
_RUN_PID = re.compile(r"run-(\d+)\.")


def sweep(young_s: float = _YOUNG_S) -> list[str]:
    """Remove what nobody holds, hears or waits for, but for what is younger; the names. Raises OSError: no directory.

    A knob file with something in it that is still to be undone stays.
    """
    run, states = instance.run_directory(), state_file.path_for("").parent
    kinds: tuple[tuple[Path, str, Callable[[Path], bool]], ...] = (
        (run, "*.sock", _is_deaf),
        (run, "run-*.resume*", _is_of_the_dead),
        (run, "memcg-*.hold", veto.is_over),
        (run, "memcg-*.told", _is_old_news),
        (run, "*.knobs", _is_undone),
        (run, "*.lock", lambda _: True),
        (states, ".*", state_file.is_left_over),  # not for each target: of states a node has a thousand
    )
    removed = []
    for directory, pattern, is_left in kinds:
        for path in sorted(directory.glob(pattern)):
            with suppress(OSError, instance.Busy):
                if time.time() - path.lstat().st_mtime >= young_s and _remove(path, is_left):
                    removed.append(path.name)
    return removed


def _remove(path: Path, is_left: Callable[[Path], bool]) -> bool:
    """Under the lock that stands for it where there is one: whoever takes that next finds all of it gone, or nothing.

    Raises Busy, OSError.
    """
    lock_path = path.with_suffix(".lock")
    lock_fd = instance.take_unused(lock_path) if lock_path.exists() else -1
    try:
        if not is_left(path):
            return False
        path.unlink()
        return True
    finally:
        if lock_fd >= 0:
            os.close(lock_fd)


def _is_deaf(path: Path) -> bool:
    """Whether nobody listens there."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(0)
        try:
            client.connect(str(path))
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def _is_of_the_dead(path: Path) -> bool:
    found = _RUN_PID.match(path.name)
    return bool(found) and not Path("/proc", found[1] if found else "").exists()


def _is_old_news(path: Path) -> bool:
    return time.time() - path.lstat().st_mtime >= _TOLD_S


def _is_undone(path: Path) -> bool:
    return not KnobFile(str(path)).is_turned
