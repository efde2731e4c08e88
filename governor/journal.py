"""The journal: one JSON object a line for everything that was seen, decided and done, and a line for people.

Fields of every line: `time` (ISO 8601, UTC), `monotonic_ns`, `kind`, `target`. Text that came from outside is
escaped before it reaches the terminal.
"""

from __future__ import annotations

import os
import select
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson


def printable(text: str) -> str:
    """The text with every character that could steer a terminal escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_LINE_LIMIT = 4000  # under PIPE_BUF


def encode(value: Any) -> bytes:
    """JSON of a value; dataclasses and named tuples become objects, what JSON cannot hold becomes text."""
    return orjson.dumps(value, default=_plain)


def _plain(value: Any) -> Any:
    return value._asdict() if hasattr(value, "_asdict") else str(value)


class Journal:
    """Appends to a file; a write that fails is said once and never stops the caller."""

    def __init__(self, path: Path, target: str) -> None:
        """Raises OSError when the file cannot be opened."""
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        self._target = target
        self._failed = False

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line; `fields` are what orjson can write, dataclasses included."""
        line = {
            "time": datetime.now(UTC).isoformat(),
            "monotonic_ns": time.monotonic_ns(),
            "kind": kind,
            "target": self._target,
            **fields,
        }
        try:
            os.write(self._fd, encode(line) + b"\n")
        except OSError as error:
            if not self._failed:
                say(f"the journal cannot be written: {error}; going on without it")
            self._failed = True


def say(text: str) -> None:
    """One line for people, on standard error; lost when nobody reads it: nothing here may block."""
    line = f"governor: {printable(text)}"[:_LINE_LIMIT].encode(errors="replace")[:_LINE_LIMIT] + b"\n"
    poller = select.poll()
    poller.register(2, select.POLLOUT)
    try:
        if any(state & select.POLLOUT for _, state in poller.poll(0)):  # a pipe then has room for PIPE_BUF
            os.write(2, line)
    except OSError:
        return
