"""The memcg that `governor run --memory-max` makes for the agent, and the one that governor itself is in.

On cgroup v2 processes live in leaves only: a memcg with processes hands no controller down (the "no internal
processes" rule of Documentation/admin-guide/cgroup-v2.rst). So the agent's is made below governor's own where that
hands down memory (the root), else beside it. v1 has no such rule.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from governor import cgroup
from governor.actions.processes import remove_memcg

_PREFIX = "governor-run-"
_REMOVE_S = 1.0
_ADVICE = "as root, or with: systemd-run --user --scope -p MemoryMax=SIZE governor run ..."


class NoMemcg(Exception):
    """None can be made, or none can be read; the text says why."""


def own() -> cgroup.Memcg:
    """The memcg that this process is in; raises NoMemcg where there is none, as in the root of cgroup v2."""
    for path, v1 in _own_paths():
        try:
            memcg = cgroup.Memcg(path)
        except OSError:
            continue
        if memcg.v1 == v1:
            return memcg
        memcg.close()
    raise NoMemcg(
        f"found no memcg around this process below {cgroup.ROOT}; governor doctor shows what this machine has"
    )


def make(limit_bytes: int) -> str:
    """A new memcg with a limit (0: none), which a child of this process can enter; raises NoMemcg."""
    why_not = f"found no memory controller below {cgroup.ROOT}"
    for parent, v1 in _parents():
        _remove_abandoned(parent)
        path = f"{parent}/{_PREFIX}{os.getpid()}"
        try:
            Path(path).mkdir()
        except OSError as error:
            why_not = f"{parent}: {error.strerror}"
            continue
        try:
            if limit_bytes:
                limit_file = "memory.limit_in_bytes" if v1 else "memory.max"
                Path(path, limit_file).write_text(str(limit_bytes))
            try_to_enter(path)
        except OSError as error:
            why_not = f"{error.filename or path}: {error.strerror}"
            remove(path)
            continue
        return path
    raise NoMemcg(f"{why_not}; start it {_ADVICE}")


def remove(path: str) -> bool:
    """SIGKILL to all that is in it, and remove it; False where something does not die within a second."""
    return remove_memcg(path, _REMOVE_S)


def _own_paths() -> list[tuple[str, bool]]:
    """Where governor's own memcg may be, and whether that is v1; v1 without a cgroup namespace names the host's."""
    found: list[tuple[str, bool]] = []
    for v1 in (False, True):
        path = cgroup.memcg_of("self", v1)
        if path:
            found.append((path, v1))
            if v1 and not Path(path).exists() and _lists_us(cgroup.ROOT_V1):
                found.append((cgroup.ROOT_V1, v1))
    return found


def _lists_us(path: str) -> bool:
    try:
        return str(os.getpid()) in Path(path, "cgroup.procs").read_text().split()
    except OSError:
        return False


def _parents() -> list[tuple[str, bool]]:
    """Directories where a memcg can have a limit, best first."""
    found: list[tuple[str, bool]] = []
    for path, v1 in _own_paths():
        above = str(Path(path).parent)
        for parent in (path, above) if cgroup.is_inside(above, cgroup.ROOT_V1 if v1 else cgroup.ROOT) else (path,):
            if v1:
                if Path(parent, "memory.limit_in_bytes").exists():
                    found.append((parent, v1))
            elif "memory" in _handed_down(parent):
                found.append((parent, v1))
    return found


def _handed_down(path: str) -> list[str]:
    try:
        return Path(path, "cgroup.subtree_control").read_text().split()
    except OSError:
        return []


def try_to_enter(path: str) -> None:
    """Enter it with a child; raises OSError where that is not allowed."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            Path(path, "cgroup.procs").write_text("0")
            status = 0
        except OSError as error:
            status = error.errno or 1
        finally:
            os._exit(status)
    failed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if failed:
        raise OSError(failed, os.strerror(failed), f"{path}/cgroup.procs")


def _remove_abandoned(parent: str) -> None:
    """What killed runs left, where nothing is in it any more."""
    for path in Path(parent).glob(f"{_PREFIX}*"):
        pid = path.name.removeprefix(_PREFIX)
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            with suppress(OSError):
                path.rmdir()
