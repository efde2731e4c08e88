"""`governor guard --background`: a guard that outlives whoever started it, such as a container's postStart hook.

Who started it waits until the memcg is protected, or until that has failed. Then the guard has nothing of it any
more: no session, no directory, no standard stream (a kubelet waits for the end of a hook's streams as well).
"""

from __future__ import annotations

import os
import select
import sys
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

_WAIT_MS = 60_000
_LOG_BYTES = 1 << 20
_NAME = "GOVERNOR_LOG"  # tells the guard, which begins by an exec, where its words go


def detach() -> int:
    """Go on in a child, in a session of its own; returns what ready() is to be told there.

    The caller ends here, with status 0 once ready() was called, else as the child ended.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid:
        os.close(write_fd)
        _await(pid, read_fd)
    os.close(read_fd)
    os.setsid()
    os.set_inheritable(write_fd, True)
    return write_fd


def ready(fd: int) -> int:
    """Tell whoever waits that it need not any more, once; returns what takes the descriptor's place (-1)."""
    if fd >= 0:
        with suppress(OSError):  # it has not waited so long
            os.write(fd, b"1")
        os.close(fd)
    return -1


def leave_streams(log: Path) -> None:
    """Standard streams to the log and nowhere else; what the log holds already is kept once more. Raises OSError.

    bound_log() keeps it small from then on.
    """
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if log.is_file():
        log.replace(log.with_name(f"{log.name}.1"))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o600)
    null = os.open("/dev/null", os.O_RDWR)
    for fd, ours in ((0, null), (1, out), (2, out)):
        os.dup2(ours, fd)
    os.close(out)
    os.close(null)
    os.environ[_NAME] = str(log)
    os.chdir("/")


def bound_log() -> None:
    """Once the log holds more than 1 MiB, keep that as leave_streams() does, and go on with none. Raises OSError.

    It is copied and emptied in its place: reflex and the guard's children append to it as well.
    """
    path = os.environ.get(_NAME)
    size_bytes = os.fstat(2).st_size if path else 0
    if not path or size_bytes <= _LOG_BYTES:
        return
    log = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not os.path.samestat(os.fstat(log), os.fstat(2)):  # somebody has moved it, and looks after it
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        with suppress(OSError):  # a full disk
            before = os.open(f"{path}.1", flags, 0o600)
            try:
                os.sendfile(before, log, 0, size_bytes)
            finally:
                os.close(before)
        os.ftruncate(log, 0)
    finally:
        os.close(log)


def _await(pid: int, read_fd: int) -> NoReturn:
    poller = select.poll()
    poller.register(read_fd, select.POLLIN)
    if not poller.poll(_WAIT_MS):
        print("governor: not protected yet after a minute: it goes on trying", file=sys.stderr)  # noqa: T201
        os._exit(1)
    if os.read(read_fd, 1):
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code not in (0, 2):
        print(f"governor: NOT PROTECTED: the guard has ended with status {code}", file=sys.stderr)  # noqa: T201
    sys.stderr.flush()
    os._exit(code if code >= 0 else 128 - code)
