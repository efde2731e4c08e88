"""The reason of a termination in `/dev/termination-log`, where Kubernetes shows it with the container's last state.

The kubelet mounts such a file into every container. It is reached through `/proc/PID/root` of the agent, or by a
child that has gone inside: component by component, no link followed, regular files only. Call it before the agent
ends: then its root is gone; and in a child with a deadline: a container may have mounted a file system there that
never answers.
"""

from __future__ import annotations

import os

from governor import inside
from governor.journal import printable
from governor.session_files import Reopen, open_regular, reopen_by_proc

LIMIT_BYTES = 4096  # the kubelet reads no more (MaxContainerTerminationMessageLength)
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC


def write(reason: str, agent_pid: int = 0) -> bool:
    """Write the reason to the termination log of the agent's container, or of governor's own without an agent.

    False where there is no such file, which is usual outside Kubernetes; raises OSError where it cannot be written.
    """
    return write_below(f"/proc/{agent_pid}/root" if agent_pid else "/", reason)


def write_inside(reason: str, door: inside.Door) -> bool:
    """As write(), by a child that goes where the agent lives, and stays, as its user: what is mounted there may be
    anybody's. Raises OSError.
    """
    return write_below("/", reason, inside.move_in(door, inside.who(door)))


def write_below(root: str, reason: str, reopen: Reopen = reopen_by_proc) -> bool:
    """As write(), for the container whose root directory is `root`."""
    fds: list[int] = []
    try:
        fds.append(os.open(root, _DIRECTORY))  # the one link followed: /proc/PID/root itself, which is the kernel's
        fds.append(os.open("dev", _DIRECTORY | os.O_NOFOLLOW, dir_fd=fds[-1]))
        fds.append(open_regular("termination-log", os.O_WRONLY, fds[-1], reopen))
        os.ftruncate(fds[-1], 0)
        os.write(fds[-1], _line(reason))
    except (FileNotFoundError, NotADirectoryError, ProcessLookupError):
        return False
    finally:
        for fd in fds:
            os.close(fd)
    return True


def _line(reason: str) -> bytes:
    """One printable line of at most LIMIT_BYTES, cut between two characters."""
    line = printable(reason).encode(errors="replace")[: LIMIT_BYTES - 1]
    return line.decode(errors="ignore").encode() + b"\n"
