"""JSON that is larger than memory, item by item: from a file, bytes, or an asynchronous stream.

    for row in items("export.json", "rows.item"):  # ijson's paths: "item" is a top-level array's
        embed(row)
    async for batch in batches_async(chunks(url), 100, "rows.item"):
        embed(batch)

An asynchronous stream goes to a spool first: whoever sends is not held up by what is done with each item, and cannot
time out over it. In memory are one chunk, what it completed, and the item that is being read: of as many bytes as
`item_limit_bytes` says, which as Python's objects may be twenty times as many where they are empty lists.
"""

from __future__ import annotations

import codecs
import io
import itertools
import os
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, Unpack

from governor.agent.extras import load
from governor.agent.in_thread import in_thread
from governor.agent.nesting import Nesting, PayloadError
from governor.agent.spool import Spool
from governor.agent.stopping import SHEDDING, Pressure, check

__all__ = ["Options", "PayloadError", "batches", "batches_async", "items", "items_async"]

_CHUNK_BYTES = 1 << 16
_ITEM_LIMIT_BYTES = 64 << 20
_PATHS_RATIO = 4  # of all open paths to the limit of an item
_PATHS_LIMIT_BYTES = 4 << 20  # as UTF-8; one wide character makes four times as many of them

Source = str | os.PathLike[str] | bytes | BinaryIO


class Options(TypedDict, total=False):
    """Of all that reads items."""

    documents: bool  # one JSON after the other, as in NDJSON (with the path "" each whole one)
    item_limit_bytes: int  # between the ends of two items; else PayloadError. 64 MiB
    pressure: Pressure | None
    stop_at: float


class _Parser:
    """Bytes in, items out; bounded between two items."""

    def __init__(
        self,
        at: str,
        *,
        documents: bool = False,
        item_limit_bytes: int = _ITEM_LIMIT_BYTES,
        pressure: Pressure | None = None,
        stop_at: float = SHEDDING,
    ) -> None:
        ijson = load("ijson", "json")
        self._faults = (ijson.JSONError, ValueError, OverflowError)  # ValueError: an integer of thousands of digits
        self._ready = ijson.sendable_list()
        self._input = ijson.items_coro(self._ready, at, use_float=True, multiple_values=documents)
        self._limit_bytes = item_limit_bytes
        self._pressure, self._stop_at = pressure, stop_at
        self._read_bytes = self._item_bytes = 0
        self._nesting = Nesting(min(_PATHS_RATIO * item_limit_bytes, _PATHS_LIMIT_BYTES))

    def stop_if_full(self, done_bytes: int) -> None:
        """Raises StoppedByPressure."""
        check(self._pressure, self._stop_at, done_bytes)

    def feed(self, chunk: bytes) -> Iterator[Any]:
        """What this chunk completes; an empty one is the end. Raises PayloadError after the last whole item."""
        self.stop_if_full(self._read_bytes)
        fault: Exception | None = None
        at_end = not chunk
        if not self._read_bytes:
            chunk = chunk.removeprefix(codecs.BOM_UTF8)
        self._nesting.look(chunk)
        try:
            if at_end:
                self._input.close()
            elif chunk:  # to ijson an empty one is the end
                self._input.send(chunk)
        except self._faults as error:
            fault = error
        self._read_bytes += len(chunk)
        self._item_bytes += len(chunk)
        if self._ready:
            self._item_bytes = 0
            self._nesting.item_ended()
        yield from _emptied(self._ready)
        if fault:
            said = str(fault).removeprefix("b'").replace("\\n", "\n").splitlines()[0]
            why = "it ends too early" if at_end else said
            raise PayloadError(f"found no JSON in the {self._read_bytes:,} bytes until here: {why}") from fault
        if self._item_bytes > self._limit_bytes:
            raise PayloadError(
                f"found no item in {self._item_bytes:,} bytes after byte {self._read_bytes - self._item_bytes:,}, "
                f"expected one in {self._limit_bytes:,}; is the path right? Else raise item_limit_bytes"
            )


def items(source: Source, at: str = "item", **options: Unpack[Options]) -> Iterator[Any]:
    """Each value at this path.

    Raises PayloadError, OSError, MissingExtra, and between two chunks StoppedByPressure.
    """
    parser = _Parser(at, **options)
    with _reading(source) as read:
        while chunk := read(_CHUNK_BYTES):
            yield from parser.feed(chunk)
    yield from parser.feed(b"")


async def items_async(
    source: Source | AsyncIterable[bytes],
    at: str = "item",
    *,
    spool: Spool | bool = True,
    **options: Unpack[Options],
) -> AsyncIterator[Any]:
    """As items(), reading in threads. A stream goes to a spool of its own, or to one that is given (and stays open).

    With spool=False items come as the stream does, and whoever sends waits for what is done with them.
    """
    parser = _Parser(at, **options)
    if isinstance(source, AsyncIterable):
        chunks = _through(source, spool, parser) if spool is not False else source
    else:
        chunks = _from(source)
    async for chunk in chunks:
        for begin in range(0, len(chunk), _CHUNK_BYTES):
            for item in parser.feed(chunk[begin : begin + _CHUNK_BYTES]):
                yield item
    for item in parser.feed(b""):
        yield item


def batches(source: Source, size: int, at: str = "item", **options: Unpack[Options]) -> Iterator[list[Any]]:
    """Lists of `size` items, the last one shorter."""
    each = items(source, at, **options)
    while batch := list(itertools.islice(each, _positive(size))):
        yield batch


async def batches_async(
    source: Source | AsyncIterable[bytes],
    size: int,
    at: str = "item",
    *,
    spool: Spool | bool = True,
    **options: Unpack[Options],
) -> AsyncIterator[list[Any]]:
    """As batches(), of items_async()."""
    batch: list[Any] = []
    async for item in items_async(source, at, spool=spool, **options):
        batch.append(item)
        if len(batch) == _positive(size):
            yield batch
            batch = []
    if batch:
        yield batch


def _positive(size: int) -> int:
    if size <= 0:
        raise ValueError(f"found a batch size of {size}, expected 1 or more")
    return size


@contextmanager
def _reading(source: Source) -> Iterator[Callable[[int], bytes]]:
    if isinstance(source, bytes):
        yield io.BytesIO(source).read
    elif isinstance(source, str | os.PathLike):
        with Path(source).open("rb", buffering=0) as file:
            yield file.read
    else:
        yield source.read


async def _from(source: Source) -> AsyncIterator[bytes]:
    with _reading(source) as read:
        while chunk := await in_thread(read, _CHUNK_BYTES):
            yield chunk


async def _through(source: AsyncIterable[bytes], spool: Spool | bool, parser: _Parser) -> AsyncIterator[bytes]:
    with nullcontext(spool) if isinstance(spool, Spool) else Spool() as file:
        async for chunk in source:
            parser.stop_if_full(file.size_bytes)
            await file.write_async(chunk)
        offset = 0
        while chunk := await in_thread(file.read, _CHUNK_BYTES, offset):
            offset += len(chunk)
            yield chunk


def _emptied(ready: list[Any]) -> Iterator[Any]:
    """Each item, held by nobody here once it is out."""
    ready.reverse()
    while ready:
        yield ready.pop()
