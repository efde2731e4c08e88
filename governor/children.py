"""Work that may take long or hang, in a child process beside the loop: bounded in time and in output."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from governor import real_time
from governor.poller import Poller, is_ready
from governor.turns import Turn, Turns

_OUTPUT_LIMIT_BYTES = 64 << 10
_FLOOD_BYTES = 16 << 20  # who prints more is ended: reading it all would keep the loop busy
_DEATH_S = 0.2  # after SIGKILL; one that a file system (FUSE, NFS) holds in the kernel takes longer
_TEMPORARY_FAILURE = 75  # EX_TEMPFAIL of sysexits.h
PIPE_FD = 3  # in the child: what it prints


class Deferred(Exception):
    """Raised by the work of a child: this is not the moment, try again later; the text says why."""


class Child:
    """A running child: `pidfd` becomes readable when it ends, `pipe_fd` when it prints.

    `is_delivery`: it talks to the target, so its deadline may stand still while the target is frozen. `clean_up` is
    called once it has ended, or is left behind (False), and says what there is to say of it.
    """

    def __init__(self, pid: int, pipe_fd: int, deadline_ns: int, what: str, is_delivery: bool = False) -> None:
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)
        self.pipe_fd = pipe_fd
        self.deadline_ns = deadline_ns
        self.what = what
        self.is_delivery = is_delivery
        self.clean_up: Callable[[bool], str] | None = None
        self.output = b""
        self.printed_bytes = 0
        self.note = ""

    def drain(self) -> bool:
        """Take what it printed; False at the end of its output. What is over 64 KiB is thrown away."""
        try:
            data = os.read(self.pipe_fd, 65536)
        except BlockingIOError:
            return True
        self.output += data[: _OUTPUT_LIMIT_BYTES - len(self.output)]
        self.printed_bytes += len(data)
        return bool(data)

    @property
    def floods(self) -> bool:
        """Whether it printed more than anybody should read."""
        return self.printed_bytes > _FLOOD_BYTES

    def end(self) -> int:
        """Its exit status (negative: the signal), after SIGKILL to whatever of its group is left.

        One that does not die within 50 ms is not waited for any longer, as others want their turn: it stays behind,
        and `pidfd` stays open, for reap().
        """
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        status = self.reap(_DEATH_S)
        if self.clean_up:
            self.note = self.clean_up(status is not None)
        while self.drain() and len(self.output) < _OUTPUT_LIMIT_BYTES:
            if not is_ready(self.pipe_fd):
                break
        os.close(self.pipe_fd)
        return -signal.SIGKILL if status is None else status

    def reap(self, within_s: float = 0) -> int | None:
        """Its exit status, None while it has not died; then `pidfd` is closed, and -1."""
        if not is_ready(self.pidfd, within_s):
            return None
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        self.pidfd = -1
        return os.waitstatus_to_exitcode(status)


@dataclass(frozen=True, slots=True)
class Ended:
    """What became of a child: `status` as Popen has it, its output, whether it had to be ended, and a note."""

    status: int
    output: bytes
    over_deadline: bool
    flooded: bool = False
    note: str = ""

    @property
    def ok(self) -> bool:
        """Whether it did what it was asked to do, in time."""
        return self.status == 0 and not self.over_deadline and not self.flooded

    @property
    def deferred(self) -> bool:
        """Whether it says that this is not the moment, and to try again later (exit status 75, EX_TEMPFAIL)."""
        return self.status == _TEMPORARY_FAILURE and not self.over_deadline and not self.flooded

    @property
    def why(self) -> str:
        """What it left to say, in a line's length."""
        if self.over_deadline:
            return "it was over its deadline"
        if self.flooded:
            return "it printed too much and was ended"
        if self.note:
            return self.note
        if self.status == -signal.SIGKILL:
            return "it was killed; where that was for want of memory (dmesg), give governor's memcg more"
        return f"status {self.status}: {self.output.decode(errors='replace').strip()[-300:]}"


# Looks after a child that the first makes, and tells the second of its end: Children.attempt.
Attempt = Callable[[Callable[[], Child], Callable[[Ended], None]], None]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """What is not made yet, as others have their turn."""

    on_end: Callable[[Ended], None]
    let_go: Callable[[], None]
    deadline_ns: int
    what: str


class Children:
    """The running children of a loop, on the loop's poller; those of several of them share their turns."""

    def __init__(self, poller: Poller, turns: Turns | None = None) -> None:
        self._poller = poller
        self._turns = turns or Turns()
        self._running: dict[int, tuple[Child, Callable[[Ended], None]]] = {}  # by both descriptors
        self._waiting: dict[Turn, _Waiting] = {}
        self._begun: set[Turn] = set()

    def start(self, child: Child, on_end: Callable[[Ended], None]) -> None:
        """Look after a child; `on_end` is called once, by the poller or from check_deadlines."""
        for fd in (child.pidfd, child.pipe_fd):
            self._running[fd] = (child, on_end)
            self._poller.register(fd, self._on_ready)

    def attempt(self, make: Callable[[], Child], on_end: Callable[[Ended], None]) -> None:
        """Look after a child that `make` makes; one that cannot be made has failed like any other."""
        try:
            child = make()
        except OSError as error:  # no memory or no pid for it
            on_end(Ended(1, str(error).encode(), False))
        else:
            self.start(child, on_end)

    def attempt_in_turn(
        self,
        make: Callable[[], Child],
        on_end: Callable[[Ended], None],
        deadline_ns: int,
        what: str,
        let_go: Callable[[], None],
    ) -> None:
        """As attempt(), once `Turns` lets it: what waits beyond its deadline has failed without a child.

        `let_go` is called once, when `make` has been or will never be.
        """

        def ended(how: Ended) -> None:
            try:
                on_end(how)
            finally:
                self._begun.discard(turn)
                self._turns.end(turn, time.monotonic_ns())

        def begin() -> None:
            self._waiting.pop(turn)
            self._begun.add(turn)
            try:
                self.attempt(make, ended)
            finally:
                let_go()

        turn = Turn(begin)
        self._waiting[turn] = _Waiting(on_end, let_go, deadline_ns, what)
        self._turns.ask(turn, time.monotonic_ns())

    def _give_up(self, turn: Turn) -> _Waiting:
        """It does not wait any more, and will not begin."""
        waiting = self._waiting.pop(turn)
        self._turns.end(turn, time.monotonic_ns())
        waiting.let_go()
        return waiting

    def _on_ready(self, fd: int) -> None:
        child, _ = self._running.get(fd, (None, None))
        if child and fd == child.pidfd:
            if is_ready(fd):  # the poll may have meant another one's, closed since
                self._end(child, over_deadline=False)
        elif child and not child.drain():
            self._forget(fd)
        elif child and child.floods:
            self._end(child, over_deadline=False)

    @property
    def are_none(self) -> bool:
        """Whether none runs, and none is to."""
        return not self._running and not self._waiting

    def has_work(self) -> bool:
        """Whether one is at something other than a delivery: an archive, say."""
        return bool(self._waiting) or any(not child.is_delivery for child, _ in self._running.values())

    def prolong(self, by_ns: int) -> None:
        """Put off the deadlines of deliveries: say each time how long the target was frozen since the last."""
        for child in {child for child, _ in self._running.values() if child.is_delivery}:
            child.deadline_ns += by_ns

    def check_deadlines(self, now_ns: int) -> None:
        """End the children that are over theirs, and give up what has waited until then for its turn."""
        for child in {child for child, _ in self._running.values() if now_ns >= child.deadline_ns}:
            self._end(child, over_deadline=True)
        late = [turn for turn, one in self._waiting.items() if now_ns >= one.deadline_ns]
        for turn in filter(self._waiting.__contains__, late):  # as one is given up, another may begin
            text = "others that were before it took all the time it had"
            self._give_up(turn).on_end(Ended(1, b"", False, note=text))

    def abandon(self) -> list[str]:
        """End all without a word to anybody; what they were for."""
        given_up = [self._give_up(turn).what for turn in list(self._waiting)]
        children = {child for child, _ in self._running.values()}
        for child in children:
            self._forget(child.pidfd)
            self._forget(child.pipe_fd)
            self._end_now(child)
        for turn in self._begun:
            self._turns.end(turn, time.monotonic_ns())
        self._begun.clear()
        return given_up + [child.what for child in children]

    def _end(self, child: Child, over_deadline: bool) -> None:
        _, on_end = self._running[child.pidfd]
        for fd in (child.pidfd, child.pipe_fd):
            self._forget(fd)
        status = self._end_now(child)
        on_end(Ended(status, child.output, over_deadline, child.floods, child.note))

    def _end_now(self, child: Child) -> int:
        def reap(fd: int) -> None:
            if is_ready(fd):  # as in _on_ready
                self._poller.unregister(fd)
                child.reap()

        status = child.end()
        if child.pidfd >= 0:  # whenever it dies, and whatever has become of who made it
            self._poller.register(child.pidfd, reap)
        return status

    def _forget(self, fd: int) -> None:
        if self._running.pop(fd, None):
            self._poller.unregister(fd)


def fork(
    work: Callable[[], bytes], deadline_ns: int, what: str, is_delivery: bool = False, keep: Collection[int] = ()
) -> Child:
    """Run `work` in a fork of this process: it starts at once, with everything imported.

    It has the descriptors to `keep`, which are above 3, and no others of this process.

    What it returns becomes the child's output. An exception becomes exit status 1 with its text as output, Deferred
    becomes 75.
    """
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        status, output = 1, b""
        try:
            _become_child(write_fd, keep)
            output = work()
            status = 0
        except Deferred as error:
            status, output = _TEMPORARY_FAILURE, str(error).encode()
        except Exception as error:  # noqa: BLE001  the parent tells; there is nobody else here to do so
            output = (str(error) or type(error).__name__).encode()
        finally:
            with suppress(OSError):
                os.write(PIPE_FD, output[:_OUTPUT_LIMIT_BYTES])
            os._exit(status)
    os.close(write_fd)
    os.set_blocking(read_fd, False)
    return Child(pid, read_fd, deadline_ns, what, is_delivery)


def spawn(
    argv: tuple[str, ...],
    environment: dict[str, str],
    deadline_ns: int,
    what: str,
    prepare: Callable[[], bytes] = bytes,
) -> Child:
    """Run a command with no standard input, a delivery; what it prints is the child's output.

    `prepare` is called in the child before the command, and what it returns is printed first; an exception there
    becomes exit status 1 as in fork().
    """

    def work() -> bytes:
        os.write(PIPE_FD, prepare())
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        for number in (1, 2):
            os.dup2(PIPE_FD, number)
        real_time.become_ordinary()
        os.execvpe(argv[0], argv, {**os.environ, **environment})

    return fork(work, deadline_ns, what, is_delivery=True)


def _become_child(write_fd: int, keep: Collection[int]) -> None:
    """A process group of its own, usual signals, none of the parent's descriptors but the pipe and those to keep."""
    assert all(fd > PIPE_FD for fd in keep)
    os.setpgid(0, 0)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
    os.dup2(write_fd, PIPE_FD, inheritable=False)
    close_all_but({0, 1, 2, PIPE_FD, *keep})


def memory_bound(more_bytes: int) -> tuple[int, int]:
    """RLIMIT_AS for a process that may have so much beside what it has by now; then there is a MemoryError."""
    used_bytes = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    return used_bytes + more_bytes if hard < 0 else min(used_bytes + more_bytes, hard), hard


def close_all_but(keep: set[int]) -> None:
    """Close every descriptor of this process that is not one of these."""
    first = 0
    for fd in (*sorted(keep), os.sysconf("SC_OPEN_MAX")):
        if first < fd:  # closerange(0, 0) means all of them to close_range(2)
            os.closerange(first, fd)
        first = fd + 1
