"""Starts an agent: its session, its terminal or pipes, its memcg, and nothing of governor's in it.

Under a terminal whose shell has job control, a keeper leads the session, and the agent leads a process group of it: a
process group whose parent is in another session is an orphaned one, where the kernel discards Ctrl-Z
(is_current_pgrp_orphaned). The keeper tells of each stop. Elsewhere the agent leads the session itself.
"""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import struct
import termios
from typing import NamedTuple

_REPORT_FD, _STOPS_FD = 3, 4  # in the child
_REPORT = struct.Struct("=ii")  # the agent's pid, and errno: 0 while all is well, negative for its memcg
NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells have it


class CannotStart(Exception):
    """The command did not become a process; `status` is what shells exit with then."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _NoEntry(OSError):
    """The agent's memcg cannot be entered."""


class Agent(NamedTuple):
    """A started agent; `stops_fd` becomes readable when it stopped, -1 where its parent hears that by wait."""

    pid: int
    pidfd: int
    stops_fd: int

    def send(self, number: int) -> None:
        """Signal it, if it is still there."""
        try:
            signal.pidfd_send_signal(self.pidfd, number)
        except OSError:
            return

    def go_on(self) -> None:
        """SIGCONT to it and its process group, which a terminal may have stopped with it."""
        try:
            os.killpg(self.pid, signal.SIGCONT)
        except OSError:
            return


def start(
    command: list[str],
    streams: tuple[int, int, int],
    terminal_fd: int = -1,
    keeper: bool = False,
    memcg: str = "",
    without: tuple[str, ...] = (),
) -> Agent:
    """Start a command with these descriptors as its standard streams; raises CannotStart.

    `terminal_fd` becomes its controlling terminal; `memcg` is entered before; `without` are names that its
    environment is not to have.
    """
    report_read, report_write = os.pipe2(os.O_CLOEXEC)
    stops_read, stops_write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK) if keeper else (-1, -1)
    environment = {name: value for name, value in os.environb.items() if name.decode(errors="replace") not in without}
    usual_mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    pid = os.fork()
    if pid == 0:
        try:
            _become(command, environment, streams, terminal_fd, memcg, (report_write, stops_write))
        except BaseException as error:  # noqa: BLE001  there is nobody else here to tell
            number = getattr(error, "errno", None) or errno.EINVAL
            os.write(_REPORT_FD, _REPORT.pack(os.getpid(), -number if isinstance(error, _NoEntry) else number))
        finally:
            os._exit(NOT_FOUND)
    signal.pthread_sigmask(signal.SIG_SETMASK, usual_mask)
    for fd in (report_write, stops_write):
        if fd >= 0:
            os.close(fd)
    with os.fdopen(report_read, "rb") as report:
        told = report.read()  # until exec closes it
    agent_pid, number = _REPORT.unpack(told[-_REPORT.size :]) if len(told) >= _REPORT.size else (pid, errno.EAGAIN)
    if number == 0:
        return Agent(agent_pid, os.pidfd_open(agent_pid), stops_read)
    for child in {pid, agent_pid}:
        _await(child)
    if stops_read >= 0:
        os.close(stops_read)
    raise _why_not(command[0], number, memcg)


def _why_not(name: str, number: int, memcg: str) -> CannotStart:
    if number < 0:
        return CannotStart(1, f"the agent cannot enter {memcg}: {os.strerror(-number)}")
    if number in (errno.ENOENT, errno.ENOTDIR):
        text = f"found no command {name!r}, expected a program in PATH or its path (or its #! names one that is not)"
        return CannotStart(NOT_FOUND, text)
    return CannotStart(NOT_EXECUTABLE, f"{name!r} cannot be executed: {os.strerror(number)}")


def _await(pid: int) -> None:
    try:
        os.waitpid(pid, 0)
    except ChildProcessError:
        return


def _become(
    command: list[str],
    environment: dict[bytes, bytes],
    streams: tuple[int, int, int],
    terminal_fd: int,
    memcg: str,
    tell: tuple[int, int],
) -> None:
    """In the child, with all signals blocked: the agent, and before it the keeper where there is to be one."""
    _arrange((*streams, *tell))
    os.setsid()
    if terminal_fd >= 0:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in signal.valid_signals():
        if number not in (signal.SIGKILL, signal.SIGSTOP) and callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    if tell[1] >= 0:
        _keep()
    os.write(_REPORT_FD, _REPORT.pack(os.getpid(), 0))
    if memcg:
        _enter(memcg)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.execvpe(command[0], command, environment)


def _arrange(wanted: tuple[int, ...]) -> None:
    """Descriptors 0 to 4 become those wanted, all others are closed; -1 leaves one closed."""
    high = [os.dup(fd) if fd >= 0 else -1 for fd in wanted]  # so that none is overwritten before it is used
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) if fd >= 0 else -1 for fd in high]
    for number, fd in enumerate(high):
        if fd >= 0:
            os.dup2(fd, number, inheritable=number < _REPORT_FD)
        elif number >= _REPORT_FD:
            os.closerange(number, number + 1)
    os.closerange(_STOPS_FD + 1, os.sysconf("SC_OPEN_MAX"))


def _enter(memcg: str) -> None:
    try:
        fd = os.open(f"{memcg}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        os.write(fd, b"0")
        os.close(fd)
    except OSError as error:
        raise _NoEntry(error.errno, error.strerror) from None


def _keep() -> None:
    """Fork: the child goes on as the agent, in the foreground; the keeper tells of its stops and ends after it."""
    pid = os.fork()
    if pid == 0:
        os.setpgid(0, 0)
        os.tcsetpgrp(0, os.getpid())  # from the background: allowed while SIGTTOU is blocked
        os.close(_STOPS_FD)
        return
    os.closerange(0, _STOPS_FD)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    while True:
        # Its end is left for governor to wait for, which inherits it as the reaper of what is orphaned below it.
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WSTOPPED | os.WNOWAIT)
        if found is None or found.si_code != os.CLD_STOPPED:
            os._exit(0)
        os.waitid(os.P_PID, pid, os.WSTOPPED | os.WNOHANG)
        try:
            os.write(_STOPS_FD, bytes([found.si_status]))
        except OSError:
            os._exit(0)
