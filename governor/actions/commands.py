"""Actions that reach the agent from outside: a command in a memcg of its own, and a signal.

The memcg (64 MiB, 32 pids) is made beside governor's own, or below the cgroup root: never in the governed one. At
its end, or at the deadline, everything in it is killed at once and it is removed. Where none can be made, the command
runs in a process group: bounded in time and output, but not in memory, and what leaves the group is not found again.
A command in a container runs only where one can be made; what it has there of the machine's devices is bounded too.
"""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from governor import cgroup, inside_run
from governor.actions import device_filter
from governor.actions.processes import read_process, remove_memcg, send_by_pidfd, signal_masks
from governor.children import Child, Ended, spawn
from governor.inside import Door

MEMORY_MAX_BYTES = 64 << 20
PIDS_MAX = 32
_PREFIX = "governor-exec-"
_LIMITS = {"memory.max": MEMORY_MAX_BYTES, "pids.max": PIDS_MAX, "memory.oom.group": 1}
_REMOVE_S = 0.2  # killed processes take a moment to leave
_FIRST_TO_GO = b"1000"  # oom_score_adj: our own low one is not for commands


class Commands:
    """Runs commands; remembers where, and what is still to be removed."""

    def __init__(self, parents: list[str] | None = None) -> None:
        """`parents`: cgroup directories to make memcgs in, best first [default: see parents()]."""
        self._parents = places() if parents is None else parents
        self._number = itertools.count()
        self._left: list[str] = []

    def run(
        self,
        argv: tuple[str, ...],
        environment: dict[str, str],
        deadline_ns: int,
        what: str,
        door: Door | None = None,
    ) -> tuple[Child, str]:
        """Start a command; the child and, where it has no memcg of its own, why not. Raises OSError: no child.

        With a `door`, where that leads.
        """
        self._left = [path for path in self._left if not remove_memcg(path, 0)]
        path, why_not = self._make()
        if door and not path:
            raise OSError(f"a command in a container needs a memcg of its own: {why_not}")

        def prepare() -> bytes:
            with suppress(OSError):
                _write("/proc/self/oom_score_adj", _FIRST_TO_GO)
            try:
                if path:
                    _write(f"{path}/cgroup.procs", b"0")
            except OSError as error:
                if door:
                    raise
                return f"governor: not in a memcg of its own: {error.strerror}\n".encode()
            return b""

        try:
            if door:
                device_filter.attach(path)
                child = inside_run.start(door, argv, environment, deadline_ns, what, prepare)
            else:
                child = spawn(argv, environment, deadline_ns, what, prepare)
        except OSError:
            self._remove(path)
            raise
        if path:
            child.clean_up = self._cleaning(path)
        return child, why_not

    def sweep(self) -> list[str]:
        """Remove what commands of a killed governor left running; the memcgs removed."""
        found = [str(path) for parent in self._parents for path in Path(parent).glob(f"{_PREFIX}*")]
        return [path for path in found if _abandoned(path) and remove_memcg(path, _REMOVE_S)]

    def _make(self) -> tuple[str, str]:
        """A new memcg, or "" and why there is none."""
        own = read_process(os.getpid())
        why_not = "found no cgroup v2 that governor could use"
        for parent in self._parents:
            path = f"{parent}/{_PREFIX}{os.getpid()}-{own.start_ticks if own else 0}-{next(self._number)}"
            try:
                Path(path).mkdir()
                for name, value in _LIMITS.items():
                    _write(f"{path}/{name}", str(value).encode())
            except OSError as error:
                with suppress(OSError):
                    Path(path).rmdir()
                why_not = f"{error.filename or parent}: {error.strerror}"
            else:
                return path, ""
        return "", why_not

    def _cleaning(self, path: str) -> Callable[[bool], str]:
        def clean_up(is_dead: bool) -> str:
            try:
                events = cgroup.parse_flat_keyed(Path(path, "memory.events").read_bytes())
            except OSError:
                events = {}
            self._remove(path, _REMOVE_S if is_dead else 0)
            return f"it was over its {MEMORY_MAX_BYTES >> 20} MiB" if events.get(b"oom_kill") else ""

        return clean_up

    def _remove(self, path: str, within_s: float = _REMOVE_S) -> None:
        if path and not remove_memcg(path, within_s):
            self._left.append(path)


def places() -> list[str]:
    """Where a memcg for commands may be made: beside governor's own, then below the root of what governor sees."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    own = next((line[3:] for line in lines if line.startswith("0::/")), "/")
    if ".." in own.split("/"):  # outside the cgroup namespace
        return [cgroup.ROOT]
    return list(dict.fromkeys([str(Path(cgroup.ROOT + own).parent) if own != "/" else cgroup.ROOT, cgroup.ROOT]))


def signal_agent(pidfd: int, pid: int, name: str) -> Ended:
    """Send a named signal (as "SIGUSR1") to the agent; refused where nothing awaits it and it would end the agent.

    Raises ValueError for a name that is no signal.
    """
    try:
        number = signal.Signals[name]
    except KeyError:
        raise ValueError(f"found signal {name!r}, expected a name as SIGUSR1") from None
    if signal_masks(pid) is None:
        return Ended(1, b"the agent is gone", over_deadline=False)
    if not handles(pid, name):
        return Ended(1, f"the agent does not handle {name}: not sent".encode(), over_deadline=False)
    if not send_by_pidfd(pidfd, number):
        return Ended(1, b"the agent is gone", over_deadline=False)
    return Ended(0, b"", over_deadline=False)


def handles(pid: int, name: str) -> bool:
    """Whether a process does something else with a signal than end; raises KeyError for a name that is no signal."""
    masks = signal_masks(pid) or {}
    return any(mask >> (signal.Signals[name] - 1) & 1 for mask in masks.values())


def _write(path: str, value: bytes) -> None:
    """Write to a file that is there; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value)
    finally:
        os.close(fd)


def _abandoned(path: str) -> bool:
    """Whether the governor that made this memcg lives no more."""
    pid, _, rest = Path(path).name.removeprefix(_PREFIX).partition("-")
    start = rest.partition("-")[0]
    if not pid.isdecimal() or not start.isdecimal():
        return False
    owner = read_process(int(pid))
    return owner is None or owner.start_ticks != int(start)
