"""Archives read back: verified, and their files written below a directory. A delta comes with its base."""

from __future__ import annotations

import hashlib
import os
import secrets
import tarfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import zstandard

from governor.journal import open_file, printable
from governor.manifest import TAR_NAME, ArchiveError, Manifest, read_manifest

_CHUNK_BYTES = 1 << 20


def verify(directory: Path, name: str) -> Manifest:
    """Read a whole archive, and its base, and compare with the manifests; raises ArchiveError at a difference."""
    manifest = read_manifest(directory, name)
    if manifest.base:
        if read_manifest(directory, manifest.base).base:
            raise ArchiveError(f"archive {name} has a base that is a delta itself: it was tampered with")
        verify(directory, manifest.base)
    expected = {entry.path.lstrip("/"): entry.sha256 for entry in manifest.files}
    for member, content in _members(directory, manifest):
        if expected.pop(member.name, None) != _copy(content, len):
            raise ArchiveError(f"archive {name}: {printable(member.name)} is not what the manifest says")
    if expected:
        raise ArchiveError(f"archive {name} lacks {printable(', '.join(sorted(expected)))}")
    return manifest


def restore(directory: Path, name: str, to: Path, overwrite: bool = False) -> list[Path]:
    """Write the files of a verified archive below `to`, those of its base that it does not replace included.

    Returns the paths written: of a file that became a directory, or the other way round, what it was last.
    No symbolic link below `to` is followed: whoever owns those directories may be the one who was archived.
    Raises ArchiveError when the archive is damaged, when a link or something that is no directory is in the way or,
    unless `overwrite`, when a file is there already; then nothing has been written.
    """
    manifest = verify(directory, name)
    parts = [manifest, *([read_manifest(directory, manifest.base)] if manifest.base else [])]
    wanted = _latest(parts)
    try:
        to.mkdir(parents=True, exist_ok=True)
        for path in wanted:
            _check_way(to, path, overwrite)
    except OSError as error:
        raise ArchiveError(f"cannot restore to {printable(str(to))}: {error.strerror}") from error
    for part in parts:
        for member, content in _members(directory, part):
            if wanted.get(member.name) == part.name:
                _restore_file(to, member, content)
    return [to / path for path in sorted(wanted)]


def _latest(parts: list[Manifest]) -> dict[str, str]:
    """Path to the name of the archive it is restored from; the newest comes first.

    What was a file and is a directory by now, or the other way round, is what it was last.
    """
    wanted: dict[str, str] = {}
    directories: set[str] = set()
    for part in parts:
        for entry in reversed(part.files):
            path = entry.path.lstrip("/")
            above = [str(parent) for parent in Path(path).parents][:-1]
            if path not in directories and wanted.keys().isdisjoint((path, *above)):
                wanted[path] = part.name
                directories.update(above)
    return wanted


def _members(directory: Path, manifest: Manifest) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    path = directory / manifest.name / TAR_NAME
    try:
        with (
            open_file(path) as packed,
            zstandard.ZstdDecompressor().stream_reader(packed) as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            for member in tar:
                content = tar.extractfile(member)
                if content is None:
                    raise ArchiveError(
                        f"{path} holds {printable(member.name)}, which is no regular file: it was tampered with"
                    )
                yield member, content  # type: ignore[misc]  # IO[bytes] is what tarfile promises
    except (OSError, tarfile.TarError, zstandard.ZstdError, EOFError) as error:
        raise ArchiveError(f"{path} is damaged: {printable(str(error))}") from error


def _copy(content: BinaryIO, sink: Callable[[bytes], Any]) -> str:
    digest = hashlib.sha256()
    while chunk := content.read(_CHUNK_BYTES):
        digest.update(chunk)
        sink(chunk)
    return digest.hexdigest()


def _check_way(to: Path, path: str, overwrite: bool) -> None:
    if (to / path).exists() and not overwrite:
        raise ArchiveError(f"{printable(str(to / path))} is there already; --overwrite replaces it")
    if (to / path).is_dir() and not (to / path).is_symlink():
        raise ArchiveError(f"{printable(str(to / path))} is a directory, which no file replaces; choose another --to")
    for parent in list(Path(path).parents)[:-1]:
        where = printable(str(to / parent))
        if (to / parent).is_symlink():
            raise ArchiveError(f"{where} is a symbolic link and would lead out of {to}; choose another --to")
        if (to / parent).exists() and not (to / parent).is_dir():
            raise ArchiveError(f"{where} is no directory; choose another --to")


def _restore_file(to: Path, member: tarfile.TarInfo, content: BinaryIO) -> None:
    *parents, last = member.name.split("/")
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(to, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    partial = f".{secrets.token_hex(8)}"
    try:
        for parent in parents:
            with suppress(FileExistsError):
                os.mkdir(parent, dir_fd=fd)
            outer, fd = fd, os.open(parent, flags, dir_fd=fd)
            os.close(outer)
        file_fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=fd)
        with os.fdopen(file_fd, "wb") as sink:
            _copy(content, sink.write)
            sink.flush()
            os.fsync(file_fd)
            if os.geteuid() == 0:
                os.fchown(file_fd, member.uid, member.gid)
            os.fchmod(file_fd, member.mode & 0o777)
            os.utime(file_fd, (member.mtime, member.mtime))
        os.rename(partial, last, src_dir_fd=fd, dst_dir_fd=fd)
    except (OSError, OverflowError, ValueError) as error:  # no owner, time or name that could be
        raise ArchiveError(f"cannot restore {printable(str(to / member.name))}: {error}") from error
    finally:
        os.close(fd)
