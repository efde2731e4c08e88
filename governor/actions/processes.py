"""The processes of a memcg: who they are, and signals that reach exactly them."""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from governor.subtree import Stat, ancestors, is_wrapper, memcg_pids, read_stat

BURSTING_RATIO = 0.05  # of max: a process beside the agent that holds more is killed with tier 3
_KILL_ROUNDS = 8
_BATCH = 512  # of pidfds that are open at once
_LED_AMONG = 200  # processes of a memcg, those listed first, and what one of them descends from
_PIDFD_SIGNAL_THREAD = 1  # linux/pidfd.h
_LIBC = ctypes.CDLL(None)
_PF_FORKNOEXEC = 0x40  # linux/sched.h
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Process:
    """One process as /proc shows it; start in clock ticks since boot."""

    pid: int
    parent_pid: int
    start_ticks: int
    comm: str
    rss_bytes: int
    forked_only: bool = False  # forked, and no exec since: its pages are its parent's, shared until written to


def read_process(pid: int) -> Process | None:
    """One process; None when it is gone."""
    stat = read_stat(pid)
    return process_of(stat) if stat else None


def process_of(stat: Stat) -> Process:
    """What its /proc/PID/stat says of its memory."""
    forked_only = bool(stat.flags & _PF_FORKNOEXEC)
    return Process(stat.pid, stat.parent_pid, stat.start_ticks, stat.comm, stat.rss_pages * _PAGE_BYTES, forked_only)


def anonymous_bytes(pid: int) -> int | None:
    """Resident less shared pages of one process; None when it is gone."""
    try:
        fd = os.open(f"/proc/{pid}/statm", os.O_RDONLY | os.O_CLOEXEC)
        try:
            _, resident, shared, *_ = os.read(fd, 256).split()
        finally:
            os.close(fd)
    except (OSError, ValueError):
        return None
    return max(0, int(resident) - int(shared)) * _PAGE_BYTES


def peak_anonymous_bytes(pid: int) -> int:
    """The most that was resident of one process, less the files that are now; 0 when it is gone."""
    try:
        status = parse_flat(Path(f"/proc/{pid}/status").read_bytes())
    except OSError:
        return 0
    return max(0, status.get(b"VmHWM", 0) - status.get(b"RssFile", 0)) << 10


def parse_flat(status: bytes) -> dict[bytes, int]:
    """The lines of /proc/PID/status that say a number of KiB."""
    lines = (line.split() for line in status.splitlines() if line.endswith(b" kB"))
    return {words[0].rstrip(b":"): int(words[1]) for words in lines if len(words) == 3 and words[1].isdigit()}


def processes(path: str) -> list[Process]:
    """All processes of a memcg that could be read."""
    return [process for pid in memcg_pids(path) if (process := read_process(pid))]


GUARD_COMM = "governor-guard"  # which `governor run` starts beside the agent


def leader(path: str, listed: list[int] | None = None) -> Process | None:
    """The process that the memcg was made for: the oldest whose parent is outside, or what it merely wraps.

    `listed`: the memcg's pids, where they are known.
    """
    listed = memcg_pids(path) if listed is None else listed
    read = [process for pid in listed[:_LED_AMONG] if (process := read_process(pid))]
    found = [process for process in read if process.rss_bytes]  # without those that ended
    pids = {*listed[_LED_AMONG:], *(process.pid for process in found)}
    tops = [process for process in found if process.parent_pid not in pids]
    if found and not tops:
        above = [pid for pid in ancestors(found[0].pid) if pid in pids]
        tops = [process for pid in above[-1:] if (process := read_process(pid))]
    top = min(tops, key=lambda process: (process.start_ticks, process.pid), default=None)
    while top and is_wrapper(top.pid, top.comm):
        inner = [process for process in found if process.parent_pid == top.pid and process.comm != GUARD_COMM]
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


def send_by_pidfd(pidfd: int, number: int) -> bool:
    """Signal the process that a pidfd stands for; False when it is gone or may not be signalled."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except OSError:
        return False
    return True


def ask_to_end(pidfd: int, pid: int) -> bool:
    """SIGTERM to an agent, to its main thread unless that blocks it; False when it is gone.

    One sent to the whole of a frozen process is taken by whichever thread leaves the freezer first: a bursting one,
    which memory.high puts to sleep before its handler runs, and in Python it only leaves a note for the main thread,
    which sleeps on (measured on 6.12: one time in fourteen).
    """
    masks = signal_masks(pid)
    if masks is None:
        return False
    if (
        masks["SigBlk"] >> (signal.SIGTERM - 1) & 1
    ):  # it is meant for a signalfd, or for a thread that waits for signals
        return send_by_pidfd(pidfd, signal.SIGTERM)
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGTERM, None, _PIDFD_SIGNAL_THREAD)
    except ProcessLookupError:
        return False
    except OSError:  # before Linux 6.9; that the pid is still this process's was asked a moment ago
        return send_by_pidfd(pidfd, 0) and _LIBC.tgkill(pid, pid, signal.SIGTERM) == 0
    return True


def signal_masks(pid: int) -> dict[str, int] | None:
    """What the main thread blocks and the process catches (SigBlk, SigCgt), bit 0 for signal 1; None when it is gone.

    Raises ValueError for what the kernel never writes.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text(errors="replace")  # the name in it may be cut in a character
    except OSError:
        return None
    masks = {"SigBlk": 0, "SigCgt": 0}
    return masks | {line[:6]: int(line[7:], 16) for line in status.splitlines() if line[:6] in masks}


def kill_bursting(found: Iterable[Process], spare_pid: int, max_bytes: int) -> Iterator[Process]:
    """SIGKILL every process found that holds more than BURSTING_RATIO of max by itself; who was hit.

    Never the agent (`spare_pid`), what it descends from (a wrapper may be the container's process 1), or governor.
    """
    spared = _with_ancestors({spare_pid, os.getpid()})
    least_bytes = BURSTING_RATIO * max_bytes
    for process in found:
        if process.pid in spared or process.rss_bytes <= least_bytes:
            continue
        held_bytes = anonymous_bytes(process.pid) or 0  # mapped files are not what burst
        if held_bytes > least_bytes and send(process.pid, signal.SIGKILL):
            yield process


def kill_memcg(path: str) -> None:
    """SIGKILL everything in a memcg: at once with cgroup.kill (5.14), else one by one."""
    try:
        with Path(path, "cgroup.kill").open("r+b", buffering=0) as file:  # "w" would make one where there is none
            file.write(b"1")
    except OSError:
        for pid in memcg_pids(path):
            send(pid, signal.SIGKILL)


def remove_memcg(path: str, within_s: float) -> bool:
    """Kill what is in a memcg of ours and remove it; False where something does not die in time."""
    until = time.monotonic() + within_s
    while True:
        kill_memcg(path)
        for directory, _, _ in os.walk(path, topdown=False):
            with suppress(OSError):
                Path(directory).rmdir()
        if not Path(path).exists():
            return True
        if time.monotonic() >= until:
            return False
        time.sleep(0.002)


def kill_tree(
    memcg_path: str,
    root_pid: int,
    root_start_ticks: int,
    spare: Collection[int],
    remembered: Collection[tuple[int, int]] = (),
    agent_pid: int = 0,
) -> list[Process]:
    """SIGKILL a process and all that descends from it, within a memcg; who was hit.

    `remembered` are (pid, start) of further members that another process has adopted (attribution.Growth.members).
    Never hit: `spare`, governor and PID 1, what descends from them (but for the agent and its tools, where governor
    started it), and their ancestors; a root that has one of them below it loses only the rest of its tree. Every
    process is held by pidfd, found to be the one meant by its start, and found in the memcg once more, before it is
    hit. What forks meanwhile, in a memcg that is not frozen, is found by looking again, a few times, unless its
    parent has died since.
    """
    keys = {(root_pid, root_start_ticks), *remembered}
    hit: dict[tuple[int, int], Process] = {}
    for _ in range(_KILL_ROUNDS):
        found = _tree(processes(memcg_path), keys, spare, agent_pid)
        keys |= found.keys()
        meant = [process for key, process in found.items() if key not in hit]
        batches = (meant[at : at + _BATCH] for at in range(0, len(meant), _BATCH))
        killed = [process for batch in batches for process in _kill_verified(memcg_path, batch)]
        if not killed:
            break
        hit |= {(process.pid, process.start_ticks): process for process in killed}
    return list(hit.values())


def kill_all_but(memcg_path: str, spare: Collection[int]) -> list[Process]:
    """SIGKILL every process of a memcg but these, and who must not be hit, as in kill_tree(); who was hit."""
    everybody = [(process.pid, process.start_ticks) for process in processes(memcg_path)]
    return kill_tree(memcg_path, 0, 0, spare, everybody)


def kill_named(memcg_path: str, names: Collection[str], own: Collection[tuple[int, int]] | None) -> list[Process]:
    """SIGKILL the processes of a memcg with such names (globs), and what descends from them; who was hit.

    `own`: only those of these (pid, start ticks). Who must not be hit is not, as in kill_tree().
    """
    found = [process for process in processes(memcg_path) if any(fnmatchcase(process.comm, name) for name in names)]
    keys = {(process.pid, process.start_ticks) for process in found}
    return kill_tree(memcg_path, 0, 0, (), keys if own is None else keys & set(own))


def _tree(
    found: list[Process], keys: Collection[tuple[int, int]], spare: Collection[int], agent_pid: int
) -> dict[tuple[int, int], Process]:
    """Of the processes found those in `keys` and their descendants, down to whoever must not be hit."""
    children: dict[int, list[Process]] = {}
    for process in found:
        children.setdefault(process.parent_pid, []).append(process)
    spared = {1, os.getpid(), *spare}
    protected = _with_ancestors(spared)
    own = [process for process in children.get(os.getpid(), []) if process.pid != agent_pid]
    for process in own:  # reflex, archives, commands, and what these started
        spared.add(process.pid)
        own += [child for child in children.get(process.pid, []) if child.pid != agent_pid]
    tree: dict[tuple[int, int], Process] = {}
    waiting = [process for process in found if (process.pid, process.start_ticks) in keys]
    while waiting:
        process = waiting.pop()
        key = (process.pid, process.start_ticks)
        if key in tree or process.pid in spared:
            continue
        if process.pid not in protected:
            tree[key] = process
        waiting += children.get(process.pid, [])
    return tree


def _with_ancestors(pids: Collection[int]) -> set[int]:
    return {each for pid in pids for each in ancestors(pid)}


def _kill_verified(memcg_path: str, meant: list[Process]) -> list[Process]:
    pidfds: dict[int, tuple[int, Process]] = {}
    try:
        for process in meant:
            with suppress(OSError):
                pidfds[process.pid] = (os.pidfd_open(process.pid), process)
        inside = set(memcg_pids(memcg_path))
        return [
            process
            for pid, (pidfd, process) in pidfds.items()
            if pid in inside
            and getattr(read_process(pid), "start_ticks", None) == process.start_ticks
            and send_by_pidfd(pidfd, signal.SIGKILL)
        ]
    finally:
        for pidfd, _ in pidfds.values():
            os.close(pidfd)
