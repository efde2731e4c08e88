"""The terminal that governor was started at, and the one that it makes for the agent."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import termios
from typing import Any

_SIZE_BYTES = 8  # struct winsize
_IFLAG, _OFLAG, _CFLAG, _LFLAG, _CC = 0, 1, 2, 3, 6


class OuterTerminal:
    """Standard input, a terminal: its modes are saved, and restored whenever it is left."""

    def __init__(self) -> None:
        """Raises OSError where it has been hung up already."""
        try:
            self._saved: list[Any] = termios.tcgetattr(0)
        except termios.error as error:
            raise OSError(*error.args) from None
        self.is_raw = False
        self._are_others = not self.is_foreground  # the modes saved: they are those of a shell that edits a line
        self._slave = -1

    def make_inner(self) -> tuple[int, int]:
        """A terminal like it: both ends, the outer (non-blocking) and the agent's; raises OSError."""
        if self._slave >= 0:
            os.close(self._slave)  # an earlier agent's
        master, slave = pty.openpty()
        termios.tcsetattr(slave, termios.TCSANOW, self._saved)
        os.set_blocking(master, False)
        self.pass_size(master)
        self._slave = slave
        return master, slave

    def pass_size(self, master: int) -> None:
        """The agent's terminal gets its size; the kernel tells the agent where that is a new one."""
        try:
            size = fcntl.ioctl(0, termios.TIOCGWINSZ, bytes(_SIZE_BYTES))
            fcntl.ioctl(master, termios.TIOCSWINSZ, size)
        except OSError:
            return  # hung up

    def size(self) -> tuple[int, int]:
        """Rows and columns; what programs assume where it does not say: a serial console, or before a resize."""
        try:
            found = os.get_terminal_size(0)
        except OSError:
            return 0, 0
        return found.lines or 24, found.columns or 80

    @property
    def is_foreground(self) -> bool:
        """Whether it is ours to read and to set; one that is not our controlling terminal always is."""
        try:
            return os.tcgetpgrp(0) == os.getpgrp()
        except OSError:
            return True

    def take(self) -> None:
        """Raw: every byte passes, none means anything here. Does nothing in the background."""
        if self.is_raw or not self.is_foreground:
            return
        if self._are_others:
            self._are_others = False
            self._save_again()
        modes = [*self._saved]
        modes[_IFLAG] &= ~(
            termios.IGNBRK
            | termios.BRKINT
            | termios.PARMRK
            | termios.ISTRIP
            | termios.INLCR
            | termios.IGNCR
            | termios.ICRNL
            | termios.IXON
        )
        modes[_OFLAG] &= ~termios.OPOST
        modes[_LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
        modes[_CFLAG] = modes[_CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
        modes[_CC] = [*self._saved[_CC]]
        modes[_CC][termios.VMIN], modes[_CC][termios.VTIME] = 1, 0
        self.is_raw = self._set(modes)

    def leave(self) -> None:
        """As it was before."""
        if self.is_raw:
            self._set(self._saved)
            self.is_raw = False

    def _save_again(self) -> None:
        try:
            self._saved = termios.tcgetattr(0)
            termios.tcsetattr(self._slave, termios.TCSANOW, self._saved)
        except termios.error:
            return  # hung up

    def _set(self, modes: list[Any]) -> bool:
        """Without waiting for output that nobody may read; from the background as well (SIGTTOU is blocked)."""
        usual_mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])
        try:
            termios.tcsetattr(0, termios.TCSANOW, modes)
        except termios.error:
            return False  # hung up
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, usual_mask)
        return True


def stop_own_group() -> None:
    """Stop as a Ctrl-Z would have stopped us; returns when somebody let us go on.

    At once where nobody could: in the process group of a session's leader or of process 1 the kernel discards it.
    """
    usual = signal.signal(signal.SIGTSTP, signal.SIG_DFL)
    os.killpg(0, signal.SIGTSTP)
    signal.signal(signal.SIGTSTP, usual)
