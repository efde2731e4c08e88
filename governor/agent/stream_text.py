"""Text from chunks that end anywhere: inside a character, between CR and LF, in the middle of an event."""

from __future__ import annotations

import codecs
import re
from collections.abc import AsyncGenerator, AsyncIterable
from dataclasses import dataclass

_LINE_LIMIT_BYTES = 1 << 20
_EVENT_LIMIT_BYTES = 16 << 20
_LINE_END = re.compile(rb"\r\n|\n|\r(?!\Z)")  # of a CR at the very end it is not known yet


class TextError(ValueError):
    """A line or an event is longer than it may be."""


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """As models' APIs stream their answers."""

    event: str
    data: str
    id: str


async def text(source: AsyncIterable[bytes], errors: str = "strict") -> AsyncGenerator[str, None]:
    """UTF-8 decoded; a character that is not whole yet waits. Raises UnicodeDecodeError, or as `errors` says."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    async for chunk in source:
        if decoded := decoder.decode(chunk):
            yield decoded
    if decoded := decoder.decode(b"", final=True):
        yield decoded


async def lines(
    source: AsyncIterable[bytes], *, limit_bytes: int = _LINE_LIMIT_BYTES, errors: str = "strict"
) -> AsyncGenerator[str, None]:
    """Without their ends: LF, CR or both; the last may have none. Raises TextError, UnicodeDecodeError."""
    waiting = bytearray()
    async for chunk in source:
        searched = max(0, len(waiting) - 1)
        waiting += chunk
        begin = 0
        for end in _LINE_END.finditer(waiting, searched):
            _bound(end.start() - begin, limit_bytes)
            yield waiting[begin : end.start()].decode("utf-8", errors)
            begin = end.end()
        del waiting[:begin]
        _bound(len(waiting), limit_bytes)
    if waiting:
        yield waiting.removesuffix(b"\r").decode("utf-8", errors)


async def events(
    source: AsyncIterable[bytes], *, limit_bytes: int = _EVENT_LIMIT_BYTES
) -> AsyncGenerator[ServerSentEvent, None]:
    """As the HTML standard has it (9.2.6): without its empty line at the end an event is none. Raises TextError."""
    name, last_id, size_bytes, first = "", "", 0, True
    data: list[str] = []
    async for line in lines(source, limit_bytes=limit_bytes, errors="replace"):
        field, _, value = (line.removeprefix("\ufeff") if first else line).partition(":")
        value, first = value.removeprefix(" "), False
        size_bytes += len(line)
        _bound(size_bytes, limit_bytes)
        if not line:
            if data:
                yield ServerSentEvent(name or "message", "\n".join(data), last_id)
            name, data, size_bytes = "", [], 0
        elif field == "event":
            name = value
        elif field == "data":
            data.append(value)
        elif field == "id" and "\0" not in value:
            last_id = value


def _bound(found_bytes: int, limit_bytes: int) -> None:
    if found_bytes > limit_bytes:
        raise TextError(f"found {found_bytes:,} bytes or more without an end, expected at most {limit_bytes:,}")
