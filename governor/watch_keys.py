"""The keys of `governor watch`: a terminal that gives each at once, and what the bytes of one mean.

Ctrl-C and Ctrl-Z stay what they are. Bytes that are no key of ours, such as a terminal's answers, do nothing.
"""

from __future__ import annotations

import os
import termios
from contextlib import suppress
from enum import Enum

_READ_BYTES = 256


class Key(Enum):
    """What a person can ask for."""

    HOLD = "hold"
    SORT = "sort"
    UP = "up"
    DOWN = "down"
    OPEN = "open"
    BACK = "back"
    QUIT = "quit"


_PLAIN = {
    b" ": Key.HOLD,
    b"s": Key.SORT,
    b"k": Key.UP,
    b"j": Key.DOWN,
    b"\r": Key.OPEN,
    b"\n": Key.OPEN,
    b"b": Key.BACK,
    b"q": Key.QUIT,
}
# Cursor keys, in their usual mode (CSI) and in the application's (SS3): xterm's ctlseqs, "PC-Style Function Keys".
_SEQUENCES = {
    **dict.fromkeys((b"\x1b[A", b"\x1bOA"), Key.UP),
    **dict.fromkeys((b"\x1b[B", b"\x1bOB"), Key.DOWN),
    **dict.fromkeys((b"\x1b[C", b"\x1bOC"), Key.OPEN),
    **dict.fromkeys((b"\x1b[D", b"\x1bOD"), Key.BACK),
}
_ESCAPE = b"\x1b"


def parse(data: bytes) -> tuple[list[Key], bytes]:
    """The keys of what was read, and what may be the beginning of one more: an Escape, until nothing follows it."""
    keys: list[Key] = []
    while data:
        if not data.startswith(_ESCAPE):
            if key := _PLAIN.get(data[:1]):
                keys.append(key)
            data = data[1:]
            continue
        end = _end_of_sequence(data)
        if end == 0:
            return keys, data
        if key := _SEQUENCES.get(data[:end]):
            keys.append(key)
        data = data[end:]
    return keys, b""


def _end_of_sequence(data: bytes) -> int:
    """How long the escape sequence is; 0 when its end has not come yet."""
    if len(data) < 2:
        return 0
    if data[1:2] == b"O":
        return 3 if len(data) >= 3 else 0
    if data[1:2] != b"[":
        return 2  # Alt and a key
    final = next((at for at in range(2, len(data)) if 0x40 <= data[at] <= 0x7E), 0)
    return final + 1 if final else 0


class Keyboard:
    """The keys of a terminal, in the order in which they were pressed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._left = b""

    @property
    def awaits(self) -> bool:
        """Whether an Escape may be one, or the beginning of something: call settle() if nothing comes soon."""
        return bool(self._left)

    def read(self) -> list[Key]:
        """What was pressed; raises EOFError when the terminal is gone."""
        try:
            data = os.read(self._fd, _READ_BYTES)
        except BlockingIOError:
            return []
        except OSError:
            data = b""
        if not data:
            raise EOFError
        keys, self._left = parse(self._left + data)
        return keys

    def settle(self) -> list[Key]:
        """Nothing more came: an Escape was one."""
        left, self._left = self._left, b""
        return [Key.BACK] if left == _ESCAPE else []


class Modes:
    """A terminal that does not wait for Enter and shows nothing of what is typed."""

    def __init__(self, fd: int) -> None:
        """Changes nothing yet; raises termios.error for what is no terminal."""
        self._fd = fd
        self._before = termios.tcgetattr(fd)

    def enter(self) -> None:
        """Each key at once."""
        modes = termios.tcgetattr(self._fd)
        modes[3] &= ~(termios.ICANON | termios.ECHO)  # lflag
        modes[6][termios.VMIN], modes[6][termios.VTIME] = 1, 0
        termios.tcsetattr(self._fd, termios.TCSADRAIN, modes)

    def leave(self) -> None:
        """As it was."""
        with suppress(termios.error):  # it may be gone
            termios.tcsetattr(self._fd, termios.TCSADRAIN, self._before)
