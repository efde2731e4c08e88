"""The terminal of an agent that `governor run` started: asked over its control socket, rendered here.

What comes is the raw output of the agent: hostile, and it may begin in the middle of anything. Only the sequences
that move, erase and scroll reach the emulator (pyte, imported when a screen is first wanted); colours, titles,
queries and all others are dropped before, which also makes it fast. Between two looks only what is new is fed.
"""

from __future__ import annotations

import os
import re
import socket
import time
import unicodedata
from base64 import b64decode, b64encode
from collections.abc import Collection
from typing import Any

import orjson

from governor.channels.terminal import ChannelError, down_to
from governor.journal import printable
from governor.peer import peer_of

CALL_S = 2.0
_ANSWER_LIMIT_BYTES = 1 << 20
_OUTPUT_LIMIT_BYTES = 256 << 10
_SIZE_LIMIT = 500
_OVERLAP_BYTES = 16 << 10
_REASON_LIMIT = 200
_RENDER_S = 10.0  # of CPU time; 256 KiB of usual output take about half a second
_PIECE_BYTES = 256  # a full scroll of the largest screen is 6 bytes, and takes 20 ms or more

_ALTERNATE = re.compile(rb"\x1b\[\?(?:1049|1047|47)([hl])")
_TOKEN = re.compile(
    rb"\x1b\[(?P<parameters>[0-9;]{0,16})(?P<final>[@A-HJ-MPSTXadefr])"  # CSI that moves, erases or scrolls
    rb"|(?P<wrap>\x1b\[\?7[hl])"
    rb"|(?P<escape>\x1b[78DEMc])"
    rb"|\x1b\[[0-?]*[ -/]*[@-~]"  # any other CSI
    rb"|\x1b[PX^_\]k][^\x07\x1b]*(?:\x07|\x1b\\|(?=\x1b)|\Z)"  # strings: DCS, SOS, PM, APC, OSC, title; ESC ends them
    rb"|\x1b[ -/]*[0-~]"  # any other escape
    rb"|[\x00-\x06\x0e-\x1a\x1c-\x1f\x7f]"
)
_UNFINISHED = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*|[PX^_\]k][^\x07]*|[ -/]*)\Z")  # from the last ESC on


class PtyTerminal:
    """The terminal behind a control socket."""

    def __init__(self, control_socket_path: str, agent_pids: Collection[int] = ()) -> None:
        """`agent_pids`: the process that the terminal is of must be one of them [default: any]."""
        self._path, self._agent_pids = control_socket_path, frozenset(agent_pids)
        self._renderer: Renderer | None = None

    def screen(self) -> list[str]:
        """The visible lines; raises ChannelError."""
        rows, columns, output = self._ask_terminal()
        if self._renderer is None or self._renderer.size != (rows, columns):
            self._renderer = Renderer(rows, columns)
        return self._renderer.show(output)

    def type(self, keys: bytes) -> None:
        """Write the bytes to the agent's input; raises ChannelError."""
        self._ask_terminal()  # whose it is, before anything is sent
        self._ask({"ask": "type", "keys": b64encode(keys).decode()})

    def tell(self, text: str) -> None:
        """Have a line shown to whoever sits at the terminal of `governor run`; raises ChannelError."""
        self._ask({"ask": "warn", "text": text})

    def _ask_terminal(self) -> tuple[int, int, bytes]:
        told = self._ask({"ask": "terminal"})
        rows, columns, pid, output = (told.get(key) for key in ("rows", "columns", "pid", "output"))
        if type(rows) is not int or type(columns) is not int or type(pid) is not int or not isinstance(output, str):
            raise ChannelError("governor run told something else than its terminal")
        if self._agent_pids and pid not in self._agent_pids:
            raise ChannelError(f"this is the terminal of process {pid}, which is not the agent's")
        try:
            data = b64decode(output, validate=True)[-_OUTPUT_LIMIT_BYTES:]
        except ValueError:
            raise ChannelError("governor run told an output that is no base64") from None
        if rows <= 0 or columns <= 0:  # what is typed would not be seen to stand in any input
            raise ChannelError("the agent has pipes and no terminal")
        return min(rows, _SIZE_LIMIT), min(columns, _SIZE_LIMIT), data

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """One request on a connection of its own; raises ChannelError."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(CALL_S)
                connection.connect(self._path)
                uid = peer_of(connection).uid
                if os.geteuid() != 0 and uid not in (0, os.geteuid()):
                    raise ChannelError(f"{printable(self._path)} is another user's ({uid})")
                connection.sendall(orjson.dumps(request) + b"\n")
                answer = _line(connection)
        except TimeoutError:
            raise ChannelError(f"governor run did not answer within {CALL_S:g} s") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise ChannelError(f"cannot ask governor run at {printable(self._path)}: {reason}") from None
        try:
            told = orjson.loads(answer)
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise ChannelError("governor run answered with something else than an object")
        if told.get("ok") is False:
            raise ChannelError(f"governor run: {printable(str(told.get('reason')))[:_REASON_LIMIT]}")
        return told


def _line(connection: socket.socket) -> bytes:
    """The answer; raises ChannelError."""
    answer = bytearray()
    while b"\n" not in answer:
        data = connection.recv(65536)
        if not data:
            raise ChannelError("governor run hung up")
        answer += data
        if len(answer) > _ANSWER_LIMIT_BYTES:
            raise ChannelError("governor run answered too much")
    return bytes(answer.partition(b"\n")[0])


class Renderer:
    """Turns the end of a terminal's output into what it shows; `size` is rows and columns."""

    def __init__(self, rows: int, columns: int) -> None:
        """Nothing is shown yet."""
        self.size = rows, columns
        self._seen = b""
        self._fresh()

    def show(self, output: bytes) -> list[str]:
        """The visible lines after this output, of which the beginning may be missing; raises ChannelError."""
        news = self._news(output)
        self._seen = output
        try:
            if news is None or _ALTERNATE.search(self._left + news):
                self._fresh()
                self._feed(_of_the_screen(_from_a_boundary(output)))
            else:
                self._feed(news)
        except ChannelError:
            self._seen = b""
            raise
        except Exception as error:  # noqa: BLE001  of an emulator that is fed by the agent
            self._seen = b""
            raise ChannelError(f"its output cannot be rendered: {type(error).__name__}") from None
        return down_to(self._lines(), self._screen.cursor.y)

    def _lines(self) -> list[str]:
        """As pyte's display, which trips over half a wide character that something else was written over."""
        from wcwidth import wcwidth

        rows, columns = self.size
        lines = []
        for row in range(rows):
            cells = [self._screen.buffer[row][column].data for column in range(columns)]
            wide = [bool(cell) and wcwidth(cell[0]) == 2 for cell in cells]
            stubs = [False, *wide[:-1]]
            lines.append("".join("" if stub else cell or " " for cell, stub in zip(cells, stubs, strict=True)))
        return lines

    def _news(self, output: bytes) -> bytes | None:
        """What was added since the last look; None where that cannot be told."""
        seen = self._seen
        if not seen:
            return None
        if output.startswith(seen):
            return output[len(seen) :]
        known = seen[-_OVERLAP_BYTES:]
        if (
            len(known) < _OVERLAP_BYTES
            or output.count(known) != 1
            or output.find(known[1:]) != output.rfind(known[1:])
        ):
            return None
        return output[output.find(known) + len(known) :]

    def _fresh(self) -> None:
        import pyte
        from wcwidth import wcwidth

        class Screen(pyte.Screen):
            """One that scrolls by SU and SD too, whose cursor outside a scroll region is not drawn into it, and which
            remembers one saved cursor, as terminals do.
            """

            saved = (0, 0)

            def draw(self, data: str) -> None:
                if not data.isascii():  # pyte leaves out what follows an emoji's variation selector, or a joiner
                    data = "".join(char for char in data if wcwidth(char) > 0 or unicodedata.combining(char))
                super().draw(data)

            def save_cursor(self) -> None:
                self.saved = self.cursor.x, self.cursor.y

            def restore_cursor(self) -> None:
                self.cursor.x, self.cursor.y = self.saved

            def cursor_up(self, count: int | None = None) -> None:
                top = self.margins.top if self.margins and self.cursor.y >= self.margins.top else 0
                self.cursor.y = max(self.cursor.y - (count or 1), top)

            def cursor_down(self, count: int | None = None) -> None:
                bottom = self.lines - 1
                if self.margins and self.cursor.y <= self.margins.bottom:
                    bottom = self.margins.bottom
                self.cursor.y = min(self.cursor.y + (count or 1), bottom)

            def scroll_up(self, count: int = 1) -> None:
                self._scroll(count, (self.margins.bottom if self.margins else self.lines - 1), self.index)

            def scroll_down(self, count: int = 1) -> None:
                self._scroll(count, (self.margins.top if self.margins else 0), self.reverse_index)

            def _scroll(self, count: int, line: int, step: Any) -> None:
                column, row = self.cursor.x, self.cursor.y
                self.cursor.y = line
                for _ in range(min(count or 1, self.lines)):
                    step()
                self.cursor.x, self.cursor.y = column, row

        class Stream(pyte.ByteStream):
            csi = {**pyte.ByteStream.csi, "S": "scroll_up", "T": "scroll_down"}  # noqa: RUF012  as in pyte
            events = frozenset([*pyte.ByteStream.events, "scroll_up", "scroll_down"])

        rows, columns = self.size
        self._screen = Screen(columns, rows)
        self._stream = Stream(self._screen)
        self._left = b""

    def _feed(self, data: bytes) -> None:
        data = self._left + data
        end = data.rfind(b"\x1b")
        if end < 0 or not _UNFINISHED.match(data, end):
            end = len(data)
        self._left = data[end:] if len(data) - end <= _OVERLAP_BYTES else b""  # else a string without an end
        plain = _TOKEN.sub(_kept, data[:end])
        until = time.process_time() + _RENDER_S
        for at in range(0, len(plain), _PIECE_BYTES):
            if time.process_time() > until:
                raise ChannelError("its output takes too long to render")
            self._stream.feed(plain[at : at + _PIECE_BYTES])


def _kept(token: re.Match[bytes]) -> bytes:
    """A sequence as the emulator may have it."""
    if token["final"] is None:
        return bytes(token["wrap"] or token["escape"] or b"")
    if token["final"] == b"r" and not token["parameters"].strip(b"0;"):
        return b"\x1b[r\x1b[H"  # which pyte leaves out
    most = 2 if token["final"] in b"Hfr" else 1
    parameters = token["parameters"].split(b";")[:most]
    if token["final"] in b"JK" and parameters[0] not in (b"", b"0", b"1", b"2", b"3"):
        return b""
    return b"\x1b[" + b";".join(parameter[:4] for parameter in parameters) + bytes(token["final"])


def _from_a_boundary(output: bytes) -> bytes:
    """Without the tail of a sequence or a character that a full buffer may begin with."""
    if len(output) < _OUTPUT_LIMIT_BYTES:
        return output
    start = re.search(rb"[\x1b\n]", output)
    return output[start.start() :] if start else output


def _of_the_screen(output: bytes) -> bytes:
    """What was written to the screen that is shown; the alternate one begins empty and leaves the usual one alone."""
    parts = _ALTERNATE.split(output)  # text, "h" or "l", text, ...
    if len(parts) > 1 and parts[-2] == b"h":
        return parts[-1]
    usual = [parts[0] if len(parts) == 1 or parts[1] == b"h" else b""]
    usual += [text for switch, text in zip(parts[1::2], parts[2::2], strict=True) if switch == b"l"]
    return b"".join(usual)
