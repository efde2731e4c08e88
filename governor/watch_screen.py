"""The picture of `governor watch` on a terminal: its own screen, redrawn where it changed, and the keys.

rich is imported here, when a picture is drawn. What was on the terminal comes back at the end, and while the watch is
stopped by Ctrl-Z; its modes are restored whatever happens, but for SIGKILL.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType

from rich.console import Console
from rich.text import Text

from governor import watch_picture
from governor.poller import Poller
from governor.watch_keys import Key, Keyboard, Modes
from governor.watch_one import One
from governor.watch_overview import Many

_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l\x1b[2J", "\x1b[?25h\x1b[?1049l"  # xterm: alternate screen, cursor
_ESCAPE_NS = 50_000_000  # what a cursor key sends comes at once; an Escape alone is followed by nothing
_REDRAW_NS = 150_000_000  # between two pictures, however much happens
_NEVER_NS = (1 << 63) - 1


class Screen:
    """A terminal with a picture on it."""

    def __init__(self, poller: Poller, ascii_only: bool, on_key: Callable[[Key], None]) -> None:
        """Takes the terminal over; close() gives it back."""
        self._poller, self._on_key = poller, on_key
        self._glyphs = watch_picture.ASCII if ascii_only else watch_picture.BLOCKS
        self._console = Console(file=sys.stdout, highlight=False, emoji=False, markup=False, force_terminal=True)
        self._modes: Modes | None = None
        self._keyboard: Keyboard | None = None
        self._escape_ns = _NEVER_NS
        self._drawn: list[Text] = []
        self._size = (0, 0)
        self._drawn_ns = 0
        self.is_stale = True
        self._woken, self._wake = socket.socketpair()
        for end in (self._woken, self._wake):
            end.setblocking(False)
        poller.register(self._woken.fileno(), self._on_signal)
        self._before = signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        self._handlers = {number: signal.getsignal(number) for number in (signal.SIGWINCH, signal.SIGTSTP)}
        signal.signal(signal.SIGWINCH, lambda *_: None)  # it wakes the poller
        signal.signal(signal.SIGTSTP, self._suspend)
        if sys.stdin.isatty():
            self._modes = Modes(sys.stdin.fileno())
            self._keyboard = Keyboard(sys.stdin.fileno())
            poller.register(sys.stdin.fileno(), self._on_readable)
        self._enter()

    @property
    def due_ns(self) -> int:
        """When turn() is to be called at the latest."""
        return min(self._escape_ns, self._drawn_ns + _REDRAW_NS if self.is_stale else _NEVER_NS)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines; where nobody knows, as over some execs, those of a VT100."""
        try:
            columns, lines = os.get_terminal_size(sys.stdout.fileno())
        except OSError:
            columns, lines = 0, 0
        return columns or 80, lines or 24

    def turn(self, view: One | Many, now_ns: int, holds: bool, can_go_back: bool) -> None:
        """Draw if there is anything new."""
        if now_ns >= self._escape_ns and self._keyboard:
            self._escape_ns = _NEVER_NS
            self._pressed(self._keyboard.settle())
        if self.size != self._size:
            self.is_stale = True
        if not self.is_stale or now_ns - self._drawn_ns < _REDRAW_NS:
            return
        columns, lines = self.size
        if isinstance(view, One):
            picture = view.model.picture(time.time(), holds)
            self._draw(watch_picture.one(picture, columns, lines, self._glyphs, can_go_back))
        else:
            view.shown = watch_picture.rows_and_log(lines, len(view.log))[0]
            self._draw(watch_picture.many(view.overview(time.time(), holds), columns, lines, self._glyphs))
        self.is_stale, self._drawn_ns = False, now_ns

    def clear(self) -> None:
        """Another picture comes: all of it is drawn anew."""
        self._drawn, self.is_stale, self._drawn_ns = [], True, 0

    def close(self) -> None:
        """Give the terminal back, as it was."""
        signal.set_wakeup_fd(self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._poller.unregister(self._woken.fileno())
        self._woken.close()
        self._wake.close()
        if self._keyboard:
            self._poller.unregister(sys.stdin.fileno())
        with suppress(OSError):
            self._leave()

    def _draw(self, lines: list[Text]) -> None:
        """Only the lines that have changed: a frame costs what is new in it."""
        size = self.size
        frame = []
        if size != self._size or len(lines) != len(self._drawn):
            self._size, self._drawn = size, []
            frame.append("\x1b[2J")
        before: list[Text | None] = [*self._drawn] or [None] * len(lines)
        with self._console.capture() as captured:
            changed = [at for at, line in enumerate(lines) if not _same(line, before[at])]
            for at in changed:
                self._console.print(lines[at], soft_wrap=True)
        rendered = captured.get().split("\n")
        frame += [f"\x1b[{at + 1};1H\x1b[K{text}" for at, text in zip(changed, rendered, strict=False)]
        self._drawn = lines
        if frame:
            sys.stdout.write("".join(frame))
            sys.stdout.flush()

    def _enter(self) -> None:
        if self._modes:
            self._modes.enter()
        sys.stdout.write(_ENTER)
        sys.stdout.flush()
        self.clear()

    def _leave(self) -> None:
        if self._modes:
            self._modes.leave()
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()

    def _suspend(self, _number: int, _frame: FrameType | None) -> None:
        """Ctrl-Z: the shell gets its terminal as it was, and we take it again after fg.

        By SIGTSTP, which does nothing where no shell is above that could wake us, as over an exec into a container.
        """
        self._leave()
        signal.signal(signal.SIGTSTP, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTSTP)
        signal.signal(signal.SIGTSTP, self._suspend)
        self._enter()

    def _on_signal(self, _fd: int) -> None:
        with suppress(OSError):
            self._woken.recv(64)

    def _on_readable(self, _fd: int) -> None:
        assert self._keyboard
        self._pressed(self._keyboard.read())
        self._escape_ns = time.monotonic_ns() + _ESCAPE_NS if self._keyboard.awaits else _NEVER_NS

    def _pressed(self, keys: list[Key]) -> None:
        for key in keys:
            self._on_key(key)
            self.is_stale, self._drawn_ns = True, 0


def _same(line: Text, before: Text | None) -> bool:
    return before is not None and line.plain == before.plain and line.spans == before.spans
