"""Refusing work while memory is short: a decorator, a semaphore that shrinks, an ASGI middleware and the probes.

The ASGI parts need no framework, and start the watch with the server where that speaks ASGI's lifespan.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import random
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from contextlib import suppress
from types import TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from governor.agent.levels import Status
from governor.agent.pressure import Change, MemoryPressure

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]
_P = ParamSpec("_P")
_R = TypeVar("_R")

RETRY_AFTER_S = 5
_LOOK_AGAIN_S = 1.0
_log = logging.getLogger("governor.agent")
_TRY_AGAIN_LATER = 1013  # WebSocket close code, IANA


class Overloaded(Exception):
    """Memory is short: this was not begun. Try again after `retry_after_s`."""

    def __init__(self, status: Status, retry_after_s: float) -> None:
        super().__init__(f"memory is short ({status}): not begun, try again in {retry_after_s:g} s")
        self.status, self.retry_after_s = status, retry_after_s

    def __reduce__(self) -> tuple[type[Overloaded], tuple[Status, float]]:
        """As it is made: a pool of processes breaks over an exception that it cannot hand on."""
        return type(self), (self.status, self.retry_after_s)


def sheds(
    pressure: MemoryPressure, retry_after_s: float = RETRY_AFTER_S
) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function or coroutine function: Overloaded instead of a call while nothing is accepted."""

    def check() -> None:
        if not pressure.accepting():
            raise Overloaded(pressure.status, retry_after_s)

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def checked_later(*args: _P.args, **named: _P.kwargs) -> Any:
                check()  # when it is awaited, not when it is called: that may be much earlier
                return await function(*args, **named)

            return cast("Callable[_P, _R]", checked_later)

        @functools.wraps(function)
        def checked(*args: _P.args, **named: _P.kwargs) -> _R:
            check()
            return function(*args, **named)

        return checked

    return decorate


class ShrinkingSemaphore:
    """`async with`: so many at once while memory is there; half on warning, one when shedding, none on critical.

    Who is inside stays; who waits is let in, in order, as there is room: at once while the watch is entered, else
    within a second.
    """

    def __init__(self, pressure: MemoryPressure, count: int) -> None:
        if count < 1:
            raise ValueError(f"found count {count}, expected 1 or more")
        self._pressure, self._count = pressure, count
        self._inside = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        let_in = weakref.WeakMethod(self._let_in)

        def told(_: Change) -> None:
            if still_there := let_in():
                still_there()

        weakref.finalize(self, pressure.on_change(told))

    @property
    def capacity(self) -> int:
        """How many may be inside now."""
        by_status = {Status.OK: self._count, Status.WARNING: -(-self._count // 2), Status.SHEDDING: 1}
        return by_status.get(self._pressure.status, 0)

    async def __aenter__(self) -> None:
        if not self._waiting and self._inside < self.capacity:
            self._inside += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            while not turn.done():  # nobody is told once the watch is left
                await asyncio.wait({turn}, timeout=_LOOK_AGAIN_S)
                self._let_in()
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in and cancelled at once
                self._leave()
            raise
        finally:
            with suppress(ValueError):
                self._waiting.remove(turn)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _leave(self) -> None:
        self._inside -= 1
        self._let_in()

    def _let_in(self) -> None:
        capacity = self.capacity
        while self._waiting and self._inside < capacity:
            turn = self._waiting.popleft()
            if not turn.done():
                self._inside += 1
                turn.set_result(None)


class ShedLoad:
    """ASGI middleware: 503 with Retry-After while nothing is accepted; WebSockets are closed with 1013.

    Requests that were begun go on. Retry-After varies up to twice its value, so that clients do not come back as one.
    """

    def __init__(
        self,
        app: App,
        pressure: MemoryPressure,
        retry_after_s: int = RETRY_AFTER_S,
        spared_paths: Collection[str] = (),
    ) -> None:
        self._app, self._pressure, self._retry_after_s = app, pressure, retry_after_s
        self._spared = frozenset(spared_paths)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """One connection, or the server's life."""
        if scope["type"] == "lifespan":
            async with self._pressure:
                await _lifespan_of(self._app, scope, receive, send)
        elif scope.get("path") in self._spared or self._pressure.accepting():
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await receive()  # websocket.connect, before which nothing may be sent
            await send({"type": "websocket.accept"})  # who closes before that says HTTP 403, and no code
            await send({"type": "websocket.close", "code": _TRY_AGAIN_LATER, "reason": "memory is short"})
        else:
            after_s = random.randint(self._retry_after_s, 2 * self._retry_after_s)  # noqa: S311  no secret
            await _answer(send, 503, {"error": "memory is short, try again later"}, retry_after_s=after_s)


class Probes:
    """ASGI app: `/health` is 200 while the event loop turns, `/ready` is 503 from shedding on; the rest is `app`'s.

    A full memory is no reason to be restarted, so `/health` does not look at it; it is one to get no new requests.
    """

    def __init__(self, pressure: MemoryPressure, app: App | None = None) -> None:
        self._pressure, self._app = pressure, app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """As above."""
        path = scope.get("path") if scope["type"] == "http" else None
        if path == "/health":
            await _answer(send, 200, self._about())
        elif path == "/ready":
            await _answer(send, 200 if self._pressure.accepting() else 503, self._about())
        elif scope["type"] == "lifespan":
            async with self._pressure:
                await _lifespan_of(self._app, scope, receive, send)
        else:
            await (self._app or _not_found)(scope, receive, send)

    def _about(self) -> dict[str, object]:
        reading = self._pressure.reading
        return {
            "status": str(self._pressure.status),
            "unreclaimable_bytes": reading.unreclaimable_bytes,
            "max_bytes": reading.max_bytes,
        }


async def _answer(send: Send, status: int, about: dict[str, object], retry_after_s: int | None = None) -> None:
    body = json.dumps(about).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers.append((b"cache-control", b"no-store"))
    if retry_after_s is not None:
        headers.append((b"retry-after", str(retry_after_s).encode()))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan_of(app: App | None, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    """The app's own, or, where it has none (it returns or raises before it has answered), one for the watch alone."""
    said: list[str] = []
    received: list[Message] = []

    async def received_once() -> Message:
        message = await receive()
        received.append(message)
        return message

    async def answered(message: Message) -> None:
        said.append(message["type"])
        await send(message)

    try:
        if app:
            await app(scope, received_once, answered)
    except Exception as error:
        if said:
            raise
        _log.info("the app has no lifespan of its own: %r", error)
    if not said:
        if not received:
            await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})


async def _not_found(scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await receive()
        await send({"type": "websocket.close"})
    else:
        await _answer(send, 404, {"error": "found neither /health nor /ready"})
