"""The journal: one JSON object a line for everything that was seen, decided and done, and a line for people.

Fields of every line: `time` (ISO 8601, UTC), `monotonic_ns`, `kind`, `target`. Further fields by kind:

    begin      policy, state, guard, facts   at the start and on top of each new file: what `replay` starts from, what
                                             was asked for, and the place (kernel, version, the memcg's knobs)
    policy     policy, path                  the policy was read again
    step       event, of, now_ns, phase, rule, instructions
               what the ladder heard (`event` names a class of `model`, `of` has its fields), on the boottime clock;
               the phase after it; the row of the transition table that applied ("" if none); what was decided,
               before it is carried out. Samples that change nothing are left out unless memory moved by 1 % or a
               minute passed, or usage, cache included, by 5 % and ten seconds passed; the one before a jump is kept.
    crossing, stall                          record: what the BPF programs sent
    all others  text, and figures            what became of it: braked, thawed, archived, killed, delivered, ...

A file over LIMIT_BYTES becomes FILE.1, that FILE.2, and so on up to FILE.<KEEP>. Text that came from outside is
escaped before it reaches the terminal, also by `cat` of a journal.
"""

from __future__ import annotations

import errno
import os
import select
import stat
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import orjson

from governor import background


class Note(Protocol):
    """A line for people and for the journal."""

    def __call__(self, kind: str, text: str, **fields: object) -> None:
        """`text` for people; both and the fields for the journal."""


def printable(text: str) -> str:
    """The text with every character that could steer a terminal escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def open_file(path: Path) -> BinaryIO:
    """Open a regular file to be read; raises OSError, EINVAL for what is none: a FIFO, a device may never end."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if stat.S_ISREG(mode):
        return os.fdopen(fd, "rb")
    os.close(fd)
    code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise OSError(code, os.strerror(code) if stat.S_ISDIR(mode) else "Not a regular file", str(path))


_LINE_LIMIT = 4000  # under PIPE_BUF
_PIECE = 1 << 16  # characters: a manifest has millions, and as a list each takes eight bytes and more


def encode(value: Any) -> bytes:
    """JSON of a value; dataclasses and named tuples become objects, what JSON cannot hold becomes text.

    Nothing in it steers a terminal: JSON itself lets C1 controls, DEL and bidirectional overrides through.
    """
    data = orjson.dumps(value, default=_plain)
    if data.isascii() and b"\x7f" not in data:
        return data
    text = data.decode()
    return b"".join(_shown(text[at : at + _PIECE]) for at in range(0, len(text), _PIECE))


def _shown(text: str) -> bytes:
    return "".join(c if c.isprintable() else _escaped(c) for c in text).encode()


def _escaped(character: str) -> str:
    """As JSON has it: beyond U+FFFF by a pair of surrogates."""
    units = character.encode("utf-16-be").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _plain(value: Any) -> Any:
    return value._asdict() if hasattr(value, "_asdict") else str(value)


class Journal:
    """Appends to a file; a write that fails is said once and never stops the caller."""

    LIMIT_BYTES = 16 << 20
    KEEP = 3

    def __init__(self, path: Path, target: str, first: Callable[[], dict[str, Any]] = dict) -> None:
        """`first` gives the fields of the line of kind begin. Raises OSError when the file cannot be opened."""
        self._path, self._target, self._first = path, target, first
        self._failed = self._has_gap = False
        try:
            self._fd = self._open(path)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._fd = self._open(path)
        self._torn = _is_torn(self._fd)

    @classmethod
    def or_none(cls, path: Path, target: str, first: Callable[[], dict[str, Any]] = dict) -> Journal:
        """As Journal(); where the file cannot be opened that is said, and what is written is lost."""
        try:
            return cls(path, target, first)
        except OSError as error:
            say(f"the journal {path} cannot be opened: {error.strerror}; going on without it")
            return cls(Path(os.devnull), target, first)

    def begin(self) -> None:
        """Write the line that `replay` starts from."""
        self.write("begin", **self._first())

    def close(self) -> None:
        """Nothing may be written any more."""
        os.close(self._fd)
        self._fd = -1  # its number will be another file's
        self._failed = True

    def _open(self, path: Path) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        return os.open(path, flags, 0o600)

    def _rotate(self) -> None:
        fresh = self._path.with_name(f".{self._path.name}.new")
        fd = self._open(fresh)  # first: where that fails, everything stays as it is
        for number in range(self.KEEP, 0, -1):
            older = self._path.with_name(f"{self._path.name}.{number}")
            newer = self._path.with_name(f"{self._path.name}.{number - 1}") if number > 1 else self._path
            if newer.exists():
                newer.rename(older)
        fresh.rename(self._path)
        os.close(self._fd)
        self._fd = fd
        self.begin()

    def write(self, kind: str, **fields: Any) -> None:
        """Append one line; `fields` are what orjson can write, dataclasses included.

        Where lines were lost it begins anew, as what follows them could not be replayed; the step that it has come to
        meanwhile is in the state that it begins with.
        """
        if self._has_gap and kind != "begin":
            self.begin()
            if self._has_gap or kind == "step":
                return
        line = {
            "time": datetime.now(UTC).isoformat(),
            "monotonic_ns": time.monotonic_ns(),
            "kind": kind,
            "target": self._target,
            **fields,
        }
        data = b"\n" * self._torn + encode(line) + b"\n"
        try:
            self._has_gap = self._torn = os.write(self._fd, data) < len(data)  # a full disk
            if kind != "begin" and os.lseek(self._fd, 0, os.SEEK_CUR) > self.LIMIT_BYTES:
                self._rotate()
        except OSError as error:
            if not self._failed:
                say(f"the journal cannot be written: {error}; going on without it")
            self._failed = self._has_gap = True


def _is_torn(fd: int) -> bool:
    """Whether it ends within a line: SIGKILL cuts a write off where a page of the file ends."""
    size = os.fstat(fd).st_size
    return size > 0 and os.pread(fd, 1, size - 1) != b"\n"


def say(text: str) -> None:
    """One line for people, on standard error; lost when nobody reads it: nothing here may block."""
    line = f"governor: {printable(text)}"[:_LINE_LIMIT].encode(errors="replace")[:_LINE_LIMIT] + b"\n"
    poller = select.poll()
    poller.register(2, select.POLLOUT)
    try:
        if any(state & select.POLLOUT for _, state in poller.poll(0)):  # a pipe then has room for PIPE_BUF
            os.write(2, line)
            background.bound_log()
    except OSError:
        return
