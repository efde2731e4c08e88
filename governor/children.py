"""Work that may take long or hang, in a child process beside the loop: bounded in time and in output."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

_OUTPUT_LIMIT_BYTES = 64 << 10
_PIPE_FD = 3  # in the child


class Child:
    """A running child: `pidfd` becomes readable when it ends, `pipe_fd` when it prints."""

    def __init__(self, pid: int, pipe_fd: int, deadline_ns: int, what: str) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.pipe_fd = pipe_fd
        self.deadline_ns = deadline_ns
        self.what = what
        self.output = b""

    def drain(self) -> bool:
        """Take what it printed; False at the end of its output. What is over 64 KiB is thrown away."""
        try:
            data = os.read(self.pipe_fd, 65536)
        except BlockingIOError:
            return True
        self.output = (self.output + data)[:_OUTPUT_LIMIT_BYTES]
        return bool(data)

    def end(self) -> int:
        """Its exit status (negative: the signal), after SIGKILL to whatever of its group is left."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        while self.drain() and len(self.output) < _OUTPUT_LIMIT_BYTES:
            if not select.select([self.pipe_fd], [], [], 0)[0]:
                break
        os.close(self.pipe_fd)
        os.close(self.pidfd)
        return os.waitstatus_to_exitcode(status)


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a child: `status` as Popen has it, its output, and whether it had to be ended."""

    status: int
    output: bytes
    over_deadline: bool

    @property
    def ok(self) -> bool:
        """Whether it did what it was asked to do, in time."""
        return self.status == 0 and not self.over_deadline


class Children:
    """The running children of a loop, on the loop's poller."""

    def __init__(self, poller: select.poll) -> None:
        self._poller = poller
        self._running: dict[int, tuple[Child, Callable[[Ended], None]]] = {}  # by both descriptors

    def start(self, child: Child, on_end: Callable[[Ended], None]) -> None:
        """Look after a child; `on_end` is called once, from on_ready or check_deadlines."""
        for fd in (child.pidfd, child.pipe_fd):
            self._running[fd] = (child, on_end)
            self._poller.register(fd, select.POLLIN)

    def on_ready(self, fd: int) -> None:
        """A descriptor of the poller is ready; not one of ours: nothing happens."""
        child, _ = self._running.get(fd, (None, None))
        if child and fd == child.pidfd:
            self._end(child, over_deadline=False)
        elif child and not child.drain():
            self._forget(fd)

    def check_deadlines(self, now_ns: int) -> None:
        """End the children that are over theirs."""
        for child in {child for child, _ in self._running.values() if now_ns >= child.deadline_ns}:
            self._end(child, over_deadline=True)

    def abandon(self) -> list[str]:
        """End all without a word to anybody; what they were for."""
        children = {child for child, _ in self._running.values()}
        for child in children:
            child.end()
        return [child.what for child in children]

    def _end(self, child: Child, over_deadline: bool) -> None:
        _, on_end = self._running[child.pidfd]
        for fd in (child.pidfd, child.pipe_fd):
            self._forget(fd)
        on_end(Ended(child.end(), child.output, over_deadline))

    def _forget(self, fd: int) -> None:
        if self._running.pop(fd, None):
            self._poller.unregister(fd)


def fork(work: Callable[[], bytes], deadline_ns: int, what: str) -> Child:
    """Run `work` in a fork of this process: it starts at once, with everything imported.

    What it returns becomes the child's output. An exception becomes exit status 1 with its text as output.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        status, output = 1, b""
        try:
            _become_child(write_fd)
            output = work()
            status = 0
        except Exception as error:  # noqa: BLE001  the parent tells; there is nobody else here to do so
            output = str(error).encode()
        finally:
            with suppress(OSError):
                os.write(_PIPE_FD, output[:_OUTPUT_LIMIT_BYTES])
            os._exit(status)
    os.close(write_fd)
    os.set_blocking(read_fd, False)
    return Child(pid, read_fd, deadline_ns, what)


def spawn(argv: tuple[str, ...], environment: dict[str, str], deadline_ns: int, what: str) -> Child:
    """Run a command with no standard input; what it prints is the child's output."""

    def work() -> bytes:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        for number in (1, 2):
            os.dup2(_PIPE_FD, number)
        os.execvpe(argv[0], argv, {**os.environ, **environment})

    return fork(work, deadline_ns, what)


def _become_child(write_fd: int) -> None:
    """A process group of its own, usual signals, and none of the parent's descriptors but the pipe."""
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.dup2(write_fd, _PIPE_FD, inheritable=False)
    os.closerange(_PIPE_FD + 1, 4096)
