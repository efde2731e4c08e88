"""Bodies of HTTP responses in chunks: into a callback, a file, or a generator, never whole in memory.

    await download(url, "corpus.bin", pressure=pressure)  # resumes where it was cut
    async for event in events(chunks(url, method="POST", json=request)):  # a model's answer as it comes
        show(event.data)

Whoever takes the chunks sets the pace: nothing is read before a chunk has been dealt with, so the sender waits. What
is transferred is what is stored: no compression is asked for, which could make gigabytes of a chunk, and none
is taken.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import os
import re
import socket
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from governor.agent.extras import load
from governor.agent.in_thread import in_thread
from governor.agent.partial import Partial
from governor.agent.stopping import SHEDDING, Pressure, check
from governor.agent.under_way import under_way_bytes

if TYPE_CHECKING:
    import ssl

    import httpx

DEFAULT_LIMIT_BYTES = 4 << 30
_WRITE_BYTES = 1 << 18  # at once, in a thread
_RECEIVE_BYTES = 6 << 20  # as far as Linux lets a socket's buffer grow by itself
_TIMEOUT_S = 60.0  # without a byte; models think before they answer
_BACKOFF_MAX_S = 30.0
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (?:(\d{1,19})-\d{1,19}|\*)/(\d{1,19}|\*)", re.ASCII)


class StreamError(OSError):
    """The response is not what was asked for; the text says what was found."""


class _CutError(StreamError):
    """It may be better next time."""


class _RefusedError(StreamError):
    """There is no body at all: what has come before is as good as it was."""


@dataclass(frozen=True, slots=True)
class Downloaded:
    """A whole file. `resumed_bytes` were there before, `requests` it took."""

    path: Path
    size_bytes: int
    resumed_bytes: int
    requests: int


async def chunks(
    url: str,
    *,
    method: str = "GET",
    client: httpx.AsyncClient | None = None,
    headers: Mapping[str, str] | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    pressure: Pressure | None = None,
    stop_at: float = SHEDDING,
    **request: Any,
) -> AsyncGenerator[bytes, None]:
    """The body as it comes; `request` (json, content, params ...) as for httpx.

    Raises StreamError, StoppedByPressure before a chunk, MissingExtra, and what httpx raises.
    """
    async with _response(client, method, url, headers or {}, **request) as response:
        if not response.is_success:
            raise StreamError(f"{response.url}: found status {response.status_code}, expected 200")
        async for chunk in _body(response, 0, limit_bytes, pressure, stop_at):
            yield chunk


async def deliver(source: AsyncIterable[bytes], sink: Callable[[bytes], Awaitable[None] | None] | BinaryIO) -> int:
    """Each chunk to a callback, which may be asynchronous, or to a file, in a thread; the bytes that were taken."""
    taken_bytes = 0
    async with aclosing(source) if isinstance(source, AsyncGenerator) else nullcontext():
        async for chunk in source:
            if callable(sink):
                done = sink(chunk)
                if inspect.isawaitable(done):
                    await done
            else:
                left = memoryview(chunk)
                while left:
                    left = left[await in_thread(sink.write, left) :]
            taken_bytes += len(chunk)
    return taken_bytes


async def download(
    url: str,
    path: str | os.PathLike[str],
    *,
    client: httpx.AsyncClient | None = None,
    headers: Mapping[str, str] | None = None,
    limit_bytes: int = DEFAULT_LIMIT_BYTES,
    pressure: Pressure | None = None,
    stop_at: float = SHEDDING,
    attempts: int = 5,
) -> Downloaded:
    """A file, whole or not at all under its name.

    What is cut off is asked for from there on, until `attempts` requests in a row have brought nothing, and by the
    next download() of this path; from the beginning where the server names no version of it. Raises StreamError,
    OSError, StoppedByPressure (what has come is kept), MissingExtra, and at last what httpx raises.
    """
    transport_error = _httpx().TransportError
    with Partial(Path(path), url) as partial:
        resumed_bytes, requests, failed = partial.size_bytes, 0, 0
        while True:
            before_bytes = partial.size_bytes
            try:
                requests += 1
                async with _response(client, "GET", url, {**(headers or {}), **partial.range_headers()}) as response:
                    total_bytes = _agree(response, partial)
                    resumed_bytes = min(resumed_bytes, partial.size_bytes)
                    if total_bytes is None or partial.size_bytes < total_bytes:
                        await _store(_body(response, partial.size_bytes, limit_bytes, pressure, stop_at), partial)
                _check_whole(partial, total_bytes, url)
            except (transport_error, _CutError):
                failed = 1 if partial.size_bytes > before_bytes else failed + 1
                if failed >= attempts:
                    raise
                await asyncio.sleep(min(0.5 * 2**failed, _BACKOFF_MAX_S))
            except _RefusedError:
                raise
            except StreamError:
                partial.restart()
                raise
            else:
                partial.finish()
                return Downloaded(partial.path, partial.size_bytes, resumed_bytes, requests)


def _httpx() -> Any:
    """Without its command line, which brings click, rich and pygments where they are installed: 5 MiB."""
    return load("httpx", "http", without="httpx._main")


@functools.cache
def _tls() -> ssl.SSLContext:
    """Once: to read all certificates takes 30 ms. For http:// too, which may redirect to https://."""
    context: ssl.SSLContext = _httpx().create_ssl_context()
    return context


def _bound_receiving(response: httpx.Response) -> None:
    """Where there is a socket: its buffer grows to 6 MiB (tcp_rmem), which small containers do not have."""
    most_bytes = under_way_bytes()
    stream = response.extensions.get("network_stream")
    if (
        most_bytes is not None
        and most_bytes < _RECEIVE_BYTES
        and stream
        and (sock := stream.get_extra_info("socket"))
    ):
        with suppress(OSError):  # all has come, and it is closed
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, most_bytes // 2)  # the kernel doubles it


@asynccontextmanager
async def _response(
    client: httpx.AsyncClient | None, method: str, url: str, headers: Mapping[str, str], **request: Any
) -> AsyncIterator[httpx.Response]:
    async with AsyncExitStack() as stack:
        if client is None:
            client = _httpx().AsyncClient(follow_redirects=True, timeout=_TIMEOUT_S, verify=_tls())
            await stack.enter_async_context(client)
        plain = {**headers, "Accept-Encoding": "identity"}
        response = await stack.enter_async_context(client.stream(method, url, headers=plain, **request))
        _bound_receiving(response)
        yield response


async def _body(
    response: httpx.Response, before_bytes: int, limit_bytes: int, pressure: Pressure | None, stop_at: float
) -> AsyncGenerator[bytes, None]:
    """What comes, as it comes, with what came before no more than the limit."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity":
        raise StreamError(f"{response.url}: found Content-Encoding {encoding!r}, expected none: none was asked for")
    done_bytes = before_bytes
    if done_bytes + _length(response) > limit_bytes:
        raise StreamError(f"{response.url}: found {_length(response):,} bytes, expected at most {limit_bytes:,}")
    check(pressure, stop_at, done_bytes)
    async for chunk in response.aiter_raw():
        done_bytes += len(chunk)
        if done_bytes > limit_bytes:
            raise StreamError(
                f"{response.url}: found more than {limit_bytes:,} bytes; raise limit_bytes if that is right"
            )
        yield chunk
        check(pressure, stop_at, done_bytes)


async def _store(body: AsyncIterable[bytes], partial: Partial) -> None:
    """To the file, in pieces that are worth a thread; what has come is kept however it ends."""
    waiting = bytearray()
    try:
        async for chunk in body:
            waiting += chunk
            if len(waiting) >= _WRITE_BYTES:
                full, waiting = waiting, bytearray()  # where writing fails, it is not written again below
                await in_thread(partial.write, full)
    finally:
        await in_thread(partial.write, waiting)


def _agree(response: httpx.Response, partial: Partial) -> int | None:
    """Bring what is there into line with what comes; how many bytes the whole has, None if unknown."""
    status = response.status_code
    found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    begin, total = found.groups() if found else (None, None)
    if status == 200:
        partial.restart(_validator(response))
        return _length(response) or None
    if status == 206 and begin == str(partial.size_bytes) and _validator(response) in ("", partial.validator):
        return None if total in (None, "*") else int(total)
    if status == 416 and begin is None and total == str(partial.size_bytes):
        return partial.size_bytes
    if status in (206, 416):  # another version, or another part
        partial.restart()
        raise _CutError(f"{response.url}: found status {status} with {response.headers.get('Content-Range')!r}")
    raise (_CutError if status in _AGAIN else _RefusedError)(
        f"{response.url}: found status {status}, expected 200 or 206"
    )


def _check_whole(partial: Partial, total_bytes: int | None, url: str) -> None:
    if total_bytes not in (None, partial.size_bytes):
        raise _CutError(f"{url}: found {partial.size_bytes:,} bytes, expected {total_bytes:,}")


def _length(response: httpx.Response) -> int:
    """By the header; 0 if it says nothing."""
    length = response.headers.get("Content-Length", "")
    return int(length) if length.isascii() and length.isdecimal() else 0


def _validator(response: httpx.Response) -> str:
    """What If-Range may name (RFC 9110, 13.1.5): a strong ETag, else the date."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
