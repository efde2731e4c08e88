"""Finds the process that a profile means: the agent itself, behind whatever started or wraps it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from governor.profile import Match
from governor.session_files import home_of
from governor.subtree import Stat, read_stat, shares_namespace

_INTERPRETERS = ("node", "nodejs", "bun", "deno", "sh", "bash", "dash", "python*", "pypy*", "ruby", "perl")
_READ_LIMIT_BYTES = 256 << 10
_DEPTH_LIMIT = 64


class NoAgent(Exception):
    """There is no process that the profile means; the text says what there is."""


@dataclass(frozen=True, slots=True)
class Agent:
    """A process; `inner_pid` is its pid as it knows it itself, `home` where it keeps its files."""

    pid: int
    start_ticks: int
    inner_pid: int
    uid: int
    home: str
    name: str


def find_agent(match: Match, pid: int) -> Agent:
    """The process that `match` means among `pid` and what descends from it; raises NoAgent."""
    root = read_stat(pid)
    if root is None or root.ended:
        raise NoAgent(f"found no process {pid} that runs")
    found = root
    if match.process:
        children = _children()
        fitting = (stat for stat in _descent(root, children) if fits(match, stat.pid, stat.comm))
        first = next(fitting, None)
        if first is None:
            wanted = ", ".join(match.process)
            raise NoAgent(f"found process {pid} ({root.comm}), expected it or what it started to be called {wanted}")
        found = first
        if match.wrapped:
            inner = [child for child in children.get(first.pid, []) if fits(match, child.pid, child.comm)]
            found = inner[0] if inner else first
    return _agent(found)


def is_alive(agent: Agent) -> bool:
    """Whether this very process still runs."""
    stat = read_stat(agent.pid)
    return stat is not None and stat.start_ticks == agent.start_ticks and not stat.ended


def is_in_our_namespaces(pid: int) -> bool:
    """Whether paths and pids mean to a process what they mean to us."""
    try:
        return all(shares_namespace(pid, kind) for kind in ("mnt", "user", "pid"))
    except OSError:
        return False


def _agent(stat: Stat) -> Agent:
    try:
        uid = Path(f"/proc/{stat.pid}").stat().st_uid
    except OSError:
        raise NoAgent(f"process {stat.pid} has ended") from None
    home = "/" if lives_elsewhere(stat.pid) else home_of(stat.pid)
    return Agent(stat.pid, stat.start_ticks, _inner_pid(stat.pid), uid, home, stat.comm)


def lives_elsewhere(pid: int) -> bool:
    """Whether a path that it names is not one of ours; a file system of its own choice is not to be asked."""
    try:
        return not shares_namespace(pid, "mnt")
    except OSError:  # another user's, beside an ordinary one's governor
        return False


def _inner_pid(pid: int) -> int:
    """Its pid in the innermost PID namespace that it is in."""
    for line in _read(f"/proc/{pid}/status").splitlines():
        if line.startswith(b"NSpid:"):
            return int(line.split()[-1])
    return pid


def fits(match: Match, pid: int, comm: str) -> bool:
    """Whether a process is called as the profile has it."""
    names = {comm, *_names(_read(f"/proc/{pid}/cmdline").split(b"\0"))}
    return any(fnmatchcase(name, glob) for name in names for glob in match.process)


def _names(arguments: list[bytes]) -> Iterator[str]:
    """The program's name, and the script's where the program is an interpreter."""
    first = os.path.basename(os.fsdecode(arguments[0]))  # noqa: PTH119  not a path of ours
    yield first
    if any(fnmatchcase(first, glob) for glob in _INTERPRETERS):
        script = next((argument for argument in arguments[1:] if argument and not argument.startswith(b"-")), b"")
        yield os.path.basename(os.fsdecode(script))  # noqa: PTH119


def _children() -> dict[int, list[Stat]]:
    """All processes by their parent, oldest first."""
    found: dict[int, list[Stat]] = {}
    stats = [stat for entry in os.scandir("/proc") if entry.name.isdecimal() and (stat := read_stat(int(entry.name)))]
    for stat in sorted(stats, key=lambda stat: (stat.start_ticks, stat.pid)):
        if not stat.ended:
            found.setdefault(stat.parent_pid, []).append(stat)
    return found


def _descent(root: Stat, children: dict[int, list[Stat]]) -> Iterator[Stat]:
    """A process and its descendants, level by level."""
    level = [root]
    for _ in range(_DEPTH_LIMIT):
        yield from level
        level = [child for stat in level for child in children.get(stat.pid, [])]


def _read(path: str) -> bytes:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return os.read(fd, _READ_LIMIT_BYTES)
        finally:
            os.close(fd)
    except OSError:
        return b""
