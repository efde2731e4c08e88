"""A line for the user of a terminal that a full-screen program draws: as a notification, the title and the bell.

Nothing is drawn into the program's screen: terminals show OSC 9 or OSC 777 as a notification of the desktop, OSC 2 as
the window's title (the former one is put on the terminal's stack before, CSI 22;2t, and taken back after a while,
CSI 23;2t), and ring once. Terminals that know none of these ignore them. It is sent between two sequences of
the program, never inside one. A terminal that knows no sequences at all gets a line of text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping

from governor.run_streams import Flow

_TITLE_NS = 15_000_000_000
_WAITING = 4
_TEXT_LIMIT = 300
# The end of what was written so far, from the last ESC on: not yet a whole sequence.
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|[PX^_\]k][^\x07]*|[ -/]*|O)\Z")
_CHARACTER = re.compile(rb"(?:[\xc2-\xdf]|[\xe0-\xef][\x80-\xbf]?|[\xf0-\xf4][\x80-\xbf]{0,2})\Z")  # not yet whole


class Notices:
    """What is to be shown at the terminal that `flow` writes to; `environment` says which kind it is."""

    def __init__(self, environment: Mapping[str, str] | None = None) -> None:
        """Nothing is to be shown yet."""
        self._environment = os.environ if environment is None else environment
        self._waiting: list[str] = []
        self._title_until_ns = 0  # when the former title is due; 0: it is there

    def put(self, text: str) -> None:
        """Show it as soon as the agent's output is between two sequences."""
        self._waiting = [*self._waiting, text][-_WAITING:]

    def due_ns(self) -> int | None:
        """When to call turn() at the latest, monotonic; None: output alone brings the next chance."""
        return self._title_until_ns or None

    def turn(self, flow: Flow, now_ns: int) -> None:
        """Show what waits, and take the title back, if the terminal is ready for it."""
        over = self._title_until_ns and now_ns >= self._title_until_ns
        if not (self._waiting or over) or flow.waiting_bytes or is_inside(flow.tail):
            if over:
                self._title_until_ns = now_ns + _TITLE_NS // 15
            return
        for text in self._waiting:
            shown = sequence(text, self._environment, is_titled=bool(self._title_until_ns))
            if b"\x1b]2;" in shown:
                self._title_until_ns, over = now_ns + _TITLE_NS, 0
            flow.inject(shown)
        self._waiting.clear()
        if over:
            self.end(flow)

    def end(self, flow: Flow) -> None:
        """Give the window its former title back."""
        if self._title_until_ns:
            self._title_until_ns = 0
            flow.inject(b"\x1b[23;2t")


def is_inside(output: bytes | bytearray) -> bool:
    """Whether output ends within a sequence or a character."""
    escape = output.rfind(b"\x1b")
    if escape >= 0 and _UNFINISHED.match(output, escape):
        return True
    return _CHARACTER.search(output[-4:]) is not None


def sequence(text: str, environment: Mapping[str, str], is_titled: bool) -> bytes:
    """What shows the text at such a terminal; `is_titled`: the title is ours already."""
    kind = environment.get("TERM", "")
    said = "".join(char for char in text if char.isprintable())[:_TEXT_LIMIT]
    if kind in ("", "dumb"):
        return f"\r\n{said}\r\n\a".encode(errors="replace")
    if kind.startswith(("linux", "vt")):  # a console: it has no window, and nothing but its bell and its screen
        return b"\a"
    if environment.get("STY"):  # GNU screen shows a privacy message on its message line
        return f"\x1b^{said}\x1b\\\a".encode(errors="replace")
    name, _, rest = said.partition(": ")
    is_777 = bool(environment.get("VTE_VERSION")) or kind.startswith(("rxvt", "foot"))
    notify = f"\x1b]777;notify;{name};{rest.replace(';', ',')}\a" if is_777 else f"\x1b]9;{said}\a"
    title = "" if is_titled else "\x1b[22;2t"
    return f"{notify}{title}\x1b]2;{said}\a\a".encode(errors="replace")
