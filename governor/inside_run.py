"""Runs a command where a process of a container lives: in all its namespaces, as its user, without any capability.

What is executed is the container's, so nothing of ours is left by then: not a right, a descriptor, a variable, a key
or a page of memory. The memcg it runs in is ours, made and entered before (actions/commands.py).
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Callable
from typing import NoReturn

from governor import inside, real_time, system_calls, trampoline
from governor.children import PIPE_FD, Child, close_all_but, fork

_ENVIRONMENT_BYTES = 128 << 10
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_NOT_FOUND = 127
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True)


def start(
    door: inside.Door,
    argv: tuple[str, ...],
    variables: dict[str, str],
    deadline_ns: int,
    what: str,
    prepare: Callable[[], bytes],
) -> Child:
    """Start a command inside; `prepare` as in children.spawn, and called before it goes inside.

    It has the process's environment and `variables`; of those, GOVERNOR_AGENT_PID is the process's pid as it knows it
    itself. It cannot leave its memcg, so whatever it starts ends with it there.
    """

    def work() -> bytes:
        os.write(PIPE_FD, prepare())
        _go(door, argv, variables)

    return fork(work, deadline_ns, what, is_delivery=True, keep=door.fds)


def _go(door: inside.Door, argv: tuple[str, ...], variables: dict[str, str]) -> NoReturn:
    """Raises OSError; in this process or in the one that is inside, it is all the same to who waits."""
    inside.hide()
    runner, environment = inside.who(door), _environment(door, variables)
    is_of_our_users = inside.is_of_our_users(door)
    uid, gid = (runner.uid, runner.gid) if is_of_our_users else (runner.inner_uid, runner.inner_gid)
    if min(uid, gid) < 0:
        raise OSError("its user has no number in its user namespace")
    program = trampoline.open_trampoline()
    _leave_behind()
    sys.meta_path.clear()  # a module that is imported from now on would be the container's
    inside.enter_all(door)
    if not is_of_our_users:
        inside.enter_users(door)
    inside.become(uid, gid, None)
    close_all_but({0, 1, 2, PIPE_FD, program})
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        os._exit(code if code >= 0 else 128 - code)
    os.setsid()
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    path = _found(argv[0], environment.get("PATH", _PATH))
    system_calls.restrict()
    trampoline.jump(program, path, argv, environment)


def _environment(door: inside.Door, variables: dict[str, str]) -> dict[str, str]:
    found: dict[str, str] = {"PATH": _PATH}
    left_bytes = _ENVIRONMENT_BYTES
    for name, value in inside.environment(door).items():
        left_bytes -= len(os.fsencode(name)) + len(os.fsencode(value)) + 2
        if left_bytes >= 0:
            found[name] = value
    own = {"GOVERNOR_AGENT_PID": str(inside.who(door).inner_pid)} if "GOVERNOR_AGENT_PID" in variables else {}
    return found | variables | own


def _leave_behind() -> None:
    """What a process has of us beside its rights."""
    system_calls.new_session_keyring()
    nobody, writer = os.pipe()
    os.dup2(nobody, 0)  # and not /dev/null, which would be one of the host
    os.close(writer)
    for number in (1, 2):
        os.dup2(PIPE_FD, number)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    real_time.become_ordinary()
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    os.umask(0o022)


def _found(name: str, path: str) -> str:
    """Where a command is, as execvp looks for it; ends with status 127 where it is nowhere."""
    places = [name] if "/" in name else [f"{directory}/{name}" for directory in path.split(":")]
    for place in places:
        if os.access(place, os.X_OK):
            return place
    os.write(PIPE_FD, f"{name}: found nothing to execute inside the container".encode(errors="replace"))
    os._exit(_NOT_FOUND)
