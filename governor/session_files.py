"""Finds and opens an agent's session files without following anything that the agent could have put in the way.

Every component below a pattern's fixed part is opened relative to its parent with O_NOFOLLOW, so that no symbolic
link, swapped in at any moment, leads elsewhere. Only regular files come out; the rest is reported as skipped.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import pwd
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # NONBLOCK: a FIFO must not hang us
_WILD = "*?["
MAX_DEPTH = 32  # directories below the fixed part of a pattern


@dataclass(frozen=True, slots=True)
class Pattern:
    """A glob: the fixed part, resolved when the policy was read, and the components after it (`**`: any depth)."""

    fixed: str
    wild: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """An open regular file (`fd` is the taker's to close) or, with `fd` None, why a match was skipped."""

    path: str
    fd: int | None
    skipped: str = ""


def parse_pattern(glob: str, home: str) -> Pattern:
    """Split a glob, `~` standing for `home`; raises ValueError for one that is not absolute."""
    trusted = -1
    if glob.startswith("~/"):
        trusted = len([part for part in home.split("/") if part])  # what is below the home is the agent's own
        glob = home + glob[1:]
    if not glob.startswith("/"):
        raise ValueError(f"found archive pattern {glob!r}, expected one that begins with / or ~/")
    parts = [part for part in glob.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"found archive pattern {glob!r}, expected one without '..'")
    if not parts:
        raise ValueError(f"found archive pattern {glob!r}, expected one that names files")
    count = next((i for i, part in enumerate(parts) if any(c in part for c in _WILD)), len(parts) - 1)
    count = min(count, trusted) if trusted >= 0 else count
    return Pattern(os.path.realpath("/" + "/".join(parts[:count])), tuple(parts[count:]))


def home_of(pid: int) -> str:
    """Home of the user that a process runs as, "/" where the machine does not know the user."""
    try:
        return pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_dir
    except (OSError, KeyError):
        return "/"


def find(patterns: list[Pattern]) -> Iterator[Found]:
    """Every match once, each open."""
    seen: set[tuple[int, int]] = set()
    for pattern in patterns:
        try:
            root = _open_directory(pattern.fixed)
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Found(pattern.fixed, None, error.strerror or str(error))
            continue
        try:
            yield from _walk(root, pattern.fixed, pattern.wild, 0, seen)
        finally:
            os.close(root)


def _open_directory(path: str) -> int:
    """Open a path that had no links when the pattern was read; a link that came since raises OSError."""
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in path.split("/"):
        if part:
            outer = fd
            try:
                fd = os.open(part, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=outer)
            finally:
                os.close(outer)
    return fd


def _text(path: str) -> str:
    """A path as UTF-8 can hold it: file names are bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _walk(
    directory: int, path: str, wild: tuple[str, ...], depth: int, seen: set[tuple[int, int]]
) -> Iterator[Found]:
    part, rest = wild[0], wild[1:]
    if part == "**":
        yield from _walk(directory, path, rest or ("*",), depth, seen)
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        yield Found(path, None, error.strerror or str(error))
        return
    for name in names:
        inner = f"{path.rstrip('/')}/{_text(name)}"
        if part == "**":
            yield from _descend(directory, name, inner, wild, depth, seen)
        elif fnmatch.fnmatchcase(name, part):
            if rest:
                yield from _descend(directory, name, inner, rest, depth, seen)
            else:
                yield from _file(directory, name, inner, seen)


def _descend(
    directory: int, name: str, path: str, wild: tuple[str, ...], depth: int, seen: set[tuple[int, int]]
) -> Iterator[Found]:
    try:
        child = os.open(name, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=directory)
    except OSError:
        return  # a file, a link, or gone: nothing to descend into
    try:
        if depth >= MAX_DEPTH:
            yield Found(path, None, f"more than {MAX_DEPTH} directories deep")
        else:
            yield from _walk(child, path, wild, depth + 1, seen)
    finally:
        os.close(child)


def _file(directory: int, name: str, path: str, seen: set[tuple[int, int]]) -> Iterator[Found]:
    try:
        fd = os.open(name, _OPEN_FLAGS, dir_fd=directory)
    except OSError as error:
        reason = "a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
        yield Found(path, None, reason)
        return
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        if not stat.S_ISDIR(status.st_mode):
            yield Found(path, None, "not a regular file")
        return
    if (status.st_dev, status.st_ino) in seen:
        os.close(fd)
        return
    seen.add((status.st_dev, status.st_ino))
    yield Found(path, fd)
