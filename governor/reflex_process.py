"""Starts reflex and holds governor's end of the link to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from governor import link, outside

_SILENT_NS = 5_000_000_000  # reflex tells once a second that it lives
_BACKOFF_NS = (0, 200_000_000, 1_000_000_000, 5_000_000_000)

# Without site-packages and environment: 5 MiB less, and nobody's PYTHONPATH in a real-time process.
_BOOT = "import sys; sys.path.insert(0, {root!r}); from governor.reflex import main; main(sys.argv[1:])"


class ReflexProcess:
    """One reflex at a time, started again when it dies."""

    def __init__(self, pins_directory: Path | None, knob_path: Path, source: str = "auto", memcg: str = "") -> None:
        """Without pins it polls until open_pins(); `source` is auto, or the one that is forced.

        `memcg`: the directory of the one that it lives in, "" for governor's own.
        """
        self._memcg = memcg
        self._pins_directory = pins_directory
        self._arguments = [str(knob_path), source]
        self._process: subprocess.Popen[bytes] | None = None
        self._unsent: deque[bytes] = deque()  # a socket holds some 250 messages, and a node has more memcgs
        self._starts = 0
        self._not_before_ns = 0
        self._heard_ns = 0
        self.fd = -1

    @property
    def pid(self) -> int | None:
        """Pid of the running reflex."""
        return self._process.pid if self._process else None

    def start(self, now_ns: int) -> bool:
        """Start it unless it runs or died moments ago too often; True when it was started."""
        if self._process or now_ns < self._not_before_ns:
            return False
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        boot = _BOOT.format(root=str(Path(__file__).resolve().parent.parent))
        command = [sys.executable, "-I", "-S", "-c", boot, str(theirs.fileno()), *self._arguments]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=(lambda: outside.enter(self._memcg)) if self._memcg else None,
        )
        theirs.close()
        ours.setblocking(False)
        self.fd = ours.detach()
        self._heard_ns = now_ns
        self._not_before_ns = now_ns + _BACKOFF_NS[min(self._starts, len(_BACKOFF_NS) - 1)]
        self._starts += 1
        if self._pins_directory:
            self.open_pins(self._pins_directory)
        return True

    def open_pins(self, directory: Path | None) -> None:
        """Let BPF take over, now and after each start; None: not after the next start any more."""
        self._pins_directory = directory
        if directory:
            self.send(link.encode_pins(str(directory)))

    def send(self, message: bytes) -> bool:
        """Tell reflex something, in order, as soon as it has room; False when it is gone."""
        if self.fd < 0:
            return False
        self._unsent.append(message)
        self._flush()
        return True

    def _flush(self) -> None:
        while self._unsent and link.send(self.fd, self._unsent[0]):
            self._unsent.popleft()

    def receive(self) -> link.FromReflex | None:
        """The next thing it said; None when nothing waits. Raises EOFError when it is gone.

        What found no room is sent on: reflex answers what it has read, and says once a second that it lives.
        """
        self._flush()
        data = link.receive(self.fd)
        if data is None:
            return None
        if data == b"":
            raise EOFError
        self._heard_ns = time.monotonic_ns()
        return link.decode_from_reflex(data)

    def silent(self, now_ns: int) -> bool:
        """Whether it runs but has not been heard of for too long."""
        return self._process is not None and now_ns - self._heard_ns > _SILENT_NS

    def reap(self) -> int:
        """Make sure that it is dead, and return its exit status (negative: the signal)."""
        assert self._process
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGKILL)
        status = self._process.wait()
        os.close(self.fd)
        self._process, self.fd = None, -1
        self._unsent.clear()
        return status

    def stop(self) -> None:
        """Let it undo its knobs and go."""
        if self._process:
            os.close(self.fd)
            self.fd = -1
            try:
                self._process.wait(timeout=3)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
