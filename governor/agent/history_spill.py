"""Turns on disk: what BoundedHistory dropped, a line each, read back in order.

A line is the CRC-32 of its JSON in eight hexadecimal digits, a space, and the JSON; the first line says what the file
is. A line is written before the turn leaves memory. A process that is killed while it writes leaves a torn last line,
which the next one cuts off; a line that is damaged anywhere else is said, not passed over. Not synced unless asked:
what must survive is the death of the process, and what was written is the kernel's by then.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
import weakref
import zlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

_HEADER = b"governor history 1\n"
_PREFIX_BYTES = 9  # eight digits and a space
_BLOCK_BYTES = 1 << 16


class SpillError(OSError):
    """The file cannot be used as a spill; the text says what was found and what to do."""


class Spill:
    """A file of JSON records, for one process at a time."""

    def __init__(self, path: str | os.PathLike[str], *, sync: bool = False) -> None:
        self.path = Path(path)
        self._sync = sync
        self._fd = _open(self.path)
        self._let_go = weakref.finalize(self, os.close, self._fd)  # where nobody closes it, too
        try:
            self.torn_bytes = self._begin()
        except BaseException:
            self.close()
            raise

    def write(self, records: Iterable[Any]) -> None:
        """Append; all of them or, where OSError, TypeError or ValueError is raised, none."""
        end = self.size_bytes
        try:
            for record in records:  # one line in memory at a time
                self._append(_line(record))
            if self._sync:
                os.fsync(self._fd)
        except BaseException:
            with suppress(OSError):  # else the next who opens it cuts it off
                os.ftruncate(self._fd, end)
            raise

    def __iter__(self) -> Iterator[Any]:
        """The records that are in the file now, oldest first, one in memory at a time; write() may go on."""
        at, end, rest = len(_HEADER), self.size_bytes, b""
        while block := os.pread(self._fd, min(max(_BLOCK_BYTES, len(rest)), end - at - len(rest)), at + len(rest)):
            *lines, rest = (rest + block).split(b"\n")
            for line in lines:
                yield self._parsed(line, at)
                at += len(line) + 1

    def last(self) -> Any | None:
        """The newest record, found from the end; None where there is none."""
        end = self.size_bytes
        begin = self._line_begin(end)
        return self._parsed(os.pread(self._fd, end - begin - 1, begin), begin) if begin else None

    @property
    def size_bytes(self) -> int:
        """Of the file."""
        return os.fstat(self._fd).st_size

    def close(self) -> None:
        """Let others use the file; nothing is written or read after it (EBADF)."""
        if self._fd >= 0:
            self._let_go()
            self._fd = -1

    def _begin(self) -> int:
        """Lock it, write or read its first line, and cut a torn last one off; how many bytes that were."""
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpillError(f"{self.path} is in use as a spill; give each history a file of its own") from None
        header = os.pread(self._fd, len(_HEADER), 0)
        if not _HEADER.startswith(header):
            raise SpillError(f"{self.path} begins with {header!r}, a spill with {_HEADER!r}; name another file")
        if header != _HEADER:  # new, or killed as it wrote this
            os.ftruncate(self._fd, 0)
            self._append(_HEADER)
        end = self.size_bytes
        begin = self._line_begin(end)
        if begin and not _is_whole(os.pread(self._fd, end - begin, begin)):
            os.ftruncate(self._fd, begin)
        return end - self.size_bytes

    def _append(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._fd, left) :]

    def _line_begin(self, end: int) -> int:
        """Where the last line begins, torn or whole, of what is before `end`; 0 where there is only the header."""
        if end == len(_HEADER):
            return 0
        at = end - 1  # its own newline
        while at > 0:
            begin = max(0, at - _BLOCK_BYTES)
            found = os.pread(self._fd, at - begin, begin).rfind(b"\n")
            if found >= 0:
                return begin + found + 1
            at = begin
        raise AssertionError("the header ends with a newline")

    def _parsed(self, line: bytes, at: int) -> Any:
        if not _is_whole(line + b"\n"):
            raise SpillError(
                f"{self.path} is damaged at byte {at}: the line's checksum is another; what comes before can be read"
            )
        return json.loads(line[_PREFIX_BYTES:])


def _open(path: Path) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
        os.close(fd)
        raise SpillError(f"{path} is no regular file of this user; name another one")
    return fd


def check(content: Any) -> None:
    """Raises TypeError or ValueError where it cannot be written."""
    try:
        json.dumps(content)
    except (TypeError, ValueError, RecursionError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"found content that is no JSON ({error}), expected text, or lists and dicts of plain values, as spill= "
            "writes it down; an SDK's objects have a method that makes such of them (model_dump(), to_dict())"
        ) from error


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()  # ASCII, no newline in it
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _is_whole(line: bytes) -> bool:
    return line.endswith(b"\n") and line[:_PREFIX_BYTES] == b"%08x " % zlib.crc32(line[_PREFIX_BYTES:-1])
