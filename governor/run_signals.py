"""The signals that `governor run` hears, each as a byte in a pipe: nothing is done inside a handler."""

from __future__ import annotations

import os
import signal

FORWARDED = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT, signal.SIGTSTP),
)
ENDING: set[int] = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}


def catch() -> int:
    """From now on; the descriptor to read them from."""
    read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in (*FORWARDED, signal.SIGCHLD):
        if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
            signal.signal(number, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    return read_fd


def read(fd: int) -> set[int]:
    """Those that came since the last call."""
    try:
        return set(os.read(fd, 4096))
    except BlockingIOError:
        return set()
