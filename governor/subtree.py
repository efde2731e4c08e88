"""Processes as /proc/PID/stat shows them; and an agent's own, where its memcg may not be frozen: who they are, and
signals that reach exactly them.

A process is a pid and the start ticks of /proc/PID/stat. Never stopped: governor's own processes, what they descend
from, and process 1. Imported by the real-time process.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import NamedTuple

_SHELLS = {"sh", "bash", "dash", "ash", "busybox"}  # may go on after what they started
RUN_COMM = "governor-run"  # as `governor run` calls itself
# Start one program and wait for it: SIGTERM is for what they started.
WRAPPERS = _SHELLS | {
    *(RUN_COMM, "tini", "dumb-init", "docker-init", "catatonit"),
    *("npm", "sudo", "su", "env", "timeout", "nohup", "script"),
}
_READ_BYTES = 65536
DEPTH_LIMIT = 256
_FIRST_PID_NAMESPACE = 0xEFFFFFFC  # PROC_PID_INIT_INO of linux/proc_ns.h: the machine's


class Stat(NamedTuple):
    """What /proc/PID/stat says; start in clock ticks since boot, the groups in our PID namespace."""

    pid: int
    parent_pid: int
    start_ticks: int
    state: str  # one letter; T: stopped, t: traced, Z: ended
    comm: str
    group: int
    terminal: int  # device number, 0: none
    foreground_group: int  # of the terminal
    flags: int  # linux/sched.h, PF_...
    rss_pages: int

    @property
    def ended(self) -> bool:
        """Whether it only waits to be waited for."""
        return self.state in "ZX"

    @property
    def stopped(self) -> bool:
        """Whether it cannot run now anyway, and waking it up is somebody else's right."""
        return self.state in "TtZX"


def parse_stat(pid: int, data: bytes) -> Stat | None:
    """A line of /proc/PID/stat; the name in it may hold anything. None for what is none."""
    head, _, tail = data.rpartition(b")")
    fields = tail.split()
    if len(fields) < 22:
        return None
    parent_pid, group, _, terminal, foreground_group, flags = map(int, fields[1:7])
    comm = head.partition(b"(")[2].decode(errors="replace")
    groups = (group, terminal, foreground_group)
    return Stat(pid, parent_pid, int(fields[19]), fields[0].decode(), comm, *groups, flags, int(fields[21]))


def read_stat(pid: int) -> Stat | None:
    """One process; None when it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)  # half of what a file object takes for it
        try:
            return parse_stat(pid, os.read(fd, 4096))
        finally:
            os.close(fd)
    except OSError:
        return None


def comm_of(pid: int) -> str:
    """What a process calls itself; "" when it is gone."""
    stat = read_stat(pid)
    return stat.comm if stat else ""


def shares_namespace(pid: int, kind: str) -> bool:
    """Whether a process is in the same namespace as this one: "mnt", "user" ... (/proc/PID/ns). Raises OSError."""
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino == os.stat(f"/proc/self/ns/{kind}").st_ino  # noqa: PTH116


def ancestors(pid: int) -> list[int]:
    """A process and those that it descends from, the nearest 256: a container can make a chain of thousands."""
    chain = {pid: None}
    last = pid
    while len(chain) < DEPTH_LIMIT and (stat := read_stat(last)) and stat.parent_pid and stat.parent_pid not in chain:
        last = stat.parent_pid
        chain[last] = None
    return list(chain)


def memcg_pids(path: str) -> list[int]:
    """Pids of all processes in a memcg and the memcgs below it; those outside our PID namespace are left out."""
    pids: list[int] = []
    directories = [path]
    while directories:
        directory = directories.pop()
        try:
            pids += [int(pid) for pid in _whole(f"{directory}/cgroup.procs").split() if pid != b"0"]
            if os.stat(directory).st_nlink == 2:  # noqa: PTH116  nothing is below, and 70 files need not be listed
                continue
            with os.scandir(directory) as entries:
                directories += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
    return pids


def _whole(path: str) -> bytes:
    """All of a file that may be long; raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return b"".join(iter(lambda: os.read(fd, _READ_BYTES), b""))
    finally:
        os.close(fd)


def descendants(root_pid: int, without_pid: int = 0) -> list[Stat]:
    """All that descend from a process, wherever they are, parents first; without a process and its descendants."""
    with os.scandir("/proc") as entries:
        found = _read({int(entry.name) for entry in entries if entry.name.isdecimal()})
    left_out = {root_pid, *(_descent(found, without_pid) if without_pid else ())}
    return [found[pid] for pid in _descent(found, root_pid) if pid in found and pid not in left_out]


def members(root_pid: int, memcg_path: str, governor_pid: int) -> list[Stat]:
    """An agent and all that descends from it in the memcg, parents first; empty while it is not known (0).

    Without those that are not to be touched.
    """
    if root_pid <= 0:
        return []
    found = _read(set(memcg_pids(memcg_path)))
    untouchable = _untouchable(found, governor_pid, root_pid)
    return [found[pid] for pid in _descent(found, root_pid) if pid in found and pid not in untouchable]


def oldest_other(memcg_path: str, governor_pid: int) -> Stat | None:
    """The oldest process of a memcg, without those that are not to be touched; None when there is no other.

    In a container that is process 1, unless it merely started the agent.
    """
    found = _read(set(memcg_pids(memcg_path)))
    first = found.get(1)
    if first and in_container() and not is_wrapper(first.pid, first.comm):
        return first
    untouchable = _untouchable(found, governor_pid)
    running = [stat for stat in found.values() if not stat.ended and stat.comm != RUN_COMM]
    others = [stat for stat in running if stat.pid not in untouchable]
    return min(others, key=lambda stat: (stat.start_ticks, stat.pid), default=None)


def is_wrapper(pid: int, comm: str) -> bool:
    """Whether a process merely starts another: by its name, or by the program that runs its script."""
    return not WRAPPERS.isdisjoint(_names(pid, comm))


def ends_with_child(pid: int, comm: str, is_wrapper_of_it: bool = False) -> bool:
    """Whether a process ends once what it started has, as far as is known; of a shell that is not.

    `is_wrapper_of_it`: it is known for one by other means.
    """
    names = _names(pid, comm)
    return _SHELLS.isdisjoint(names) and (is_wrapper_of_it or not WRAPPERS.isdisjoint(names))


def _names(pid: int, comm: str) -> set[str]:
    try:
        program = os.path.basename(os.readlink(f"/proc/{pid}/exe"))  # noqa: PTH115, PTH119  no pathlib here
    except OSError:
        program = ""
    return {comm.split(" ")[0], program}


def in_container() -> bool:
    """Whether process 1 is a container's, and not the machine's."""
    try:
        return os.stat("/proc/self/ns/pid").st_ino != _FIRST_PID_NAMESPACE  # noqa: PTH116  no pathlib here
    except OSError:
        return False


def _read(pids: set[int]) -> dict[int, Stat]:
    return {pid: stat for pid in pids if (stat := read_stat(pid))}


def _descent(found: dict[int, Stat], root_pid: int) -> list[int]:
    """A pid and those of its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for stat in found.values():
        children.setdefault(stat.parent_pid, []).append(stat.pid)
    listed = [root_pid]
    for pid in listed:
        listed += children.pop(pid, [])
    return listed


def _untouchable(found: dict[int, Stat], governor_pid: int, agent_pid: int = 0) -> set[int]:
    """governor, all that it descends from, process 1, and governor's children, unless the agent is one of them."""
    children = _descent(found, governor_pid)
    return {1, os.getpid(), *ancestors(governor_pid), *(children if agent_pid not in children[1:] else ())}


def send(pid: int, start_ticks: int, number: int) -> bool:
    """Signal this very process, through a pidfd; False when it is gone, or may not be signalled."""
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        stat = read_stat(pid)  # after the pidfd was opened: the pid cannot be another process's any more
        if stat is None or stat.start_ticks != start_ticks:
            return False
        signal.pidfd_send_signal(pidfd, number)
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True


def stop(root_pid: int, memcg_path: str, governor_pid: int, write_down: Callable[[int, int], bool]) -> int:
    """SIGSTOP to an agent's processes, each written down before; how many were stopped.

    Looks a second time for what was forked meanwhile. What `write_down` refuses is left running.
    """
    stopped = 0
    seen: set[tuple[int, int]] = set()
    for _ in range(2):
        for stat in members(root_pid, memcg_path, governor_pid):
            process = (stat.pid, stat.start_ticks)
            if process in seen or stat.stopped:
                continue
            seen.add(process)
            if write_down(*process):
                stopped += send(*process, signal.SIGSTOP)
    return stopped
