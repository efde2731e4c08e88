"""Files on disk for what is too large for memory, gone when they are closed; what killed processes left is removed.

They are in a directory of this user (mode 0700) below TMPDIR, /var/tmp or /tmp. All of these are shared: a directory
that is another user's or that others may enter is not used, nothing that is linked is followed, and only what bears
our names, is a regular file of this user, has one name, is old and is locked by nobody is ever removed. A file is
locked (flock) as long as somebody uses it, in whatever container. tmpfs comes last: what is there is memory.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from governor.agent.in_thread import in_thread
from governor.agent.under_way import GrowingFile

DEFAULT_LIMIT_BYTES = 4 << 30
STALE_S = 3600.0
_NAME = re.compile(r"spool-[0-9a-f]{16}", re.ASCII)
_MOUNTS = Path("/proc/self/mountinfo")
_log = logging.getLogger("governor.agent")


class SpoolError(OSError):
    """No directory can be used, or the spool is full; the text says what was found and what to do."""


class Spool:
    """One file: written at its end, read anywhere, removed by close()."""

    def __init__(
        self,
        *,
        limit_bytes: int = DEFAULT_LIMIT_BYTES,
        directory: str | os.PathLike[str] | None = None,
        stale_s: float = STALE_S,
    ) -> None:
        """Below `directory`, or where there is room; removes what is stale. Raises OSError."""
        self.limit_bytes = limit_bytes
        self.path, self._directory_fd = _own_directory(directory)
        try:
            _sweep(self._directory_fd, stale_s)
            self._name, self._fd = _create(self._directory_fd)
        except BaseException:
            os.close(self._directory_fd)
            raise
        self.path /= self._name
        self._file = GrowingFile(self._fd)

    @property
    def size_bytes(self) -> int:
        """What was written."""
        return self._file.size_bytes

    def write(self, data: bytes) -> None:
        """Append; raises SpoolError before it would be larger than its limit."""
        if self.size_bytes + len(data) > self.limit_bytes:
            raise SpoolError(
                f"found more than {self.limit_bytes:,} bytes, the spool's limit; raise limit_bytes, or ask for less"
            )
        self._file.write(data)

    async def write_async(self, data: bytes) -> None:
        """As write(), in a thread: a disk may be slow."""
        await in_thread(self.write, data)

    def read(self, size_bytes: int, offset: int) -> bytes:
        """As os.pread: less at the end, nothing after it."""
        return os.pread(self._fd, size_bytes, offset)

    def close(self) -> None:
        """Remove the file."""
        if self._fd >= 0:
            with suppress(FileNotFoundError):
                if _is_same(self._fd, self._directory_fd, self._name):
                    os.unlink(self._name, dir_fd=self._directory_fd)
            os.close(self._fd)
            os.close(self._directory_fd)
            self._fd = self._directory_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def sweep(directory: str | os.PathLike[str] | None = None, stale_s: float = STALE_S) -> list[str]:
    """Remove what processes that are gone left, `stale_s` or longer ago; the names. Every new Spool does it."""
    _, fd = _own_directory(directory)
    try:
        return _sweep(fd, stale_s)
    finally:
        os.close(fd)


def _own_directory(base: str | os.PathLike[str] | None) -> tuple[Path, int]:
    """The first that can be used, and it opened."""
    bases = [Path(base)] if base is not None else _bases()
    refused: list[str] = []
    for each in bases:
        path = each / f"governor-agent-{os.geteuid()}"
        try:
            with suppress(FileExistsError):
                path.mkdir(mode=0o700)
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            refused.append(f"{path}: {error.strerror}")
            continue
        found = os.fstat(fd)
        if found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            if base is None and _is_memory(path):
                _log.warning("%s is memory (tmpfs): what is spooled there counts; set TMPDIR to a disk", path)
            return path, fd
        os.close(fd)
        refused.append(
            f"{path}: found user {found.st_uid}'s, mode {stat.S_IMODE(found.st_mode):o}, expected ours, 700"
        )
    raise SpoolError(f"no directory for a spool: {'; '.join(refused)}; name another with directory= or TMPDIR")


def _bases() -> list[Path]:
    found = [Path(name) for name in (os.environ.get("TMPDIR"), "/var/tmp", "/tmp") if name]  # noqa: S108  see above
    return sorted(dict.fromkeys(found), key=_is_memory)


def _is_memory(path: Path) -> bool:
    """Whether it is on a tmpfs, whose pages are charged to the memcg and cannot be reclaimed; False if unknown."""
    try:
        device = path.stat().st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        mounts = [line.split(" - ") for line in os.fsdecode(_MOUNTS.read_bytes()).split("\n") if line]
    except OSError:
        return False
    return any(left.split()[2] == wanted and right.split()[0] in ("tmpfs", "ramfs") for left, right in mounts)


def _create(directory_fd: int) -> tuple[str, int]:
    while True:
        name = f"spool-{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(name, flags, 0o600, dir_fd=directory_fd)
        with suppress(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(fd).st_nlink:
                return name, fd
        os.close(fd)  # somebody who sweeps everything was between the two


def _sweep(directory_fd: int, stale_s: float) -> list[str]:
    return [
        name for name in os.listdir(directory_fd) if _NAME.fullmatch(name) and _remove(directory_fd, name, stale_s)
    ]


def _remove(directory_fd: int, name: str, stale_s: float) -> bool:
    """Whether it was ours, old and nobody's. What becomes another file meanwhile is let be."""
    try:
        if not stat.S_ISREG(os.stat(name, dir_fd=directory_fd, follow_symlinks=False).st_mode):
            return False  # to open a device may do something
        with _opened(name, directory_fd) as fd:
            found = os.fstat(fd)
            ours = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and found.st_nlink == 1
            if not ours or time.time() - found.st_mtime < stale_s:
                return False
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_same(fd, directory_fd, name):
                return False
            os.unlink(name, dir_fd=directory_fd)
            return True
    except OSError:  # in use, gone, or not for us
        return False


@contextmanager
def _opened(name: str, directory_fd: int) -> Iterator[int]:
    fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
    try:
        yield fd
    finally:
        os.close(fd)


def _is_same(fd: int, directory_fd: int, name: str) -> bool:
    opened, named = os.fstat(fd), os.stat(name, dir_fd=directory_fd, follow_symlinks=False)
    return (opened.st_dev, opened.st_ino) == (named.st_dev, named.st_ino)
