"""What an archive says of itself: its manifest, checked word for word when it is read."""

from __future__ import annotations

import re
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import orjson

from governor.journal import open_file, printable

FORMAT = 1
TAR_NAME, MANIFEST_NAME = "session.tar.zst", "manifest.json"
_LIMIT_BYTES = 16 << 20  # twice what the bounds of archive.py come to
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class ArchiveError(Exception):
    """An archive is missing, damaged, or cannot be written; says which and what to do."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One file in an archive; `mtime_ns` is 0 where it was too fresh to tell one content from the next."""

    path: str
    size_bytes: int
    sha256: str
    mtime_ns: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """What an archive holds and why it was made.

    With a `base` it is a delta: it holds what is new or was changed since the archive of that name in the same
    directory, which is no delta itself.
    """

    name: str
    created: str  # ISO 8601, UTC
    reason: str
    target: str
    format: int = FORMAT
    facts: dict[str, Any] = field(default_factory=dict)
    files: list[Entry] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)  # path to reason
    left_out: int = 0  # files that matched, over a limit: not all need be named in `skipped`
    complete: bool = True  # False: a limit (of bytes, files, time) cut it short
    base: str = ""


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
    where = printable(str(path))
    try:
        with open_file(path) as file:
            manifest = parse_manifest(file.read(_LIMIT_BYTES + 1))
    except (OSError, ValueError) as error:
        raise ArchiveError(f"{where} is damaged: {printable(str(error))}") from error
    if manifest.name != name:
        raise ArchiveError(f"{where} is of another archive, {printable(manifest.name)}")
    return manifest


def parse_manifest(data: bytes) -> Manifest:
    """Parse a manifest; raises ValueError for anything that governor would not have written."""
    if len(data) > _LIMIT_BYTES:
        raise ValueError(f"it is larger than {_LIMIT_BYTES >> 20} MiB, and governor writes none like that")
    values = _object(orjson.loads(data), "the manifest")
    if type(values.get("format")) is int and values["format"] != FORMAT:
        raise ValueError(f"found format {values['format']}, expected {FORMAT}: use a newer governor")
    values = _checked(Manifest, values)
    entries = [_entry(_object(entry, "an entry of files")) for entry in values.get("files", [])]
    manifest = Manifest(**values | {"files": entries})
    if not all(isinstance(why, str) for why in manifest.skipped.values()):
        raise ValueError("found a reason in skipped that is no text")
    for name in (manifest.name, *([manifest.base] if manifest.base else [])):
        if not _NAME.fullmatch(name):
            raise ValueError(f"found archive name {name!r}, which governor would not give")
    return manifest


def _entry(values: dict[str, Any]) -> Entry:
    entry = Entry(**_checked(Entry, values))
    parts = entry.path.split("/")
    if parts[0] or len(parts) < 2 or not all(parts[1:]) or {".", ".."} & set(parts) or "\0" in entry.path:
        raise ValueError(f"found path {entry.path!r}, expected an absolute one without '.' and '..'")
    if entry.size_bytes < 0 or not re.fullmatch("[0-9a-f]{64}", entry.sha256):
        raise ValueError(f"found a size or a sha256 of {entry.path!r} that cannot be")
    return entry


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"found {what} of type {type(value).__name__}, expected an object")  # noqa: TRY004  data
    return value


_TYPES = {"str": str, "int": int, "bool": bool, "dict[str, Any]": dict, "dict[str, str]": dict, "list[Entry]": list}


def _checked(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """The values, if they are the fields of a dataclass, of its types, and all that it must have."""
    wanted = {f.name: _TYPES[str(f.type)] for f in fields(kind)}
    must = [f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if odd := values.keys() - wanted.keys():
        raise ValueError(f"found {', '.join(sorted(odd))}, which means nothing there")
    if lacking := [name for name in must if name not in values]:
        raise ValueError(f"it lacks {', '.join(lacking)}")
    for name, value in values.items():
        if type(value) is not wanted[name]:
            raise ValueError(f"found {name} of type {type(value).__name__}, expected {wanted[name].__name__}")
    return values
