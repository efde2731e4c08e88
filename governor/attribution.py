"""Whose growth is it? Follows the processes of one memcg from look to look; for the governor process, not for reflex.

Reads only `/proc/PID/stat` and `statm`, which take no lock that a process in trouble could hold (`cmdline`,
`environ` and `smaps` wait for its mmap lock), and `memory.stat`. A look ends when its budget is over; the next one
goes on where it ended.

What a process holds is estimated as resident less shared pages of `statm`: its anonymous memory, off by what the
kernel has not yet added up (up to 64 pages a thread before Linux 6.2, a few dozen pages a CPU since). tmpfs and
shared memory count as "shared" there, and kernel memory not at all: how much these grew, `memory.stat` tells of the
memcg as a whole, and it is put to the process that was charged last. Pages that a fork shares with its parent count
in both until one exits; so a child that has not called exec starts with what its parent held, not with nothing.

A tree is what descends from a child of the agent, or from a process beside the agent that has no parent in the memcg.
A process keeps the tree in which it was first seen, whoever adopts it later.

Brakes come in runs, and between two of them little can grow: so beside the growth since the last brake there is that
since before the first, of who lives.
"""

from __future__ import annotations

import os
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

from governor.actions.processes import Process, anonymous_bytes, leader, read_process
from governor.cgroup import figure
from governor.model import Growth
from governor.subtree import DEPTH_LIMIT, memcg_pids

BUDGET_NS = 5_000_000
BASELINE_NS = 1_000_000_000  # growth is measured against a look at least this old, where there is one
FLOOR_BYTES = 1 << 20  # less growth than this is noise of the kernel's counters
SEEN_LIMIT = 10_000  # processes that are followed: where there are more, those seen first and who is charged
RUN_NS = 60_000_000_000  # brakes closer together are of one run
TIE_RATIO = 0.9  # of the largest growth: who reaches it is as likely the cause
_CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
_STAT_BYTES = 8192  # memory.stat has half of that
_HIDDEN = (b"shmem", b"slab_unreclaimable", b"pagetables", b"kernel_stack", b"sock", b"percpu")

Key = tuple[int, int]  # pid and start in clock ticks since boot: one process, ever
_History = deque[tuple[int, int]]  # (monotonic ns, bytes), oldest first


@dataclass(slots=True, eq=False)
class _Tree:
    """The first process of a tree, which need not live any more."""

    key: Key
    of_agent: bool
    hidden_bytes: int = 0  # put to it in this run of brakes
    is_shed: bool = False


@dataclass(slots=True, eq=False)
class _Seen:
    """What is remembered of a living process; `parent_pid` is the first one that it was seen with."""

    process: Process
    parent_pid: int
    history: _History
    first_bytes: int  # held before the first of this run of brakes, at birth, or when first seen; -1: not yet
    tree: _Tree | None = None

    @property
    def held_bytes(self) -> int:
        return self.history[-1][1] if self.history else 0

    @property
    def grown_bytes(self) -> int:
        return max(0, self.history[-1][1] - self.history[0][1]) if self.history else 0


@dataclass(frozen=True, slots=True)
class Held:
    """A living process as it was last seen; `growth_bytes` per second, 0 as long as it was seen once."""

    pid: int
    comm: str
    held_bytes: int
    growth_bytes: int
    is_agent: bool
    of_agent: bool  # descends from it


@dataclass(slots=True)
class _Share:
    """A tree's part of the growth."""

    tree: _Tree
    grown_bytes: int = 0
    members: list[_Seen] = field(default_factory=list)


class Attribution:
    """The processes of one memcg, from look to look."""

    def __init__(self, memcg_path: str, agent_pid: int = 0) -> None:
        self._path = memcg_path
        self._given_pid = agent_pid
        self._agent_pid = agent_pid
        self._seen: dict[int, _Seen] = {}
        self._lineage: set[int] = set()  # the agent and its ancestors
        self._looks: deque[tuple[int, int]] = deque()  # (monotonic ns, clock ticks since boot)
        self._hidden: _History = deque()
        self._asked_ns: int | None = None  # when growth() was, last
        self._run_ns = 0  # where growth since before the first brake of a run begins
        self._agent_hidden_bytes = 0  # put to the agent in this run
        self._run_hidden_bytes = 0  # of all, before it
        self._first_ticks: int | None = None
        self._resume_pid = 0
        self._known_ratio = 0.0

    def look(self, now_ns: int, budget_ns: int = BUDGET_NS, first: Collection[int] = ()) -> None:
        """One pass over the processes, `first` and the agent before the others, as far as the budget goes.

        Listing the processes is not part of the budget.
        """
        until_ns = time.monotonic_ns() + budget_ns
        ticks = time.clock_gettime_ns(time.CLOCK_BOOTTIME) * _CLOCK_TICKS // 1_000_000_000
        pids = sorted(memcg_pids(self._path))
        listed = set(pids)
        for pid in self._seen.keys() - listed:
            del self._seen[pid]
        self._find_agent(listed, pids)
        self._see_hidden(now_ns)
        begin = bisect_right(pids, self._resume_pid)
        urgent = [pid for pid in (self._agent_pid, *first) if pid in listed]
        done: set[int] = set()
        for number, pid in enumerate([*urgent, *pids[begin:], *pids[:begin]]):
            if pid in done:
                continue
            if number > len(urgent) and time.monotonic_ns() >= until_ns:
                break  # not before one of the others: else nobody but the urgent ones would ever be seen
            if number >= len(urgent):
                self._resume_pid = pid
                if pid not in self._seen and len(self._seen) >= SEEN_LIMIT:
                    continue
            self._see(pid, now_ns)
            done.add(pid)
        self._known_ratio = len(done) / len(listed) if listed else 1.0
        self._looks.append((now_ns, ticks))
        self._first_ticks = ticks if self._first_ticks is None else self._first_ticks
        _forget_old(self._looks, now_ns)
        self._plant(listed)

    def growth(self, now_ns: int, charging_pid: int, budget_ns: int = BUDGET_NS) -> Growth:
        """A fresh look, compared with one at least BASELINE_NS old; `charging_pid` may be a thread, 0 if unknown.

        Never with one from before this was asked last: what two answers say can be added up. Ask when a memcg is
        braked and keep the answer: while it is held nothing grows, and after a second of looks at that, nothing has
        grown.
        """
        self.look(now_ns, budget_ns, (charging_pid,))
        start_ns = self._start_ns(now_ns)
        if self._asked_ns is None or now_ns - self._asked_ns >= RUN_NS:
            self._begin_run(start_ns)
        charging = self._seen.get(charging_pid) or self._seen.get(_process_of(charging_pid))
        shares = self._shares(lambda seen: seen.grown_bytes)
        agent = self._seen.get(self._agent_pid)
        agent_grown_bytes = agent.grown_bytes if agent else 0
        hidden_bytes = max(0, self._hidden[-1][1] - self._hidden[0][1]) if self._hidden else 0
        charged = next((share for share in shares if charging and share.tree is charging.tree), None)
        if charged:
            charged.grown_bytes += hidden_bytes
            charged.tree.hidden_bytes += hidden_bytes
        elif agent and charging is agent:
            agent_grown_bytes += hidden_bytes
            self._agent_hidden_bytes += hidden_bytes
        others_grown_bytes = sum(share.grown_bytes for share in shares)
        outgrown_bytes = others_grown_bytes * (TIE_RATIO if agent and charging is agent else 1)
        if agent_grown_bytes >= max(FLOOR_BYTES, outgrown_bytes):
            culprit = charged if charged and charged.grown_bytes >= TIE_RATIO * agent_grown_bytes else None
        else:
            culprit = _culprit(shares, charged)
        told = self._told(culprit, agent_grown_bytes, others_grown_bytes, now_ns - start_ns)
        self._asked_ns = now_ns
        for history in (self._hidden, *(seen.history for seen in self._seen.values())):
            _forget_old(history, now_ns + BASELINE_NS)
        return told

    def since_first(self, now_ns: int) -> Growth:
        """Growth since before the first of this run of brakes, of who lives; ask after growth()."""
        shares = self._shares(lambda seen: max(0, seen.held_bytes - seen.first_bytes))
        put_bytes = self._agent_hidden_bytes + sum(share.tree.hidden_bytes for share in shares)
        left_bytes = self._hidden[-1][1] - self._run_hidden_bytes if self._hidden else 0
        kept_ratio = min(1.0, max(0, left_bytes) / max(1, put_bytes))  # of tmpfs some may be given back
        for share in shares:
            share.grown_bytes += int(share.tree.hidden_bytes * kept_ratio)
        agent = self._seen.get(self._agent_pid)
        agent_grown_bytes = int(self._agent_hidden_bytes * kept_ratio)
        agent_grown_bytes += max(0, agent.held_bytes - agent.first_bytes) if agent else 0
        others_grown_bytes = sum(share.grown_bytes for share in shares)
        is_agents = agent_grown_bytes >= max(FLOOR_BYTES, others_grown_bytes)
        culprit = None if is_agents else _culprit(shares, None)
        return self._told(culprit, agent_grown_bytes, others_grown_bytes, now_ns - self._run_ns)

    def shed(self, members: Collection[Key]) -> None:
        """The trees of these processes are being killed: nothing more is put down to them in this run."""
        for seen in self._seen.values():
            if seen.tree and _key(seen.process) in members:
                seen.tree.is_shed = True

    def _begin_run(self, start_ns: int) -> None:
        self._run_ns, self._agent_hidden_bytes = start_ns, 0
        self._run_hidden_bytes = self._hidden[0][1] if self._hidden else 0
        for seen in self._seen.values():
            seen.first_bytes = seen.history[0][1] if seen.history else -1
            if seen.tree:
                seen.tree.hidden_bytes, seen.tree.is_shed = 0, False

    def _shares(self, grown: Callable[[_Seen], int]) -> list[_Share]:
        shares: dict[Key, _Share] = {}
        for seen in self._seen.values():
            if seen.tree and not seen.tree.is_shed:
                share = shares.setdefault(seen.tree.key, _Share(seen.tree))
                share.grown_bytes += grown(seen)
                share.members.append(seen)
        return list(shares.values())

    def _start_ns(self, now_ns: int) -> int:
        """Where the growth up to now began: later than for whom no look had time."""
        starts = [seen.history[0][0] for seen in self._seen.values() if seen.history]
        return min(now_ns, max(min(starts, default=now_ns), self._asked_ns or 0))

    def descendants(self) -> tuple[Key, ...]:
        """The living processes that descend from the agent as far as was seen, without the agent itself."""
        return tuple(_key(seen.process) for seen in self._seen.values() if seen.tree and seen.tree.of_agent)

    def agent_held_bytes(self) -> tuple[int, int]:
        """What the agent held at the last look, and what descends from it beside that (without shares of a fork)."""
        agent = self._seen.get(self._agent_pid)
        below = (seen for seen in self._seen.values() if seen.tree and seen.tree.of_agent)
        return agent.held_bytes if agent else 0, sum(one.held_bytes for one in below if not one.process.forked_only)

    def held(self) -> list[Held]:
        """Every process that was seen, who grew most first; for who looks on."""
        found = []
        for pid, seen in self._seen.items():
            begin_ns, begin_bytes = seen.history[0] if seen.history else (0, 0)
            end_ns, end_bytes = seen.history[-1] if seen.history else (0, 0)
            growth_bytes = (
                (end_bytes - begin_bytes) * 1_000_000_000 // (end_ns - begin_ns) if end_ns > begin_ns else 0
            )
            of_agent = bool(seen.tree and seen.tree.of_agent)
            found.append(Held(pid, seen.process.comm, end_bytes, growth_bytes, pid == self._agent_pid, of_agent))
        return sorted(found, key=lambda one: (-one.growth_bytes, -one.held_bytes, one.pid))

    def _told(
        self, culprit: _Share | None, agent_grown_bytes: int, others_grown_bytes: int, window_ns: int
    ) -> Growth:
        if culprit is None:
            return Growth(0, 0, "", 0, 0, agent_grown_bytes, others_grown_bytes, window_ns, self._known_ratio)
        root = self._seen.get(culprit.tree.key[0])
        if root is None or root.process.start_ticks != culprit.tree.key[1]:
            root = max(culprit.members, key=lambda seen: seen.held_bytes)
        return Growth(
            root.process.pid,
            root.process.start_ticks,
            root.process.comm,
            culprit.grown_bytes,
            sum(seen.held_bytes for seen in culprit.members),
            agent_grown_bytes,
            others_grown_bytes,
            window_ns,
            self._known_ratio,
            tuple(_key(seen.process) for seen in culprit.members),
        )

    def _find_agent(self, listed: set[int], pids: list[int]) -> None:
        """Keep to the agent; where it was not given and is gone, whoever leads the memcg now."""
        if not self._given_pid and self._agent_pid not in listed:
            self._agent_pid = getattr(leader(self._path, pids), "pid", 0) if listed else 0
            for seen in self._seen.values():
                seen.tree = None
        self._lineage = set()
        pid = self._agent_pid
        while (
            pid in listed
            and pid not in self._lineage
            and len(self._lineage) < DEPTH_LIMIT
            and (process := read_process(pid))
        ):
            self._lineage.add(pid)
            pid = process.parent_pid

    def _see_hidden(self, now_ns: int) -> None:
        try:
            fd = os.open(f"{self._path}/memory.stat", os.O_RDONLY | os.O_CLOEXEC)  # a third of what pathlib takes
            try:
                stat = os.read(fd, _STAT_BYTES)
            finally:
                os.close(fd)
        except OSError:
            return
        self._hidden.append((now_ns, sum(figure(stat, name) for name in _HIDDEN)))
        _forget_old(self._hidden, now_ns)

    def _see(self, pid: int, now_ns: int) -> None:
        process = read_process(pid)
        ours = process and os.getpid() in (pid, process.parent_pid) and pid != self._agent_pid
        if process is None or ours:  # neither governor nor its children are anybody's burst
            self._seen.pop(pid, None)
            return
        seen, unchanged = self._seen.get(pid), False
        if seen is None or seen.process.start_ticks != process.start_ticks:
            history = self._born(process)
            seen = self._seen[pid] = _Seen(process, process.parent_pid, history, history[0][1] if history else -1)
        elif seen.history and seen.process.rss_bytes == process.rss_bytes:
            unchanged = True  # one read is enough
        elif seen.process.forked_only and not process.forked_only:  # a new image holds nothing of the old one
            seen.history, seen.first_bytes = deque([(now_ns, 0)]), 0
        seen.process = process
        held_bytes = seen.held_bytes if unchanged else anonymous_bytes(pid)
        if held_bytes is not None:
            seen.history.append((now_ns, held_bytes))
            seen.first_bytes = held_bytes if seen.first_bytes < 0 else seen.first_bytes
            _forget_old(seen.history, now_ns)

    def _born(self, process: Process) -> _History:
        """The history of a process at first sight: empty unless it was started after the first look."""
        before = [look_ns for look_ns, ticks in self._looks if ticks <= process.start_ticks]
        if not before:
            if self._first_ticks is None or process.start_ticks < self._first_ticks:
                return deque()
            before = [self._looks[0][0]]  # born under our eyes, but no look has reached it so far
        parent = self._seen.get(process.parent_pid)
        return deque([(before[-1], parent.held_bytes if parent and process.forked_only else 0)])

    def _plant(self, listed: set[int]) -> None:
        """Give every process seen for the first time its tree, unless its parent was not reached yet.

        Where not all are followed, a parent may never be.
        """
        is_crowded = len(self._seen) >= SEEN_LIMIT
        for seen in self._seen.values():
            way: list[_Seen] = []
            while seen.tree is None and seen.process.pid not in self._lineage and len(way) <= len(self._seen):
                way.append(seen)
                parent = self._seen.get(seen.parent_pid)
                reused = parent is not None and parent.process.start_ticks > seen.process.start_ticks
                is_first = seen.parent_pid in self._lineage or seen.parent_pid not in listed or reused
                if is_first or (parent is None and is_crowded):
                    seen.tree = _Tree(_key(seen.process), seen.parent_pid == self._agent_pid)
                elif parent is None:
                    break
                else:
                    seen = parent
            for one in way:
                one.tree = seen.tree


def _culprit(shares: list[_Share], charged: _Share | None) -> _Share | None:
    """The tree that grew most, among near equals the one that was charged; where none grew, only that one."""
    largest = max(shares, key=lambda share: share.grown_bytes, default=None)
    if largest is None or largest.grown_bytes < FLOOR_BYTES:
        return charged
    return charged if charged and charged.grown_bytes >= TIE_RATIO * largest.grown_bytes else largest


def _key(process: Process) -> Key:
    return process.pid, process.start_ticks


def _forget_old(history: deque[tuple[int, int]], now_ns: int) -> None:
    """Keep the newest entry that is BASELINE_NS old, and what came after it."""
    while len(history) > 1 and history[1][0] <= now_ns - BASELINE_NS:
        history.popleft()


def _process_of(tid: int) -> int:
    """The process that a thread belongs to, 0 when it is gone."""
    try:
        with Path(f"/proc/{tid}/status").open("rb") as file:
            return next((int(line.split()[1]) for line in file if line.startswith(b"Tgid:")), 0)
    except (OSError, ValueError):
        return 0
