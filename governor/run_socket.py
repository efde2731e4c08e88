"""The control socket of `governor run`: what the agent shows, and typing for it.

JSON lines, one answer to each request:

    {"ask": "terminal"}                {"rows": R, "columns": C, "pid": AGENT, "output": BASE64 of the last 256 KiB}
    {"ask": "type", "keys": BASE64}    {"ok": true}: taken, and written in order as the agent reads
    {"ask": "warn", "text": TEXT}      {"ok": true}: shown to whoever sits at the terminal, never typed: one line,
                                       at most 1000 printable characters
    anything else                      {"ok": false, "reason": TEXT}

For the same user and root only. A client that says nothing for five seconds, does not take its answer, or sends
a line over 64 KiB is dropped; of one that floods, a request a turn is heard.
"""

from __future__ import annotations

import json
import os
import select
import socket
import time
from binascii import Error as NoBase64
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from typing import Any

from governor.peer import peer_of

_LINE_BYTES = 64 << 10
_TEXT_LIMIT = 1000
_CLIENTS = 8
_PATIENCE_NS = 5_000_000_000


class _Client:
    def __init__(self, connection: socket.socket, now_ns: int) -> None:
        self.connection = connection
        self.asked = bytearray()
        self.answer = b""
        self.deadline_ns = now_ns + _PATIENCE_NS

    @property
    def has_line(self) -> bool:
        return b"\n" in self.asked


class ControlSocket:
    """Listens; `terminal` gives rows, columns, pid and the output, `type_keys` takes keys and returns why not.

    `warn` shows a line to the user.
    """

    def __init__(
        self,
        path: str,
        terminal: Callable[[], tuple[int, int, int, bytes]],
        type_keys: Callable[[bytes], str],
        warn: Callable[[str], None],
    ) -> None:
        """Raises OSError where there can be none."""
        self._path, self._terminal, self._type_keys, self._warn = path, terminal, type_keys, warn
        self._clients: dict[int, _Client] = {}
        self._listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            beside = f"{path}.new"  # who finds the path can connect
            if os.path.lexists(beside):
                os.unlink(beside)  # noqa: PTH108  no pathlib here
            usual_umask = os.umask(0o177)
            try:
                self._listening.bind(beside)
            finally:
                os.umask(usual_umask)
            self._listening.listen(_CLIENTS)
            os.rename(beside, path)  # noqa: PTH104  and what a process that had our pid before left is replaced
        except OSError:
            self._listening.close()
            raise

    def wants(self) -> dict[int, int]:
        """What to poll for: descriptor to events."""
        wanted = {
            fd: select.POLLOUT if client.answer or client.has_line else select.POLLIN
            for fd, client in self._clients.items()
        }
        if len(self._clients) < _CLIENTS:
            wanted[self._listening.fileno()] = select.POLLIN
        return wanted

    def due_ns(self) -> int | None:
        """When the next client's patience is over, monotonic."""
        return min((client.deadline_ns for client in self._clients.values()), default=None)

    def drop_slow(self, now_ns: int) -> None:
        """Who has not finished a request or taken an answer in time."""
        for fd in [fd for fd, client in self._clients.items() if now_ns >= client.deadline_ns]:
            self._drop(fd)

    def on_ready(self, fd: int) -> None:
        """A descriptor of wants() is ready; another one: nothing happens."""
        if fd == self._listening.fileno():
            self._accept()
        elif client := self._clients.get(fd):
            try:
                alive = self._answer(client) if client.answer else self._hear(client)
            except BlockingIOError:
                return
            except OSError:
                alive = False
            if not alive:
                self._drop(fd)

    def close(self) -> None:
        """Stop listening."""
        for fd in list(self._clients):
            self._drop(fd)
        self._listening.close()
        try:
            os.unlink(self._path)  # noqa: PTH108
        except OSError:
            return

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except OSError:
            return
        connection.setblocking(False)
        if peer_of(connection).uid not in (0, os.geteuid()):
            connection.close()
            return
        self._clients[connection.fileno()] = _Client(connection, time.monotonic_ns())

    def _hear(self, client: _Client) -> bool:
        if not client.has_line:
            data = client.connection.recv(_LINE_BYTES)
            if not data:
                return False
            client.asked += data
        line, newline, rest = client.asked.partition(b"\n")
        if len(line) > _LINE_BYTES:
            return False
        if newline:
            client.asked = rest
            client.answer = json.dumps(self._reply(bytes(line))).encode() + b"\n"
            client.deadline_ns = time.monotonic_ns() + _PATIENCE_NS
            return self._answer(client)
        return True

    def _answer(self, client: _Client) -> bool:
        try:
            sent = client.connection.send(client.answer)
        except BlockingIOError:
            return True
        client.answer = client.answer[sent:]
        if not client.answer:
            client.deadline_ns = time.monotonic_ns() + _PATIENCE_NS
        return True

    def _reply(self, line: bytes) -> dict[str, Any]:
        try:
            asked = json.loads(line)
        except (ValueError, RecursionError):
            return _refused("found no JSON, expected one object a line")
        ask = asked.get("ask") if isinstance(asked, dict) else None
        if ask == "terminal":
            rows, columns, pid, output = self._terminal()
            text = b2a_base64(output, newline=False).decode()
            return {"rows": rows, "columns": columns, "pid": pid, "output": text}
        if ask == "warn":
            text = asked.get("text")
            if not isinstance(text, str) or not text.isprintable() or not 0 < len(text) <= _TEXT_LIMIT:
                return _refused(f'expected "text" to be 1 to {_TEXT_LIMIT} printable characters')
            self._warn(text)
            return {"ok": True}
        if ask != "type":
            return _refused('expected "ask" to be "terminal", "type" or "warn"')
        try:
            keys = a2b_base64(asked["keys"].encode(), strict_mode=True)
        except (KeyError, AttributeError, ValueError, NoBase64):
            return _refused('expected "keys" to be text in base64')
        why_not = self._type_keys(keys)
        return _refused(why_not) if why_not else {"ok": True}

    def _drop(self, fd: int) -> None:
        self._clients.pop(fd).connection.close()


def _refused(reason: str) -> dict[str, Any]:
    return {"ok": False, "reason": reason}
