"""The processes of a memcg: who they are, and signals that reach exactly them."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BURSTING_RATIO = 0.05  # of max: a process beside the agent that holds more is killed with tier 3
# Start one program and wait for it: SIGTERM is for what they started.
WRAPPERS = {
    *("sh", "bash", "dash", "ash", "busybox", "tini", "dumb-init", "docker-init", "catatonit"),
    *("npm", "sudo", "su", "env", "timeout", "nohup", "script"),
}
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One process as /proc shows it; start in clock ticks since boot."""

    pid: int
    parent_pid: int
    start_ticks: int
    comm: str
    rss_bytes: int


def memcg_pids(path: str) -> list[int]:
    """Pids of all processes in a memcg and the memcgs below it; empty when it is gone."""
    pids: list[int] = []
    for directory, _, files in os.walk(path):
        if "cgroup.procs" in files:
            with suppress(OSError):
                pids += [int(p) for p in (Path(directory) / "cgroup.procs").read_text().split() if p != "0"]
    return pids


def read_process(pid: int) -> Process | None:
    """What /proc/PID/stat says; None when the process is gone."""
    try:
        data = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return None
    head, _, tail = data.rpartition(b")")
    fields = tail.split()
    comm = head.partition(b"(")[2].decode(errors="replace")
    return Process(pid, int(fields[1]), int(fields[19]), comm, int(fields[21]) * _PAGE_BYTES)


def processes(path: str) -> list[Process]:
    """All processes of a memcg that could be read."""
    return [process for pid in memcg_pids(path) if (process := read_process(pid))]


def leader(path: str) -> Process | None:
    """The process that the memcg was made for: the oldest whose parent is outside, or what it merely wraps."""
    found = processes(path)
    pids = {process.pid for process in found}
    tops = [process for process in found if process.parent_pid not in pids]
    top = min(tops, key=lambda process: (process.start_ticks, process.pid), default=None)
    while top and top.comm.split(" ")[0] in WRAPPERS:
        inner = [process for process in found if process.parent_pid == top.pid]
        if len(inner) != 1:
            break
        top = inner[0]
    return top


def send(pid: int, number: signal.Signals) -> bool:
    """Signal through a pidfd, so that no other process of a reused pid is hit; False when it is gone."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        return send_by_pidfd(fd, number)
    finally:
        os.close(fd)


def send_by_pidfd(pidfd: int, number: signal.Signals) -> bool:
    """Signal the process that a pidfd stands for; False when it is gone or may not be signalled."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except OSError:
        return False
    return True


def kill_bursting(path: str, spare_pid: int, max_bytes: int) -> Iterator[Process]:
    """SIGKILL every process but the agent that holds more than BURSTING_RATIO of max; who was hit."""
    for process in processes(path):
        bursting = process.pid != spare_pid and process.rss_bytes > BURSTING_RATIO * max_bytes
        if bursting and send(process.pid, signal.SIGKILL):
            yield process


def kill_memcg(path: str) -> None:
    """SIGKILL everything in a memcg: at once with cgroup.kill (5.14), else one by one."""
    try:
        (Path(path) / "cgroup.kill").write_text("1")
    except OSError:
        for pid in memcg_pids(path):
            send(pid, signal.SIGKILL)
