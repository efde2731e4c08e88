"""The guard beside an agent that `governor run` started: started again when it dies, as long as the agent lives.

Where another guard holds the memcg's lock, it looks again every few seconds, and takes over once that one is gone.
One that ends with status 0 was told to (`governor off`, SIGTERM), and is not started again.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from governor.run_streams import say

_BACKOFF_NS = (0, 200_000_000, 1_000_000_000, 5_000_000_000, 30_000_000_000, 300_000_000_000)
_LASTED_NS = 60_000_000_000  # who lived so long has not failed at the start
_BUSY_NS = 3_000_000_000
_BUSY_STATUS = 75  # EX_TEMPFAIL of sysexits.h
_FAILURES = 3  # without one that lasted: it cannot protect
_LOG_BYTES = 1 << 20
_SET_PDEATHSIG = 1  # PR_SET_PDEATHSIG of linux/prctl.h; an exec keeps it


class GuardProcess:
    """One guard at a time. `options` has the fields of guard.Guard; None: there is nothing to start."""

    def __init__(self, options: dict[str, Any] | None, agent_pid: int, log: Log | None) -> None:
        self._options = options
        self._agent_pid = agent_pid
        self._log = log
        self._failures = 0
        self._not_before_ns = 0
        self._started_ns = 0
        self.pid = 0
        self.trouble = ""  # why nothing is protected, once that is clear

    def due_ns(self) -> int | None:
        """When it is to be started, monotonic; None where it runs or is not to run."""
        return self._not_before_ns if self._options and not self.pid else None

    def keep(self, now_ns: int) -> None:
        """Start it if that is due."""
        if not self._options or self.pid or now_ns < self._not_before_ns:
            return
        self._started_ns = now_ns
        try:
            self.pid = self._start()
        except OSError as error:  # no memory or no pid for it
            self._failed(now_ns, error.strerror or str(error))

    def ended(self, status: int, now_ns: int) -> None:
        """It was waited for: `status` as os.waitstatus_to_exitcode has it."""
        self.pid = 0
        if not self._options:
            return
        if status == 0:
            self._options = None
            self.say("the guard was told to leave, and is not started again")
        elif status == _BUSY_STATUS:
            self._not_before_ns = now_ns + _BUSY_NS
        else:
            self._failed(now_ns, f"it ended with status {status}")

    def stop(self) -> None:
        """Ask it to put everything back and leave, once its archives are written; a second time: now."""
        self._options = None
        if self.pid:
            os.kill(self.pid, signal.SIGTERM)

    def _failed(self, now_ns: int, why: str) -> None:
        if now_ns - self._started_ns >= _LASTED_NS:
            self._failures, self.trouble = 0, ""
        self._not_before_ns = now_ns + _BACKOFF_NS[min(self._failures, len(_BACKOFF_NS) - 1)]
        self._failures += 1
        self.say(f"the guard is started again: {why}")
        if self._failures == _FAILURES:
            self.trouble = f"NOT PROTECTED: the guard does not stay: {why}"
            self.say(self.trouble)

    def say(self, text: str) -> None:
        """In the log, or on standard error where that is nobody's terminal."""
        if self._log:
            self._log.write(f"governor: {text}\n".encode())
        elif self._failures <= _FAILURES:
            say(text)

    def _start(self) -> int:
        argument = json.dumps({**(self._options or {}), "agent_pid": self._agent_pid})
        parent_pid = os.getpid()
        usual_mask = signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
        pid = os.fork()
        if pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, usual_mask)
            return pid
        status = 1
        try:
            self._become(argument, parent_pid)
        except BaseException as error:  # noqa: BLE001  there is nobody else here to tell
            if type(error).__name__ == "Busy":
                status = _BUSY_STATUS
            else:
                say(f"the guard cannot start: {error}")
        finally:
            os._exit(status)

    def _become(self, argument: str, parent_pid: int) -> None:
        import ctypes  # not in the process that stays

        ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(1)
        os.setsid()  # what the agent's terminal and its user's shell signal is not meant for it
        for number in signal.valid_signals():
            if number not in (signal.SIGKILL, signal.SIGSTOP) and callable(signal.getsignal(number)):
                signal.signal(number, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(self._log.write_fd if self._log else 2, 1)
        os.dup2(1, 2)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        from governor import instance  # not in the process that stays

        assert self._options
        for name in self._options["locks"]:
            instance.lock(name)  # of whoever has our pid, and the exec keeps it
        options = json.loads(argument)
        del options["locks"]
        os.execv(sys.executable, [sys.executable, "-P", "-m", "governor.guard_process", json.dumps(options)])


class Log:
    """What governor's processes say while the terminal is the agent's: a file, at most 1 MiB and what was before."""

    def __init__(self, path: str) -> None:
        """Raises OSError where there can be none."""
        self.path = path
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)  # noqa: PTH103, PTH120  no pathlib here
        self._fd = self._open()
        self.read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(self.path, flags, 0o600)

    def drain(self) -> None:
        """Take what was written to the pipe; what does not fit on the disk is lost."""
        try:
            while data := os.read(self.read_fd, 65536):
                self.write(data)
        except BlockingIOError:
            return

    def write(self, data: bytes) -> None:
        """Append, and begin a new file when this one is full."""
        try:
            os.write(self._fd, data)
            if os.lseek(self._fd, 0, os.SEEK_CUR) > _LOG_BYTES:
                os.rename(self.path, f"{self.path}.1")  # noqa: PTH104
                fd = self._open()
                os.close(self._fd)
                self._fd = fd
        except OSError:
            return

    def close(self) -> None:
        """Remove it if nothing was said."""
        self.drain()
        try:
            if os.fstat(self._fd).st_size == 0:
                os.unlink(self.path)  # noqa: PTH108
        except OSError:  # somebody else has, where a home is shared
            pass
        for fd in (self._fd, self.read_fd, self.write_fd):
            os.close(fd)
