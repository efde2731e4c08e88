"""What goes from one descriptor to another, through a buffer of bounded size; nothing here blocks or interprets.

A descriptor that governor was given is shared with whoever gave it, and so would O_NONBLOCK be: it is opened once
more, with a file description of its own, or asked before each write.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import stat
import time

CHUNK_BYTES = 65536
TAIL_BYTES = 256 << 10
_LIMIT_BYTES = 256 << 10  # waiting to be written
_LINE_LIMIT = 4000  # under PIPE_BUF
STALL_NS = 1_000_000_000
_WITHOUT_ASKING_BYTES = 512  # what a pipe or a terminal that poll() calls writable takes (POSIX: PIPE_BUF)


def say(text: str) -> None:
    """One line for people, on standard error; lost when nobody reads it."""
    line = f"governor: {text}"[:_LINE_LIMIT].encode(errors="replace")[:_LINE_LIMIT] + b"\n"
    try:
        if select.select([], [2], [], 0)[1]:  # a pipe then has room for PIPE_BUF
            os.write(2, line)
    except OSError:
        return


def fill_standard_streams() -> None:
    """Closed ones would be given to the next file that is opened."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open("/dev/null", os.O_RDWR), True)  # an exec would close it again


def end_standard_stream(fd: int) -> None:
    """It has ended: whoever is at its other side is to see that."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)


def _close_all_but(kept: set[int]) -> None:
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for fd in {0, 1, 2} - kept:
        os.dup2(null, fd)
    begin = 3
    for fd in [*sorted(fd for fd in kept if fd > 2), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(begin, fd)
        begin = fd + 1


class Sink:
    """A descriptor to write to, of whatever kind, that never blocks."""

    def __init__(self, fd: int, is_ours: bool = False) -> None:
        """`is_ours`: nobody else has this file description, and opening it again would make another one."""
        self.fd = fd
        self._socket: socket.socket | None = None
        self._most_bytes = CHUNK_BYTES
        mode = os.fstat(fd).st_mode
        if is_ours:
            os.set_blocking(fd, False)
        elif stat.S_ISSOCK(mode):
            self._socket = socket.socket(fileno=os.dup(fd))
        elif stat.S_ISFIFO(mode) or os.isatty(fd):
            try:
                flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
                self.fd = os.open(f"/proc/self/fd/{fd}", flags)
            except OSError:  # another user's
                self._most_bytes = _WITHOUT_ASKING_BYTES

    def write(self, data: memoryview) -> int:
        """How much of it was taken; raises BlockingIOError for nothing, OSError where nobody will ever read it."""
        if self._socket:
            return self._socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        if self._most_bytes == _WITHOUT_ASKING_BYTES and not select.select([], [self.fd], [], 0)[1]:
            raise BlockingIOError
        return os.write(self.fd, data[: self._most_bytes])

    @property
    def fds(self) -> set[int]:
        """What it writes to."""
        return {self._socket.fileno() if self._socket else self.fd, self.fd}

    def close(self) -> None:
        """Close it, but for a descriptor that governor was given."""
        if self._socket:
            self._socket.close()
        if self.fd > 2:
            os.close(self.fd)


class Flow:
    """From `source` to `sink`; either is -1 or None once it has ended. Keeps the last 256 KiB if asked to.

    With `lossy` the source is read on, and what is too much is thrown away, while the sink takes nothing for a
    second: whoever writes to a terminal that nobody reads would hang in it, deaf to signals.
    """

    def __init__(self, source: int, sink: Sink, keeps_tail: bool = False, lossy: bool = False) -> None:
        self.source = source
        self.sink: Sink | None = sink
        self.tail = bytearray()
        self.lost = False  # since the sink last took something
        self._keeps_tail, self._lossy = keeps_tail, lossy
        self._waiting = bytearray()
        self._taken_ns = 0  # when the sink last took something, or when it last had nothing to take

    @property
    def waiting_bytes(self) -> int:
        """What the sink has not taken yet."""
        return len(self._waiting)

    def stalled_in_ns(self, now_ns: int) -> int | None:
        """How long until the sink counts as stalled, 0 when it does; None where nothing waits."""
        return max(0, self._taken_ns + STALL_NS - now_ns) if self._waiting else None

    @property
    def is_over(self) -> bool:
        """Whether one end has ended, and nothing is left to pass to the other."""
        return self.source >= 0 if self.sink is None else self.source < 0 and not self._waiting

    def close(self) -> None:
        """Close both ends, but for the descriptors that governor was given."""
        self._source_ended()
        if self.sink:
            self._sink_ended()

    def wants(self, now_ns: int) -> dict[int, int]:
        """What to poll for: descriptor to events."""
        wanted = {}
        stalled = self._lossy and self.stalled_in_ns(now_ns) == 0
        if self.source >= 0 and (len(self._waiting) < _LIMIT_BYTES or stalled or self.sink is None):
            wanted[self.source] = select.POLLIN
        if self.sink:
            wanted[self.sink.fd] = select.POLLOUT if self._waiting else 0  # its end is always told
        return wanted

    def on_ready(self, fd: int, events: int) -> None:
        """What poll() said of one of the two."""
        if fd == self.source and events & (select.POLLIN | select.POLLHUP | select.POLLERR | select.POLLNVAL):
            self.fill()
        if self.sink and fd == self.sink.fd:
            if self._waiting:
                self.flush()
            elif events & (select.POLLERR | select.POLLHUP | select.POLLNVAL):
                self._sink_ended()

    def fill(self) -> bool:
        """Read once; False where nothing is to be had now."""
        if self.source < 0:
            return False
        try:
            data = os.read(self.source, CHUNK_BYTES)
        except BlockingIOError:
            return False
        except OSError:  # EIO: the terminal is gone
            data = b""
        if not data:
            self._source_ended()
            return False
        self.put(data)
        return True

    def put(self, data: bytes) -> None:
        """As if it had been read."""
        if self._keeps_tail:
            self.tail += data
            del self.tail[:-TAIL_BYTES]
        if self.sink is None:
            return
        if not self._waiting:
            self._taken_ns = time.monotonic_ns()
        if self._lossy and len(self._waiting) >= _LIMIT_BYTES and self.stalled_in_ns(time.monotonic_ns()) == 0:
            self.lost = True
            return
        self._waiting += data
        self.flush()

    def inject(self, data: bytes) -> None:
        """Something of our own, which is not the source's: the tail is without it."""
        if self.sink:
            if not self._waiting:
                self._taken_ns = time.monotonic_ns()
            self._waiting += data
            self.flush()

    def flush(self) -> None:
        """Write what the sink takes now."""
        while self._waiting and self.sink:
            try:
                with memoryview(self._waiting) as view, view[:CHUNK_BYTES] as part:
                    taken = self.sink.write(part)
            except BlockingIOError:
                return
            except OSError:  # EPIPE, EIO: nobody will read it
                self._sink_ended()
                return
            del self._waiting[:taken]
            self._taken_ns = time.monotonic_ns()

    def leave_behind(self) -> None:
        """Have a process of its own pass on what others than the agent may write later, as if nobody were between.

        It ends with the last who can write, or when nobody reads any more. Ours are closed.
        """
        try:
            if self.source >= 0 and self.sink and os.fork() == 0:
                try:
                    self._stay_behind(self.sink)
                finally:
                    os._exit(0)
        except OSError as error:  # no process, or no memory for one
            say(f"what is written after the agent's end is lost: {error.strerror}")
        self.close()

    def _stay_behind(self, sink: Sink) -> None:
        os.setsid()  # what is typed at a terminal is not meant for it
        signal.set_wakeup_fd(-1)
        for number in signal.valid_signals():
            if callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        _close_all_but({self.source, *sink.fds})
        while not self.is_over and self.sink:
            poller = select.poll()
            for fd, events in self.wants(time.monotonic_ns()).items():
                poller.register(fd, events)
            for fd, events in poller.poll():
                self.on_ready(fd, events)

    def _source_ended(self) -> None:
        if self.source > 2:
            os.close(self.source)
        self.source = -1

    def _sink_ended(self) -> None:
        if self.sink:
            self.sink.close()
        self.sink = None
        self._waiting.clear()
