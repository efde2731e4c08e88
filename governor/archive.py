"""Archives of session files, written as a stream.

An archive is a directory (mode 0700) `<UTC time>-<target>-<4 hex digits>` with `session.tar.zst` and
`manifest.json`. It is written under a hidden name, synced, and renamed, so what has its final name is complete.
`manifest.py` says what the manifest holds, `restore.py` reads archives back, what callers need of both is here too;
`retention.py` removes them when there are enough newer ones.
"""

from __future__ import annotations

import errno
import hashlib
import heapq
import io
import os
import re
import secrets
import shutil
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from governor.journal import encode
from governor.manifest import MANIFEST_NAME, TAR_NAME, ArchiveError, Entry, Manifest, names, read_manifest
from governor.restore import restore, verify
from governor.session_files import CREDENTIALS, Found, Pattern, find

__all__ = [
    "ArchiveError",
    "Entry",
    "Manifest",
    "names",
    "read_manifest",
    "restore",
    "verify",
    "write",
]

_CHUNK_BYTES = 1 << 20
_FILE_LIMIT_BYTES = 512 << 20
_SPARED_RATIO, _SPARED_BYTES = 0.05, 4 << 30  # of a file system, whichever is less, stays free ...
_SMALL_PARTS = 16  # ... but for an archive that takes no more than such a part of what is free
_FULL = "less than 5 % or 4 GiB of the file system would be left free"
_FILES_LIMIT = 10_000  # of an archive; as many are named as skipped
_NAMES_LIMIT_BYTES = 2 << 20  # of either, escaped, as a manifest has them
_NEWEST = 100  # beyond those limits: the session that is being written is one of these
_NEWEST_NAMES_BYTES = 1 << 20
_NEWEST_S = 5.0  # to add them, beyond the deadline
_DEADLINE_S = 20.0  # then the archive is closed with what it has
_ABANDONED_S = 3600.0
_FRESH_NS = 20_000_000  # of a time stamp: the kernel's own steps are up to 10 ms
_TOO_MANY = f"one of more than {_FILES_LIMIT} files or {_NAMES_LIMIT_BYTES >> 20} MiB of names"
_LEVEL = 1  # of zstd: the target is frozen meanwhile


@dataclass(slots=True)
class _Contents:
    """What goes into an archive, as it is found; with bounds, as all of it is kept in memory."""

    place: Path
    left_bytes: int
    may_lack: bool  # what the file system has no room for: there is no other place
    entries: list[Entry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: int = 0
    complete: bool = True
    taken_bytes: int = 0
    names_bytes: int = 0
    skipped_bytes: int = 0
    is_short_of_room: bool = False

    def check_room(self, size_bytes: int) -> str:
        """Why the file system has no room for so much, "" if it has; raises OSError where there is another place."""
        found = os.statvfs(self.place)
        free_bytes = found.f_bavail * found.f_frsize
        if not found.f_blocks:
            return ""  # without a limit, as a tmpfs of size=0
        spared_bytes = min(found.f_blocks * found.f_frsize * _SPARED_RATIO, _SPARED_BYTES)
        is_small = self.taken_bytes + size_bytes <= free_bytes // _SMALL_PARTS
        if is_small or size_bytes <= free_bytes - spared_bytes:
            return ""
        self.is_short_of_room = True
        if not self.may_lack:
            raise OSError(errno.ENOSPC, _FULL)
        return f"{size_bytes} bytes: {_FULL}"

    def has_room(self, path: str, newest: bool = False) -> bool:
        """Whether one more file may be added."""
        count, names_bytes = (_NEWEST, _NEWEST_NAMES_BYTES) if newest else (0, 0)
        is_short_enough = self.names_bytes + len(ascii(path)) <= _NAMES_LIMIT_BYTES + names_bytes
        return is_short_enough and len(self.entries) < _FILES_LIMIT + count

    def add(self, entry: Entry) -> None:
        self.names_bytes += len(ascii(entry.path))
        self.left_bytes -= entry.size_bytes
        self.taken_bytes += entry.size_bytes
        self.entries.append(entry)

    def skip(self, path: str, why: str) -> None:
        """Name what is not there, while there is room for that."""
        if self.can_name:
            self.skipped_bytes += len(ascii(path)) + len(ascii(why))
            self.skipped[path] = why

    def leave_out(self, path: str, why: str) -> None:
        self.skip(path, why)
        self.left_out += 1
        self.complete = False

    @property
    def can_name(self) -> bool:
        return len(self.skipped) < _FILES_LIMIT and self.skipped_bytes < _NAMES_LIMIT_BYTES


class _Hashed(io.RawIOBase):
    """Exactly `size_bytes` of a file, hashed as they pass; zeros where the file has become shorter, or unreadable."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._left = size_bytes
        self.hash = hashlib.sha256()
        self.short_bytes = 0
        self.why_short = "it became shorter while it was read"

    def read(self, size: int = -1) -> bytes:
        """As much as asked for: tarfile takes less for the end."""
        wanted = self._left if size < 0 else min(size, self._left)
        data = b""
        try:
            while len(data) < wanted and (chunk := os.read(self._fd, wanted - len(data))):
                data += chunk
        except OSError as error:  # of the agent's file system: no reason to lose the other files
            self.why_short = error.strerror or str(error)
        self.short_bytes += wanted - len(data)
        data = data.ljust(wanted, b"\0")
        self._left -= wanted
        self.hash.update(data)
        return data


def write(
    directory: Path,
    patterns: list[Pattern],
    reason: str,
    target: str,
    facts: dict[str, Any],
    limit_bytes: int,
    *,
    exclude: tuple[str, ...] = CREDENTIALS,
    since: Manifest | None = None,
    fallbacks: list[Path] | None = None,
    matches: Callable[[], Iterable[Found]] | None = None,
) -> Manifest:
    """Write one archive and return its manifest; raises ArchiveError, leaving nothing behind.

    `exclude` are globs as in session_files.find. With `since`, a full archive in the same directory, only what is new
    or has changed goes in; where nothing has, no archive is made and `since` itself is returned. Where that archive
    is elsewhere, everything goes in. Where `directory` cannot be written, or would be filled up, the `fallbacks` are
    tried in order; then `facts["fallback"]` holds the directory and what was wrong with the others. Where none has
    room for all, what would fill it up is left out where most is free. `matches` finds the files where `patterns` are
    not to be looked for here.
    """
    if since and since.base:
        raise ValueError(f"{since.name} is a delta itself: a delta needs a full archive")
    found = matches or (lambda: find(patterns, exclude))
    refused: dict[str, str] = {}
    places = [directory, *(fallbacks or [])]

    def attempt(place: Path, may_lack: bool) -> Manifest | None:
        others = {name: why for name, why in refused.items() if name != str(place)}
        told = {"fallback": {"directory": str(place), "refused": others}} if others else {}
        try:
            base = since if since and (place / since.name / MANIFEST_NAME).is_file() else None
            manifest = _new_manifest(reason, target, facts | told, base)
            return _write_to(place, found, manifest, limit_bytes, base, may_lack)
        except OSError as error:
            refused[str(place)] = error.strerror or str(error)
            return None

    for place in places:
        if made := attempt(place, may_lack=False):
            return made
    tight = [place for place in places if refused[str(place)] == _FULL]
    if tight and (made := attempt(max(tight, key=_free_bytes), may_lack=True)):
        return made
    causes = "; ".join(f"{place}: {why}" for place, why in refused.items())
    raise ArchiveError(
        f"cannot write an archive to {causes}; free space there or choose another directory with --archive-dir"
    )


def _free_bytes(place: Path) -> int:
    found = os.statvfs(place)
    return found.f_bavail * found.f_frsize


def _new_manifest(reason: str, target: str, facts: dict[str, Any], base: Manifest | None) -> Manifest:
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", target).strip("-")[-48:] or "target"
    now = datetime.now(UTC)
    name = f"{now:%Y%m%dT%H%M%S}.{now.microsecond // 1000:03}Z-{slug}-{secrets.token_hex(2)}"
    created = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Manifest(name, created, reason, target, facts=facts, base=base.name if base else "")


def _write_to(
    directory: Path,
    matches: Callable[[], Iterable[Found]],
    manifest: Manifest,
    limit_bytes: int,
    base: Manifest | None,
    may_lack: bool,
) -> Manifest:
    building = directory / f".building-{manifest.name}"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(directory)
        building.mkdir(mode=0o700)
        contents = _Contents(directory, limit_bytes, may_lack)
        known = {entry.path: entry for entry in base.files} if base else {}
        with _new_file(building / TAR_NAME) as sink:
            with (
                zstandard.ZstdCompressor(level=_LEVEL).stream_writer(sink, closefd=False) as packed,
                tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
            ):
                _fill(tar, matches(), contents, known)
            _sync(sink)
        whole = replace(
            manifest,
            files=contents.entries,
            skipped=contents.skipped,
            left_out=contents.left_out,
            complete=contents.complete,
        )
        if base and not whole.files and _lacks(whole) == _lacks(base):
            shutil.rmtree(building)
            return base
        with _new_file(building / MANIFEST_NAME) as sink:
            sink.write(encode(whole))
            _sync(sink)
        _sync_directory(building)
        building.rename(directory / manifest.name)
        _sync_directory(directory)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return whole


def _lacks(manifest: Manifest) -> tuple[dict[str, str], int, bool]:
    return manifest.skipped, manifest.left_out, manifest.complete


def _fill(tar: tarfile.TarFile, matches: Iterable[Found], contents: _Contents, known: dict[str, Entry]) -> None:
    until = time.monotonic() + _DEADLINE_S
    newest: list[tuple[int, int, Found]] = []  # of those there is no room for; a heap, the oldest first, all open
    try:
        for number, found in enumerate(_searched(matches)):
            if found.is_cut_short:
                contents.complete = False
                contents.skipped[found.path] = found.skipped
            elif found.fd is None:
                contents.skip(found.path, found.skipped)
            elif contents.has_room(found.path):
                _take(tar, found, contents, known, until)
            else:
                heapq.heappush(newest, (os.fstat(found.fd).st_mtime_ns, number, found))
                if len(newest) > _NEWEST:
                    _leave_out(heapq.heappop(newest)[2], contents, known, until)
            if time.monotonic() > until and not contents.can_name:
                contents.complete = False
                break
        newest.sort()
        while newest:
            *_, found = newest.pop()
            if contents.has_room(found.path, newest=True):
                _take(tar, found, contents, known, until + _NEWEST_S)
            else:
                _leave_out(found, contents, known, until)
    finally:
        for *_, found in newest:
            os.close(_fd(found))
    if contents.is_short_of_room and not contents.entries:
        raise OSError(errno.ENOSPC, _FULL)


def _searched(matches: Iterable[Found]) -> Iterator[Found]:
    try:
        yield from matches
    except MemoryError:
        yield Found("/", None, "the search was cut short: there are too many names", is_cut_short=True)


def _fd(found: Found) -> int:
    assert found.fd is not None
    return found.fd


def _take(tar: tarfile.TarFile, found: Found, contents: _Contents, known: dict[str, Entry], until: float) -> None:
    """Add an open file and close it, unless it is as it was before or too much."""
    fd = _fd(found)
    try:
        status = os.fstat(fd)
        if _unchanged(fd, status, known.get(found.path), until):
            return
        if why := _too_much(status, contents.left_bytes, until) or contents.check_room(status.st_size):
            contents.leave_out(found.path, why)
        else:
            contents.add(_add(tar, found, status, contents))
    finally:
        os.close(fd)


def _leave_out(found: Found, contents: _Contents, known: dict[str, Entry], until: float) -> None:
    """Close a file that there is no room for; one that is as it was before needs none."""
    fd = _fd(found)
    try:
        if not _unchanged(fd, os.fstat(fd), known.get(found.path), until):
            contents.leave_out(found.path, _TOO_MANY)
    finally:
        os.close(fd)


def _unchanged(fd: int, status: os.stat_result, before: Entry | None, until: float) -> bool:
    """Whether a file is as it was archived before: by size and time stamp, else, if there is time, by content."""
    if before is None or before.size_bytes != status.st_size:
        return False
    if before.mtime_ns and before.mtime_ns == status.st_mtime_ns:
        return True
    digest, offset = hashlib.sha256(), 0
    try:
        while chunk := os.pread(fd, min(_CHUNK_BYTES, status.st_size - offset), offset):
            digest.update(chunk)
            offset += len(chunk)
            if time.monotonic() > until:
                return False
    except OSError:
        return False
    return digest.hexdigest() == before.sha256


def _too_much(status: os.stat_result, left_bytes: int, until: float) -> str:
    """Why a file is left out so that the others get in; empty if it is not."""
    if status.st_size > min(left_bytes, _FILE_LIMIT_BYTES):
        return f"{status.st_size} bytes, over what is left of the limit"
    if status.st_size > 1 << 20 and status.st_blocks * 512 < status.st_size // 16:
        return f"{status.st_size} bytes, nearly all of them holes"
    return f"not reached within {_DEADLINE_S:.0f} s" if time.monotonic() > until else ""


def _sweep(directory: Path) -> None:
    """Remove what archives that were cut off left, once nobody can be at work on it any more."""
    for path in (*directory.glob(".building-*"), *directory.glob(".removing-*")):
        with suppress(FileNotFoundError):  # somebody else sweeps here too
            if time.time() - path.stat().st_mtime > _ABANDONED_S:
                shutil.rmtree(path, ignore_errors=True)


def _add(tar: tarfile.TarFile, found: Found, status: os.stat_result, contents: _Contents) -> Entry:
    member = tarfile.TarInfo(found.path.lstrip("/"))
    member.size, member.mtime, member.mode = status.st_size, int(status.st_mtime), status.st_mode & 0o777
    member.uid, member.gid = status.st_uid, status.st_gid
    content = _Hashed(_fd(found), status.st_size)
    fresh = time.time_ns() - status.st_mtime_ns < _FRESH_NS  # it may change again and keep this time stamp
    tar.addfile(member, content)
    if content.short_bytes:
        contents.skip(found.path, f"its last {content.short_bytes} bytes: {content.why_short}")
    mtime_ns = 0 if fresh or content.short_bytes else status.st_mtime_ns
    return Entry(found.path, status.st_size, content.hash.hexdigest(), mtime_ns)


def _new_file(path: Path) -> BinaryIO:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.fdopen(fd, "wb", buffering=_CHUNK_BYTES)


def _sync(sink: BinaryIO) -> None:
    sink.flush()
    os.fsync(sink.fileno())


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
