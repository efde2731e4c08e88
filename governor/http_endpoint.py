"""/metrics, /healthz and /readyz over HTTP, on the loop's poller: no thread, and nothing here waits.

Why so: a probe that the loop itself answers fails when the loop stalls, which no thread beside it would; h11 parses
and writes HTTP without a socket of its own. Formatting metrics takes up to a second where there are thousands of
targets, during which a thread would hold the interpreter's lock every other moment. So a child does it: a fork has
everything as it was at one moment, imports what it needs (see metrics), and has the readers to itself.

Whoever connects is nobody in particular: 16 connections, 2 s and 4 KiB for a request, one child at a time, a second
apart. Who is slow loses their place to who comes later.
"""

from __future__ import annotations

import gc
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import h11

from governor.children import Child, Children, Ended, fork
from governor.journal import Note
from governor.policy import SECOND
from governor.poller import Poller

DEFAULT_LISTEN = "127.0.0.1:9464"
_CONNECTIONS_LIMIT = 16
_SCRAPERS_LIMIT = 4  # of these, waiting for metrics
_REQUEST_LIMIT_BYTES = 4096
_REQUEST_NS = 2 * SECOND
_WAIT_NS = 15 * SECOND  # for metrics, while others have theirs formatted
_FORMAT_NS = 10 * SECOND  # what Prometheus waits for, unless told otherwise
_GAP_NS = SECOND  # from one child's end to the next one
_READ_S = 2.0  # for the answer
_TEXT = "text/plain; charset=utf-8"
_OPENMETRICS = "application/openmetrics-text; version=1.0.0"  # else plain; a version of theirs is not parsed here

Exposition = Callable[[str], tuple[str, bytes]]  # by the type wanted ("": plain): the content type, and the text


@dataclass(slots=True, eq=False)
class _Client:
    connection: socket.socket
    deadline_ns: int
    accept: str | None = None  # waits for metrics of this type; None: it has not asked for any
    http: h11.Connection = field(
        default_factory=lambda: h11.Connection(h11.SERVER, max_incomplete_event_size=_REQUEST_LIMIT_BYTES)
    )

    def response(self, status: int, content_type: str, body: bytes) -> bytes:
        """The answer, after which the connection ends."""
        headers = [("Content-Type", content_type), ("Content-Length", str(len(body))), ("Connection", "close")]
        head = self.http.send(h11.Response(status_code=status, headers=headers)) or b""
        return head + (self.http.send(h11.Data(data=body)) or b"")


class HttpEndpoint:
    """Everybody who asks one governor by HTTP."""

    def __init__(self, poller: Poller, children: Children, note: Note) -> None:
        """Nobody can connect before listen()."""
        self.faults: Callable[[], list[str]] = list  # what is wrong: /healthz
        self.not_ready: Callable[[], list[str]] = list
        self.exposition: Exposition = lambda accept: (_TEXT, b"")  # called in the child
        self._poller, self._children, self._note = poller, children, note
        self._server: socket.socket | None = None
        self._clients: dict[int, _Client] = {}  # by descriptor, the oldest first
        self._is_formatting = self._has_failed = False
        self._not_before_ns = 0

    def listen(self, address: str) -> int:
        """Make the socket; its port. Raises ValueError for what is no address, OSError where it cannot be bound."""
        family, where = parse_address(address)
        self._server = server = socket.create_server(where, family=family, backlog=128)
        server.setblocking(False)
        self._poller.register(server.fileno(), lambda _: self._accept(server))
        return int(server.getsockname()[1])

    def check_deadlines(self, now_ns: int) -> None:
        """Who took too long is cut off; a scrape that had to wait begins. To be called every second."""
        for client in [client for client in self._clients.values() if now_ns >= client.deadline_ns]:
            self._drop(client)
        self._format(now_ns)

    def close(self) -> None:
        """Nobody is answered any more."""
        for client in list(self._clients.values()):
            self._drop(client)
        if self._server:
            self._poller.unregister(self._server.fileno())
            self._server.close()
            self._server = None

    def _accept(self, server: socket.socket) -> None:
        for _ in range(_CONNECTIONS_LIMIT):
            try:
                connection, _ = server.accept()
            except OSError:  # no more, gone again, or no descriptor left
                return
            if len(self._clients) >= _CONNECTIONS_LIMIT:
                self._drop(next(client for client in self._clients.values() if client.accept is None))
            connection.setblocking(False)
            fd = connection.fileno()
            self._clients[fd] = _Client(connection, time.monotonic_ns() + _REQUEST_NS)
            self._poller.register(fd, self._hear)
            self._hear(fd)  # who has asked already is answered before the next one may take its place

    def _hear(self, fd: int) -> None:
        client = self._clients.get(fd)
        if client is None or client.accept is not None:
            return
        try:
            client.http.receive_data(client.connection.recv(_REQUEST_LIMIT_BYTES))
            event = client.http.next_event()
        except BlockingIOError:
            return
        except h11.RemoteProtocolError as error:
            self._answer(client, error.error_status_hint, "that is no request\n")
        except OSError:
            self._drop(client)
        else:
            if isinstance(event, h11.Request):
                self._asked(client, event)
            elif event is not h11.NEED_DATA:
                self._drop(client)

    def _asked(self, client: _Client, request: h11.Request) -> None:
        path = request.target.partition(b"?")[0]
        if request.method != b"GET":
            self._answer(client, 405, "")  # a body would be none of HEAD
        elif path in (b"/healthz", b"/readyz"):
            why_not = self.faults() if path == b"/healthz" else self.not_ready()
            self._answer(client, 503 if why_not else 200, "".join(f"{one}\n" for one in why_not) or "ok\n")
        elif path != b"/metrics":
            self._answer(client, 404, "found no such path, expected /metrics, /healthz or /readyz\n")
        elif sum(one.accept is not None for one in self._clients.values()) >= _SCRAPERS_LIMIT:
            self._answer(client, 503, "too many wait for metrics already\n")
        else:
            wanted = b",".join(value for name, value in request.headers if name == b"accept")
            client.accept = _OPENMETRICS if _OPENMETRICS.partition(";")[0].encode() in wanted else ""
            client.deadline_ns = time.monotonic_ns() + _WAIT_NS
            self._poller.unregister(client.connection.fileno())  # which may stay readable for as long
            self._format(time.monotonic_ns())

    def _answer(self, client: _Client, status: int, text: str) -> None:
        with suppress(OSError, h11.LocalProtocolError):  # it does not read, or is gone: nothing waits for it
            client.connection.send(client.response(status, _TEXT, text.encode()))
        self._drop(client)

    def _drop(self, client: _Client) -> None:
        fd = client.connection.fileno()
        del self._clients[fd]
        if client.accept is None:
            self._poller.unregister(fd)
        client.connection.close()

    # Metrics

    def _format(self, now_ns: int) -> None:
        """Have a child answer everybody who waits now."""
        waiting = [client for client in self._clients.values() if client.accept is not None]
        if self._is_formatting or not waiting or now_ns < self._not_before_ns:
            return

        def start() -> Child:
            fds = [client.connection.fileno() for client in waiting]
            return fork(lambda: _serve(waiting, self.exposition), now_ns + _FORMAT_NS, "metrics", keep=fds)

        self._is_formatting = True
        self._children.attempt(start, self._formatted)
        for client in waiting:
            self._drop(client)  # it is the child's now

    def _formatted(self, ended: Ended) -> None:
        self._is_formatting = False
        self._not_before_ns = time.monotonic_ns() + _GAP_NS
        if not ended.ok and not self._has_failed:
            self._note("no_metrics", f"a scrape was not answered: {ended.why}; said once until one is")
        self._has_failed = not ended.ok


def parse_address(address: str) -> tuple[int, tuple[str, int]]:
    """The address family, and what to bind; raises ValueError."""
    host, _, port = address.rpartition(":")
    try:
        if not (host and port.isdecimal() and int(port) < 1 << 16):  # getaddrinfo takes the lower 16 bits of any
            raise socket.gaierror
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        family = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM, flags=numeric)[0][0]
    except OSError:
        raise ValueError(f"found {address!r}, expected ADDRESS:PORT, as {DEFAULT_LISTEN} or [::]:9464") from None
    return family, (host.strip("[]"), int(port))


def _serve(clients: list[_Client], exposition: Exposition) -> bytes:
    """In the child: format once for each type that is asked for, and send as each of them reads."""
    gc.disable()  # a collection would touch, and so copy, every page of the parent's
    os.nice(10)
    made = {accept: exposition(accept) for accept in {client.accept or "" for client in clients}}
    poller, pending = select.poll(), {}
    for client in clients:
        fd = client.connection.fileno()
        pending[fd] = client.connection, memoryview(client.response(200, *made[client.accept or ""]))
        poller.register(fd, select.POLLOUT)
    until_s = time.monotonic() + _READ_S
    while pending and (left_s := until_s - time.monotonic()) > 0:
        for fd, _ in poller.poll(left_s * 1000):
            connection, rest = pending[fd]
            try:
                rest = rest[connection.send(rest) :]
            except BlockingIOError:
                continue
            except OSError:
                rest = rest[:0]
            pending[fd] = connection, rest
            if not rest:
                poller.unregister(fd)
                del pending[fd]
    return b""
