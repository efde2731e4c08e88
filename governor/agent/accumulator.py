"""Rows of numbers on disk: embeddings that come one by one, or by the thousand, and are more than memory holds.

The file is NumPy's own (`.npy`, version 1.0): np.load(path, mmap_mode="r") reads it, too. Rows are written at the end
and read through maps that live as long as what was read; a process that is killed loses what was not flushed, and
half a row at the end is cut off by the next one. What is read is page cache, which the kernel takes back when it
wants: RSS may show it, what cannot be reclaimed does not grow.
"""

from __future__ import annotations

import atexit
import fcntl
import io
import logging
import os
import stat
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from governor.agent.extras import load

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_BUFFER_BYTES = 1 << 20
_HEADER_BYTES = 128  # of which NumPy leaves 21 digits for the first axis to grow in


class AccumulatorError(OSError):
    """The file is another one than expected; the text says what was found."""


_log = logging.getLogger("governor.agent")
_unclosed: weakref.WeakSet[Accumulator] = weakref.WeakSet()


class Accumulator:
    """Rows of `width` numbers; one writer at a time. Closed at the end of the process, or when nobody holds it."""

    _fd = -1

    def __init__(
        self,
        path: str | os.PathLike[str],
        width: int,
        dtype: str = "float32",
        *,
        buffer_bytes: int = _BUFFER_BYTES,
    ) -> None:
        """Goes on with what is in the file. Raises AccumulatorError, OSError, MissingExtra."""
        self._np = load("numpy", "arrays")
        self.path, self.width, self.dtype = Path(path), width, self._np.dtype(dtype)
        if width <= 0 or self.dtype.hasobject or self.dtype.itemsize == 0:
            raise ValueError(f"found width {width} and dtype {self.dtype}, expected 1 or more, and plain numbers")
        self._row_bytes = int(width * self.dtype.itemsize)
        self._buffer_bytes = buffer_bytes
        self._buffer = bytearray()
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        self._fd = os.open(self.path, flags, 0o666)
        try:
            self._rows = self._begin()
        except BaseException:
            os.close(self._fd)
            self._fd = -1
            raise
        self._pid = os.getpid()
        _unclosed.add(self)

    def append(self, rows: ArrayLike) -> None:
        """One row, or an array of them; raises ValueError for another width, OSError where the disk is full."""
        added = self._np.ascontiguousarray(rows, dtype=self.dtype)
        if added.shape == (self.width,):
            added = added[None]
        if added.ndim != 2 or added.shape[1] != self.width:
            raise ValueError(f"found shape {added.shape}, expected ({self.width},) or (any, {self.width})")
        before = len(self)
        piece = max(1, self._buffer_bytes // self._row_bytes)
        try:
            for begin in range(0, len(added), piece):  # what is large passes in pieces
                self._buffer += added[begin : begin + piece].tobytes()
                if len(self._buffer) >= self._buffer_bytes:
                    self._write()
        except BaseException:
            self._cut(before)
            raise

    def flush(self) -> None:
        """All rows to the file, and their count to its header."""
        self._write()
        self._write_at(self._header(), 0)

    def __len__(self) -> int:
        return self._rows + len(self._buffer) // self._row_bytes

    def __getitem__(self, key: int | slice) -> NDArray[Any]:
        """Read-only: a row, in memory, or rows of the file, each such slice a map and a descriptor while it lives."""
        rows = range(len(self))[key]  # raises IndexError, counts from the end
        if isinstance(rows, int):
            if rows >= self._rows:
                self._write()
            row: NDArray[Any] = self._np.frombuffer(
                os.pread(self._fd, self._row_bytes, self._offset(rows)), self.dtype
            )
            return row
        found: NDArray[Any] = self._np.empty((0, self.width), self.dtype)
        if rows:
            found = self._mapped(min(rows[0], rows[-1]), max(rows[0], rows[-1]) + 1)[:: rows.step]
        return found

    def blocks(self, rows: int = 0) -> Iterator[NDArray[Any]]:
        """All rows, so many at a time (0: what fills the buffer), with nothing of the ones before in memory."""
        step = rows or max(1, self._buffer_bytes // self._row_bytes)
        for begin in range(0, len(self), step):
            yield self[begin : begin + step]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        for block in self.blocks():
            yield from block

    def close(self) -> None:
        """As flush(), and let others use the file; what was read before stays."""
        if self._fd >= 0:
            try:
                self.flush()
            finally:
                os.close(self._fd)
                self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if self._fd >= 0 and self._pid == os.getpid():  # not in a fork: the rows are its parent's
            try:
                self.close()
            except OSError:
                _log.exception("%s: the last rows are lost", self.path)

    def _begin(self) -> int:
        """Lock the file and look what is in it: the rows that are whole."""
        found = os.fstat(self._fd)
        if not stat.S_ISREG(found.st_mode):
            raise AccumulatorError(f"{self.path} is no regular file; name another one")
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise AccumulatorError(f"{self.path} is in use by somebody who adds rows") from None
        header = os.pread(self._fd, _HEADER_BYTES, 0)
        if len(header) < _HEADER_BYTES and self._header(0).startswith(header):  # new, or killed as it wrote this
            self._write_at(self._header(0), 0)
            return 0
        self._check(header)
        rows = (found.st_size - _HEADER_BYTES) // self._row_bytes
        os.ftruncate(self._fd, self._offset(rows))
        return rows

    def _check(self, header: bytes) -> None:
        """Raises AccumulatorError where it is not the header of such rows, whatever their count."""
        format_ = self._np.lib.format
        try:
            file = io.BytesIO(header)
            version = format_.read_magic(file)
            shape, fortran, dtype = format_.read_array_header_1_0(file)
        except (ValueError, SyntaxError) as error:
            raise AccumulatorError(
                f"{self.path} is no .npy file that can grow ({error}); name another one"
            ) from error
        found = (version, file.tell(), len(shape), shape[1:], bool(fortran), dtype)
        expected = ((1, 0), _HEADER_BYTES, 2, (self.width,), False, self.dtype)
        if found != expected:
            raise AccumulatorError(
                f"{self.path}: found shape {shape} of {dtype}, expected rows of {self.width} {self.dtype}"
            )

    def _header(self, rows: int | None = None) -> bytes:
        file = io.BytesIO()
        shape = (self._rows if rows is None else rows, self.width)
        about = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        self._np.lib.format.write_array_header_1_0(file, about)
        if len(file.getvalue()) != _HEADER_BYTES:
            raise ValueError(f"found a dtype that takes {len(file.getvalue())} bytes to name, expected plain numbers")
        return file.getvalue()

    def _offset(self, rows: int) -> int:
        return _HEADER_BYTES + rows * self._row_bytes

    def _write(self) -> None:
        """What waits, all of it or nothing."""
        try:
            self._write_at(self._buffer, self._offset(self._rows))
        except BaseException:
            os.ftruncate(self._fd, self._offset(self._rows))
            raise
        self._rows = len(self)
        self._buffer = bytearray()

    def _cut(self, rows: int) -> None:
        """Forget what was added after so many rows."""
        self._buffer = self._buffer[: max(0, rows - self._rows) * self._row_bytes]
        if rows < self._rows:
            self._rows = rows
            os.ftruncate(self._fd, self._offset(rows))

    def _write_at(self, data: bytes | bytearray, offset: int) -> None:
        left = memoryview(data)
        while left:
            written = os.pwrite(self._fd, left, offset)
            offset += written
            left = left[written:]

    def _mapped(self, begin: int, end: int) -> NDArray[Any]:
        if end > self._rows:
            self._write()
        shape = (end - begin, self.width)
        with io.FileIO(self._fd, "rb", closefd=False) as file:
            return self._np.memmap(file, self.dtype, "r", self._offset(begin), shape)  # type: ignore[no-any-return]


@atexit.register
def _close_all() -> None:
    for each in list(_unclosed):
        each.__del__()
