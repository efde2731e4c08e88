"""JSON lines, both ways, over one connection that never blocks. What is said to it and what it says is bounded."""

from __future__ import annotations

import errno
import select
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import NamedTuple

import orjson

from governor.poller import Poller


class Garbled(Exception):
    """The other side says what the protocol does not know, or too much."""


class Bounds(NamedTuple):
    """How long a line may be, how many there may be in a second, and how much may be said and not read yet."""

    line_bytes: int
    lines: int
    backlog_bytes: int


class LineSocket:
    """A connection that the poller knows; whoever owns it closes it, and sets `lines` to 0 each second."""

    def __init__(self, connection: socket.socket, poller: Poller, bounds: Bounds) -> None:
        self.lines = 0  # that were heard in this second
        self._connection, self._poller, self._bounds = connection, poller, bounds
        self._heard = b""
        self._backlog = bytearray()

    def say(self, message: str, fields: Mapping[str, object]) -> None:
        """A line, as soon as there is room for it; raises OSError as flush()."""
        self._backlog += orjson.dumps({"type": message, **fields}) + b"\n"
        self.flush()

    def flush(self) -> None:
        """Raises OSError when the other side is gone, or does not read."""
        with suppress(BlockingIOError):
            while self._backlog:
                del self._backlog[: self._connection.send(self._backlog)]
        if len(self._backlog) > self._bounds.backlog_bytes:
            raise OSError(errno.EPIPE, "it does not read what it is told")
        wanted = select.EPOLLIN | (select.EPOLLOUT if self._backlog else 0)
        self._poller.modify(self._connection.fileno(), wanted)

    def hear(self) -> Iterator[bytes]:
        """What it has said by now, a line each; raises EOFError at its end, Garbled, OSError."""
        try:
            data = self._connection.recv(self._bounds.line_bytes)
        except BlockingIOError:
            return
        if not data:
            raise EOFError
        *lines, self._heard = (self._heard + data).split(b"\n")
        if len(self._heard) > self._bounds.line_bytes:
            raise Garbled
        for line in lines:
            self.lines += 1
            if self.lines > self._bounds.lines:
                raise Garbled
            yield line
