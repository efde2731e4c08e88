"""Where governor keeps what it needs at run time, and the locks that make one instance the only one.

Run-time files (locks, knob files): /run/governor, or $XDG_RUNTIME_DIR/governor without root. State (journal,
archives): $XDG_STATE_HOME/governor, else ~/.local/state/governor.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from functools import cache
from itertools import chain
from pathlib import Path

_PATIENCE_S, _AGAIN_S = 0.5, 0.01


class Busy(Exception):
    """Another process holds the lock; `pid` is that process, 0 if it is not known."""

    def __init__(self, path: Path, pid: int) -> None:
        super().__init__(f"{path} is held by process {pid}")
        self.pid = pid


def run_directory() -> Path:
    """The directory of run-time files, made if absent; raises OSError."""
    base = "/run" if os.geteuid() == 0 else os.environ.get("XDG_RUNTIME_DIR", "")
    base = base if base.startswith("/") else f"/tmp/governor-{os.geteuid()}"  # noqa: S108
    path = _own(base)
    if not os.path.isdir(path):  # noqa: PTH112  asked a few times for each container: a tenth of making it in vain
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    for each, owners in ((base, (0, os.geteuid())), (path, (os.geteuid(),))):
        if os.stat(each).st_uid not in owners:  # noqa: PTH116  who could put something else in its place
            raise PermissionError(errno.EPERM, "belongs to another user", str(each))
    return path


@cache
def _own(base: str) -> Path:
    return Path(base, "governor")


def state_directory() -> Path:
    """The directory of journals and archives; not made here.

    Below the run-time directory where there is no home or nothing may be written there, as in a container whose user
    is a bare number. Raises OSError where there is neither.
    """
    base = os.environ.get("XDG_STATE_HOME")
    if not base:
        try:
            base = str(Path.home() / ".local" / "state")
        except RuntimeError:
            return run_directory() / "state"
    path = _own(base)
    if os.access(path, os.W_OK | os.X_OK):
        return path
    there = next(place for place in chain((path,), path.parents, (Path(),)) if os.access(place, os.F_OK))
    return path if os.access(there, os.W_OK | os.X_OK) else run_directory() / "state"


def lock_path(name: str) -> Path:
    """The file of a lock; raises OSError."""
    return run_directory() / f"{name}.lock"


def lock(name: str) -> int:
    """Take a lock and return its descriptor, which an exec keeps; raises Busy with the holder's pid."""
    path = lock_path(name)
    until_s = time.monotonic() + _PATIENCE_S
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            _take(fd, path)
        except Busy as busy:
            os.close(fd)
            if time.monotonic() >= until_s or (busy.pid and Path(f"/proc/{busy.pid}").exists()):
                raise
            time.sleep(_AGAIN_S)  # somebody only looks whether it is held, or has removed it
            continue
        os.set_inheritable(fd, True)
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
        return fd


def take_unused(path: Path) -> int:
    """Take a lock that nobody holds, without a word of who has it now; its descriptor. Raises Busy, OSError."""
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _take(fd, path)
    except Busy:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)  # who looks meanwhile must not take the pid of one that is gone for a holder
    return fd


def _take(fd: int, path: Path) -> None:
    """Raises Busy where somebody else holds it, or it is not the one of that name any more."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).strip()
        raise Busy(path, int(holder) if holder.isdigit() else 0) from None
    try:
        is_it = path.stat().st_ino == os.fstat(fd).st_ino
    except FileNotFoundError:
        is_it = False
    if not is_it:
        raise Busy(path, 0)


def holders(name: str = "*") -> list[int]:
    """Pids of all processes that hold a lock now, or the one of this name."""
    return sorted(set(_held(f"{name}.lock").values()) - {0})


def held_by(pid: int) -> list[str]:
    """The names of the locks that a process holds now; raises OSError."""
    return sorted(name for name, holder in _held("*.lock").items() if holder == pid)


def guarded() -> dict[int, int]:
    """The cgroup id of every memcg that is guarded now, with the pid that guards it; raises OSError."""
    held = {name.removeprefix("memcg-"): pid for name, pid in _held("memcg-*.lock").items()}
    return {int(number): pid for number, pid in held.items() if number.isdigit()}


def _held(pattern: str) -> dict[str, int]:
    """The locks that are held, by their names, with the pids of their holders."""
    found = {}
    for path in run_directory().glob(pattern):
        try:
            os.close(take_unused(path))
        except Busy as busy:
            found[path.stem] = busy.pid
        except FileNotFoundError:
            continue
    return found


def knob_file(instance: str) -> Path:
    """The knob file of an instance."""
    return run_directory() / f"{instance}.knobs"


def knob_files() -> list[Path]:
    """The knob files of all instances."""
    return sorted(run_directory().glob("*.knobs"))
