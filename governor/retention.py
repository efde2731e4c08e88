"""Which archives stay: so many of a target, so many bytes of containers that are gone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from governor.cgroup import ROOT
from governor.manifest import MANIFEST_NAME, TAR_NAME, ArchiveError, names, read_manifest
from governor.pods import place_of

_PARTS = {TAR_NAME, MANIFEST_NAME}
_GONE_LIMIT = 1000  # archives of containers that are gone: all manifests are read for each new archive


@dataclass(frozen=True, slots=True)
class _Own:
    """An archive that is governor's to remove, without the names of its files: of those there are many."""

    name: str
    base: str
    target: str
    size_bytes: int  # on the disk


def prune(directory: Path, target: str, keep_count: int, keep_bytes: int, spare: str = "") -> list[str]:
    """Remove archives of a target, and of containers that are gone, of which there are enough; the names removed.

    Nothing is touched but complete archives, as governor writes them; one that cannot be removed stays. `spare` has
    just been made: it and its base are not counted among those of containers that are gone.
    """
    found = [own for name in names(directory) if (own := _own(directory, name))]
    of_target = [own for own in found if own.target == target]
    removed = [name for name in _surplus(of_target, keep_count, keep_bytes) if _remove(directory, name)]
    spared = {*removed, spare, *(own.base for own in found if own.name == spare)}
    of_gone = _surplus_of_gone([own for own in found if own.name not in spared], keep_bytes)
    return removed + [name for name in of_gone if _remove(directory, name)]


def _surplus(found: list[_Own], keep_count: int, keep_bytes: int) -> list[str]:
    """The oldest of one target, until no more than so many, with so many bytes, are left; their names, oldest first.

    The newest stays, and so does the base of every delta that stays.
    """
    keep: set[str] = set()
    kept_bytes = 0
    for number, own in enumerate(reversed(found)):
        kept_bytes += own.size_bytes
        if number and (number >= keep_count or kept_bytes > keep_bytes):
            break
        keep |= {own.name, own.base}
    return [own.name for own in found if own.name not in keep]


def _surplus_of_gone(found: list[_Own], keep_bytes: int) -> list[str]:
    """Archives of containers that are gone, until no more than so many bytes of such are left; their names.

    A container that is started again is another target, so _surplus() alone would let them grow for ever. First go
    the oldest of the pod that has most, with what is based on them: nobody's containers push out those of others.
    """
    by_pod: dict[str, list[_Own]] = {}
    for own in found:
        if (place := place_of(own.target.removeprefix(ROOT))) and not Path(own.target).exists():
            by_pod.setdefault(place.pod_uid, []).append(own)
    surplus: list[str] = []
    while (left := [own.size_bytes for of_pod in by_pod.values() for own in of_pod]) and (
        sum(left) > keep_bytes or len(left) > _GONE_LIMIT
    ):
        most = max(by_pod.values(), key=lambda of_pod: sum(own.size_bytes for own in of_pod))
        oldest = most[0].name
        surplus += [own.name for own in most if oldest in (own.name, own.base)]
        most[:] = [own for own in most if own.name not in surplus]
    return surplus


def _own(directory: Path, name: str) -> _Own | None:
    """None: somebody else's, or damaged."""
    path = directory / name
    try:
        parts = list(path.iterdir())
        if path.is_symlink() or {part.name for part in parts} != _PARTS:
            return None
        manifest = read_manifest(directory, name)
        return _Own(manifest.name, manifest.base, manifest.target, sum(part.lstat().st_size for part in parts))
    except (OSError, ArchiveError):
        return None


def _remove(directory: Path, name: str) -> bool:
    removing = directory / f".removing-{name}"  # so that nobody finds half of it
    try:
        (directory / name).rename(removing)
    except OSError:
        return False
    shutil.rmtree(removing, ignore_errors=True)
    return True
