"""A download that is not whole yet: `.<name>.part` beside the file, with what is needed to go on from there.

`.<name>.part.json` says of which URL it is, and the server's word (ETag or date) for that version; without both it is
begun anew. Locked (flock) while somebody downloads. What is no regular file of this user is not written to.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Self

from governor.agent.under_way import GrowingFile


class Partial:
    """The bytes until now, in a file that is open and locked."""

    def __init__(self, path: Path, url: str) -> None:
        """Raises OSError, BlockingIOError where somebody else downloads to the same path."""
        self.path = path
        self._url = url
        self._part = path.with_name(f".{path.name}.part")
        self._about = path.with_name(f".{path.name}.part.json")
        self._fd = _opened(self._part)
        self.validator = self._known_validator()
        self._file = GrowingFile(self._fd, os.fstat(self._fd).st_size)
        if not self.validator:
            self._file.clear()

    @property
    def size_bytes(self) -> int:
        """What has come."""
        return self._file.size_bytes

    def range_headers(self) -> dict[str, str]:
        """What asks for the rest of the same version, or for all of another one."""
        if not self.size_bytes:
            return {}
        return {"Range": f"bytes={self.size_bytes}-", "If-Range": self.validator}

    def restart(self, validator: str = "") -> None:
        """Nothing is here, and this version is what comes."""
        self._file.clear()
        self.validator = validator
        with suppress(FileNotFoundError):
            self._about.unlink()
        if validator:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(self._about, flags, 0o666), "w") as about:
                json.dump({"url": self._url, "validator": validator}, about)

    def write(self, data: bytes | bytearray) -> None:
        """Append; to be called in a thread."""
        self._file.write(data)

    def finish(self) -> None:
        """It is whole: give it its name."""
        self._part.rename(self.path)
        with suppress(FileNotFoundError):
            self._about.unlink()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.size_bytes and self._is_ours():
            for path in (self._part, self._about):
                with suppress(FileNotFoundError):
                    path.unlink()
        os.close(self._fd)

    def _is_ours(self) -> bool:
        """Whether the name is still this file's: finish() gives it another."""
        return _names(self._part, self._fd)

    def _known_validator(self) -> str:
        try:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            with os.fdopen(os.open(self._about, flags)) as about:
                found = json.loads(about.read(1 << 16))
        except (OSError, ValueError):
            return ""
        known = isinstance(found, dict) and found.get("url") == self._url
        return str(found.get("validator", "")) if known else ""


def _opened(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
        try:
            _check_ours(path, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _names(path, fd):
                return fd
        except BlockingIOError:
            os.close(fd)
            raise BlockingIOError(f"{path} is being downloaded by somebody else") from None
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # it was finished between the two


def _check_ours(path: Path, fd: int) -> None:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid() or found.st_nlink > 1:
        raise OSError(f"{path} is no regular file of this user alone; remove it, or download to another path")


def _names(path: Path, fd: int) -> bool:
    try:
        named, opened = path.lstat(), os.fstat(fd)
    except FileNotFoundError:
        return False
    return (named.st_dev, named.st_ino) == (opened.st_dev, opened.st_ino)
