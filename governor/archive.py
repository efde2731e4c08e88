"""Archives of session files: written as a stream, listed, verified and restored.

An archive is a directory (mode 0700) `<UTC time>-<target>-<4 hex digits>` with `session.tar.zst` and
`manifest.json`. It is written under a hidden name, synced, and renamed, so what has its final name is complete.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import secrets
import shutil
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import orjson
import zstandard

from governor.journal import encode
from governor.session_files import Found, Pattern, find

FORMAT = 1
TAR_NAME, MANIFEST_NAME = "session.tar.zst", "manifest.json"
_CHUNK_BYTES = 1 << 20
_FILE_LIMIT_BYTES = 512 << 20
_DEADLINE_S = 20.0  # then the archive is closed with what it has
_ABANDONED_S = 3600.0
_LEVEL = 1  # of zstd: the target is frozen meanwhile


class ArchiveError(Exception):
    """An archive is missing, damaged, or cannot be written; says which and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in an archive."""

    path: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive holds and why it was made."""

    name: str
    created: str  # ISO 8601, UTC
    reason: str
    target: str
    format: int = FORMAT
    facts: dict[str, Any] = field(default_factory=dict)
    files: list[Entry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # path to reason
    complete: bool = True  # False: the limit on bytes cut it short


class _Hashed(io.RawIOBase):
    """Exactly `size_bytes` of a file, hashed as they pass; zeros where the file has become shorter."""

    def __init__(self, fd: int, size_bytes: int) -> None:
        self._fd = fd
        self._left = size_bytes
        self.hash = hashlib.sha256()
        self.short_bytes = 0

    def read(self, size: int = -1) -> bytes:
        """As much as asked for: tarfile takes less for the end."""
        wanted = self._left if size < 0 else min(size, self._left)
        data = b""
        while len(data) < wanted and (chunk := os.read(self._fd, wanted - len(data))):
            data += chunk
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
) -> Manifest:
    """Write one archive and return its manifest; raises ArchiveError, leaving nothing behind."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "-", target).strip("-")[-48:] or "target"
    created = time.gmtime()
    name = f"{time.strftime('%Y%m%dT%H%M%SZ', created)}-{slug}-{secrets.token_hex(2)}"
    manifest = Manifest(name, time.strftime("%Y-%m-%dT%H:%M:%SZ", created), reason, target, facts=facts)
    building = directory / f".building-{name}"
    try:
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        _sweep(directory)
        building.mkdir(mode=0o700)
        manifest = _write_into(building, manifest, patterns, limit_bytes)
        building.rename(directory / name)
        _sync_directory(directory)
    except BaseException as error:
        shutil.rmtree(building, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise ArchiveError(
            f"cannot write an archive to {directory}: {error.strerror or error}; free space there or choose "
            "another directory with --archive-dir"
        ) from error
    return manifest


def _write_into(building: Path, manifest: Manifest, patterns: list[Pattern], limit_bytes: int) -> Manifest:
    complete = True
    entries: list[Entry] = []
    skipped: dict[str, str] = {}
    left_bytes = limit_bytes
    until = time.monotonic() + _DEADLINE_S
    with _new_file(building / TAR_NAME) as sink:
        with (
            zstandard.ZstdCompressor(level=_LEVEL).stream_writer(sink, closefd=False) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar,
        ):
            for found in find(patterns):
                if found.fd is None:
                    skipped[found.path] = found.skipped
                    continue
                try:
                    status = os.fstat(found.fd)
                    size_bytes = status.st_size
                    if why := _too_much(status, left_bytes, until):
                        skipped[found.path] = why
                        complete = False
                        continue
                    left_bytes -= size_bytes
                    entries.append(_add(tar, found, size_bytes, skipped))
                finally:
                    os.close(found.fd)
        _sync(sink)
    values = asdict(manifest) | {"files": entries, "skipped": skipped, "complete": complete}
    whole = Manifest(**values)
    with _new_file(building / MANIFEST_NAME) as sink:
        sink.write(encode(whole))
        _sync(sink)
    _sync_directory(building)
    return whole


def _too_much(status: os.stat_result, left_bytes: int, until: float) -> str:
    """Why a file is left out so that the others get in; empty if it is not."""
    if status.st_size > min(left_bytes, _FILE_LIMIT_BYTES):
        return f"{status.st_size} bytes, over what is left of the limit"
    if status.st_size > 1 << 20 and status.st_blocks * 512 < status.st_size // 16:
        return f"{status.st_size} bytes, nearly all of them holes"
    return f"not reached within {_DEADLINE_S:.0f} s" if time.monotonic() > until else ""


def _sweep(directory: Path) -> None:
    """Remove what archives that were cut off left, once nobody can be writing it any more."""
    for path in directory.glob(".building-*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_S:
            shutil.rmtree(path, ignore_errors=True)


def _add(tar: tarfile.TarFile, found: Found, size_bytes: int, skipped: dict[str, str]) -> Entry:
    assert found.fd is not None
    status = os.fstat(found.fd)
    member = tarfile.TarInfo(found.path.lstrip("/"))
    member.size, member.mtime, member.mode = size_bytes, int(status.st_mtime), status.st_mode & 0o777
    member.uid, member.gid = status.st_uid, status.st_gid
    content = _Hashed(found.fd, size_bytes)
    tar.addfile(member, content)
    if content.short_bytes:
        skipped[found.path] = f"its last {content.short_bytes} bytes: it became shorter while it was read"
    return Entry(found.path, size_bytes, content.hash.hexdigest())


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


def names(directory: Path) -> list[str]:
    """Names of all complete archives, oldest first."""
    if not directory.is_dir():
        return []
    return sorted(p.name for p in directory.glob("[!.]*") if (p / MANIFEST_NAME).is_file())


def read_manifest(directory: Path, name: str) -> Manifest:
    """The manifest of one archive; raises ArchiveError."""
    path = directory / name / MANIFEST_NAME
    if "/" in name or name.startswith(".") or not path.is_file():
        raise ArchiveError(f"found no archive {name!r} in {directory}; governor archive list shows what there is")
    try:
        values = orjson.loads(path.read_bytes())
        if values["format"] != FORMAT:
            raise ArchiveError(f"{path} has format {values['format']}, expected {FORMAT}: use a newer governor")
        return Manifest(**values | {"files": [Entry(**entry) for entry in values["files"]]})
    except (orjson.JSONDecodeError, TypeError, KeyError) as error:
        raise ArchiveError(f"{path} is damaged: {error}") from error


def _members(directory: Path, manifest: Manifest) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    path = directory / manifest.name / TAR_NAME
    try:
        with (
            path.open("rb") as packed,
            zstandard.ZstdDecompressor().stream_reader(packed) as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    raise ArchiveError(
                        f"{path} holds {member.name!r}, which is no regular file: it was tampered with"
                    )
                yield member, content  # type: ignore[misc]  # IO[bytes] is what tarfile promises
    except (OSError, tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise ArchiveError(f"{path} is damaged: {error}") from error


def _copy(content: BinaryIO, sink: Callable[[bytes], Any]) -> str:
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
        sink(chunk)
    return digest.hexdigest()


def verify(directory: Path, name: str) -> Manifest:
    """Read a whole archive and compare it with its manifest; raises ArchiveError at the first difference."""
    manifest = read_manifest(directory, name)
    expected = {entry.path.lstrip("/"): entry.sha256 for entry in manifest.files}
    for member, content in _members(directory, manifest):
        if expected.pop(member.name, None) != _copy(content, len):
            raise ArchiveError(f"archive {name}: {member.name} is not what the manifest says")
    if expected:
        raise ArchiveError(f"archive {name} lacks {', '.join(sorted(expected))}")
    return manifest


def restore(directory: Path, name: str, to: Path, overwrite: bool = False) -> list[Path]:
    """Write the files of a verified archive below `to`; the paths written.

    No symbolic link below `to` is followed: whoever owns those directories may be the one who was archived.
    Raises ArchiveError when the archive is damaged, when a link is in the way or, unless `overwrite`, when a file
    is there already; then nothing has been written.
    """
    manifest = verify(directory, name)
    names = {entry.path.lstrip("/") for entry in manifest.files}
    to.mkdir(parents=True, exist_ok=True)
    for path in names:
        if ".." in path.split("/"):
            raise ArchiveError(f"archive {name} names {path!r}, which would lead out of {to}")
        if (to / path).exists() and not overwrite:
            raise ArchiveError(f"{to / path} is there already; --overwrite replaces it")
        _check_way(to, path)
    for member, content in _members(directory, manifest):
        _restore_file(to, member, content)
    return [to / path for path in sorted(names)]


def _check_way(to: Path, path: str) -> None:
    for parent in list(Path(path).parents)[:-1]:
        if (to / parent).is_symlink():
            raise ArchiveError(f"{to / parent} is a symbolic link and would lead out of {to}; choose another --to")


def _restore_file(to: Path, member: tarfile.TarInfo, content: BinaryIO) -> None:
    *parents, last = member.name.split("/")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(to, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    partial = f".{secrets.token_hex(8)}"
    try:
        for parent in parents:
            outer = fd
            try:
                with suppress(FileExistsError):
                    os.mkdir(parent, dir_fd=outer)
                fd = os.open(parent, flags, dir_fd=outer)
            finally:
                os.close(outer)
        file_fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd)
        with os.fdopen(file_fd, "wb") as sink:
            _copy(content, sink.write)
            _sync(sink)
            if os.geteuid() == 0:
                os.fchown(file_fd, member.uid, member.gid)
            os.fchmod(file_fd, member.mode)
            os.utime(file_fd, (member.mtime, member.mtime))
        os.rename(partial, last, src_dir_fd=fd, dst_dir_fd=fd)
    except OSError as error:
        raise ArchiveError(f"cannot restore {to / member.name}: {error.strerror}") from error
    finally:
        os.close(fd)
