"""A connection of `governor watch` to a governor's socket: hears what happens, asks once a second how things stand.

Speaks the protocol of `subscribers`; never asks for anything to be done, and offers nothing (`can` is empty). Who is
neither root nor governor's own user may listen, but is not told how things stand. What is said is checked and escaped
here, once, so that nobody further on has to doubt it.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from governor import status_cli
from governor.journal import printable
from governor.record import LEVEL_NAMES

Line = dict[str, Any]
_READ_BYTES = 64 << 10
_LINE_LIMIT_BYTES = 256 << 10
_PATIENCE_NS = 3_000_000_000
_CONNECT_S = 0.2
_LARGEST = 1 << 62

# What is relied on of each type of line. A shape is a type, several, or an object's: by key, or of all its values.
_NONE, _NUMBER = type(None), (int, float)
_MEMORY = {"unreclaimable_bytes": int, "max_bytes": int, "unreclaimable_ratio": _NUMBER}
_SHAPES: dict[str, Any] = {
    "memory": {"level": str, "rising": bool, "unreclaimable_bytes": int, "max_bytes": int},
    "event": {"kind": str, "text": str},
    "status": {"next": (int, _NONE)},
    "target": {
        **dict.fromkeys(("cgroup", "namespace", "pod", "container", "policy", "source", "brake", "phase"), str),
        "cgroup_id": int,
        "agent_pid": int,
        "dry_run": bool,
        "in_episode": bool,
        "memory": (_MEMORY, _NONE),
        "frozen_for_ms": (*_NUMBER, _NONE),
        "tiers": {str: str},
        "decided": ({"what": str, "reason": str, "ago_s": _NUMBER}, _NONE),
        "levels": ({str: _NUMBER}, _NONE),
        "freed_bytes": ({str: int}, _NONE),
    },
}


class Gone(Exception):
    """It ended, or says what is no line of the protocol."""


class GovernorLink:
    """One socket, read without ever waiting."""

    def __init__(self, path: Path) -> None:
        """Raises status_cli.Unanswered for a stranger's socket, OSError where nobody listens."""
        self.path = path
        self.pid, self._socket = status_cli.connect(path, _CONNECT_S)
        self._socket.setblocking(False)
        self._heard = b""
        self._after: int | None = None  # an answer is awaited for what comes after this slot
        self._targets: list[Line] = []
        self._awaited_ns: int | None = time.monotonic_ns()  # since then: its hello, or an answer
        self.is_silent = False  # it has not answered for long
        self.asks = os.geteuid() == 0 or os.stat(path).st_uid == os.geteuid()  # noqa: PTH116
        self.fd = self._socket.fileno()
        self._say({"type": "subscribe", "can": []})

    def ask(self) -> None:
        """How do things stand? Nothing is sent while an earlier answer is awaited; is_silent says if for long."""
        self.is_silent = self._awaited_ns is not None and time.monotonic_ns() - self._awaited_ns > _PATIENCE_NS
        if self.asks and self._after is None:
            self._targets = []
            self._ask_after(-1)

    def drain(self) -> tuple[list[Line], list[Line] | None]:
        """The lines that came ("event", "memory"), and the standing of all targets once that is complete.

        Raises Gone.
        """
        lines: list[Line] = []
        complete: list[Line] | None = None
        for line in self._lines():
            if line.get("type") == "target":
                self._targets.append(line)
            elif line.get("type") == "status":
                following = line.get("next")
                if isinstance(following, int) and self._after is not None and following > self._after:
                    self._ask_after(following)
                else:
                    self._after, complete = None, self._targets
                    self._answered()
            else:
                if line.get("type") == "hello" and self._after is None:
                    self._answered()
                lines.append(line)
        return lines, complete

    def close(self) -> None:
        """Leave it."""
        self._socket.close()

    def _answered(self) -> None:
        self._awaited_ns, self.is_silent = None, False

    def _ask_after(self, slot: int) -> None:
        self._after, self._awaited_ns = slot, time.monotonic_ns()
        self._say({"type": "status", "after": slot})

    def _say(self, line: Line) -> None:
        with suppress(OSError):  # drain() finds out that it is gone
            self._socket.send(orjson.dumps(line) + b"\n")

    def _lines(self) -> list[Line]:
        try:
            data = self._socket.recv(_READ_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise Gone(error.strerror) from None
        if not data:
            raise Gone("it tells of this one no more")
        *complete, self._heard = (self._heard + data).split(b"\n")
        if len(self._heard) > _LINE_LIMIT_BYTES:
            raise Gone("it says a line without end")
        try:
            lines = [orjson.loads(each) for each in complete if each]
        except ValueError:
            raise Gone("it says what is no JSON") from None
        try:
            return [_escaped(line) for line in lines if _is_said_by_one(line)]
        except RecursionError:
            raise Gone("it says what no governor says") from None


def _is_said_by_one(line: Any) -> bool:
    """Whether it is an object; raises Gone where one of a type that we know lacks what we rely on."""
    if not isinstance(line, dict):
        return False
    kind = line.get("type")
    if not _fits(line, _SHAPES.get(str(kind), {})) or (kind == "memory" and line["level"] not in LEVEL_NAMES):
        raise Gone("it says what no governor says")
    return True


def _fits(value: Any, shape: Any) -> bool:
    if isinstance(shape, tuple):
        return any(_fits(value, one) for one in shape)
    if isinstance(shape, dict):
        if not isinstance(value, dict):
            return False
        if str in shape:
            return all(_fits(each, shape[str]) for each in value.values())
        return all(_fits(value.get(key), of) for key, of in shape.items())
    return type(value) is shape and (shape not in _NUMBER or -_LARGEST < value < _LARGEST)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {printable(key): _escaped(each) for key, each in value.items()}
    return [_escaped(each) for each in value] if isinstance(value, list) else value
