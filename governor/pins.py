"""Where the pinned BPF objects of an instance live, and whether they are of this version of the programs.

Layout: `/sys/fs/bpf/governor/<instance>/<version>/<module>/<object>`. A version directory appears in one rename,
so what is there is complete; directories of other versions are leftovers of an upgrade. Unpinning detaches.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

BPFFS = Path("/sys/fs/bpf")
INSTANCES = BPFFS / "governor"
MODULES = ("charge", "stall", "victim")
REQUIRED_MODULE = "charge"
_INSTANCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")  # bpffs refuses dots


def check_instance(name: str) -> str:
    """The name if it can be a directory in bpffs; raises ValueError."""
    if not _INSTANCE.fullmatch(name):
        raise ValueError(
            f"found instance name {name!r}, expected up to 64 letters, digits, '-' or '_', beginning with "
            "a letter or digit"
        )
    return name


def sources() -> Path:
    """The directory of the BPF sources: in the wheel beside this file, in a checkout beside the package."""
    package = Path(__file__).resolve().parent
    installed = package / "bpf"
    return installed if installed.is_dir() else package.parent / "bpf"


def program_version() -> str:
    """Twelve hex digits that change with any change to the BPF sources."""
    digest = hashlib.sha256()
    for path in sorted(p for p in sources().iterdir() if p.suffix in (".c", ".h")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def instances() -> list[str]:
    """All instances with pins of any version."""
    return sorted(path.name for path in INSTANCES.iterdir()) if INSTANCES.is_dir() else []


def current(instance: str) -> Path | None:
    """The directory of an instance's pins of this version, None when it has none."""
    path = INSTANCES / instance / program_version()
    return path if path.is_dir() else None


def attached(pins: Path) -> dict[str, str]:
    """For each module that is attached, how: "fentry" or "kprobe"."""
    return {
        module: next((link.name.split("-")[1] for link in (pins / module).glob("link-*")), "detached")
        for module in MODULES
        if (pins / module).is_dir()
    }


def remove(path: Path) -> None:
    """Remove a directory of pins; the kernel detaches and frees what nobody else holds."""
    for entry in path.iterdir():
        if entry.is_dir():
            remove(entry)
        else:
            entry.unlink()
    path.rmdir()


def unload(instance: str) -> bool:
    """Remove an instance with all its versions; False when there was none."""
    path = INSTANCES / instance
    if not path.is_dir():
        return False
    remove(path)
    if not any(INSTANCES.iterdir()):
        INSTANCES.rmdir()
    return True


def remove_other_versions(instance: str) -> list[str]:
    """Remove an instance's pins that another version of the programs left; their names."""
    parent = INSTANCES / instance
    stale = [p for p in parent.iterdir() if p.name != program_version()] if parent.is_dir() else []
    for path in stale:
        remove(path)
    return [path.name for path in stale]
