"""Connects a socket to one that somebody in a container listens at, in a child that has gone there.

The socket is governor's all along: the child only makes the connection, with the container's mounts and the agent's
user, so that no link leads it anywhere where that user could not go. Says nothing, and trusts nobody who listens.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from typing import NoReturn

from governor.children import close_all_but
from governor.inside import Door, environment, hide, move_in, who
from governor.poller import is_ready

VISIT_S = 2.0


def connect_inside(made: socket.socket, door: Door, name: str) -> bytes:
    """Have a socket connected to this one of governor's run-time directory there; to be called in a child.

    By a child of that child: one that a file system holds in the kernel is left to itself. Raises OSError.
    """
    pid = os.fork()
    if pid == 0:
        _visit(made, door, name)
    pidfd = os.pidfd_open(pid)
    if not is_ready(pidfd, VISIT_S):
        os.kill(pid, signal.SIGKILL)
        raise TimeoutError(f"no answer within {VISIT_S:g} s")
    if code := os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError(f"cannot connect to {name}: {os.strerror(abs(code))}")
    return b""


def _visit(made: socket.socket, door: Door, name: str) -> NoReturn:
    """Go there, connect, and never come back."""
    code = errno.EIO
    try:
        hide()
        inhabitant = who(door)
        own = environment(door).get("XDG_RUNTIME_DIR", "")
        close_all_but({made.fileno(), *door.fds})
        sys.meta_path.clear()  # a module that is imported from now on would be the container's
        move_in(door, inhabitant)
        close_all_but({made.fileno()})
        for base in ("/run", own, f"/tmp/governor-{inhabitant.inner_uid}"):  # noqa: S108  as instance.run_directory()
            try:
                if base.startswith("/"):
                    made.connect(f"{base}/governor/{name}")
                    code = 0
                    break
            except OSError as error:
                code = error.errno or errno.EIO
    except OSError as error:
        code = error.errno or errno.EIO
    finally:
        os._exit(code)
