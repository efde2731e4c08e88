"""What the ladder remembers, kept in a file: attempts, cooldowns and what was learned survive restarts and reboots.

Written as a whole beside the file and renamed. Not synced: what must survive is our own death; what a power cut
tears is set aside at the next start, like any file that is not ours.
"""

from __future__ import annotations

import os
import re
import stat
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import orjson

from governor import instance
from governor.codec import plain, restored
from governor.model import Braked, State, TierState
from governor.pods import place_of

VERSION = 4
_LIMIT_BYTES = 1 << 20
_ABSENT_S = 86400.0  # what is younger may be of a governor that sees other cgroups
_BESIDE = re.compile(r"\.(?:state-.*\.json|mem_governor_state)\.(\d+)")
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Saved:
    """The contents of a state file; `agent` is the pid and the start in clock ticks of the process it was about."""

    target: str
    agent: tuple[int, int]
    state: State


def path_for(target: str) -> Path:
    """Where the state of a target is kept: with the agent's own data where AGENT_DATA names it."""
    if data := os.environ.get("AGENT_DATA"):
        return Path(data) / "config" / "mem_governor_state"
    slug = re.sub(r"[^A-Za-z0-9_.-]+", "-", target).strip("-.")[-180:] or "target"
    return instance.state_directory() / f"state-{slug}.json"


def save(path: Path, saved: Saved) -> None:
    """Replace the file; raises OSError."""
    values = {
        "version": VERSION,
        "boot_id": _BOOT_ID.read_text().strip(),
        "boottime_ns": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        "wall_ns": time.time_ns(),
        **plain(saved),
    }
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")  # two memcgs' may share AGENT_DATA
    with suppress(FileNotFoundError):
        beside.unlink()
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, orjson.dumps(values))
    finally:
        os.close(fd)
    beside.rename(path)


def load(path: Path, target: str) -> tuple[Saved | None, str]:
    """What was saved for this target, with times on this boot's clock; and a warning, empty if all is well.

    A file that cannot be used is renamed to `<name>.aside-<seconds>`; nothing is raised.
    """
    try:
        data = _read(path)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"{path} cannot be read ({error}): beginning anew{_set_aside(path)}"
    try:
        return _understood(orjson.loads(data), target), ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{path} is not a state of this target ({error}): beginning anew{_set_aside(path)}"


def is_left_over(path: Path) -> bool:
    """Whether a governor that was killed while it saved left it."""
    saver = _BESIDE.fullmatch(path.name)
    return bool(saver) and not Path("/proc", saver[1] if saver else "").exists()


def sweep_containers(cgroup_root: str) -> int:
    """Remove what is about containers that went while nobody looked, and never come again; how many."""
    removed = 0
    for path in instance.state_directory().glob("state-*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # not ours, or gone
            if time.time() - path.lstat().st_mtime < _ABSENT_S:
                continue
            target = orjson.loads(_read(path))["target"]
            if place_of(target.removeprefix(cgroup_root)) and not Path(target).exists():
                path.unlink()
                removed += 1
    return removed


def _understood(values: dict[str, Any], target: str) -> Saved:
    version = values.pop("version")
    boot_id, boottime_ns, wall_ns = (values.pop(name) for name in ("boot_id", "boottime_ns", "wall_ns"))
    if version != VERSION:
        raise ValueError(f"found version {version}, expected {VERSION}")
    saved: Saved = restored(Saved, values)
    if saved.target != target:
        raise ValueError(f"it is about {saved.target}, expected {target}")
    by_ns = 0 if boot_id == _BOOT_ID.read_text().strip() else _to_this_boot(int(boottime_ns), int(wall_ns))
    return replace(saved, state=_moved(saved.state, by_ns))


def _read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        is_file = stat.S_ISREG(os.fstat(fd).st_mode)
        data = os.read(fd, _LIMIT_BYTES + 1) if is_file else b""
    finally:
        os.close(fd)
    if not is_file or len(data) > _LIMIT_BYTES:
        raise ValueError(f"expected a regular file of at most {_LIMIT_BYTES} bytes")
    return data


def _set_aside(path: Path) -> str:
    aside = path.with_name(f"{path.name}.aside-{int(time.time())}")
    try:
        path.rename(aside)
    except OSError as error:
        return f"; it cannot be set aside: {error}"
    return f"; it was set aside as {aside.name}"


def _to_this_boot(boottime_ns: int, wall_ns: int) -> int:
    """What to add to a stamp of an earlier boot, by the wall clock; stamps may become negative."""
    passed_ns = max(0, time.time_ns() - wall_ns)
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - passed_ns - boottime_ns


def _moved(state: State, by_ns: int) -> State:
    """Every stamp of a state, moved."""
    if not by_ns:
        return state

    def move(value: Any) -> Any:
        names = [name for name in value.__dataclass_fields__ if name.endswith("_ns") and name != "veto_for_ns"]
        stamps = {name: getattr(value, name) for name in names}
        return replace(value, **{name: stamp + by_ns for name, stamp in stamps.items() if stamp is not None})

    moved: State = move(state)
    tiers: dict[str, TierState] = {name: move(getattr(state, name)) for name in ("compact", "recycle", "clear")}
    held: Braked | None = state.held
    return replace(moved, **tiers, held=held)  # type: ignore[arg-type]  # mypy does not look into dicts
