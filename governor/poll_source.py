"""Crossings without BPF: looks at memory.stat, sooner the less room there is, and at once when the kernel stirs.

`poll` looks at intervals; `psi` is told in between by a PSI trigger and by `memory.events`. Beside BPF it looks once
a second, less often where there are many to be looked at, so that a lost record costs latency and nothing else.
Imported by the real-time process.
"""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from contextlib import suppress

from governor import levels, record
from governor.cgroup import MemoryState, figure, pages
from governor.levels import Track
from governor.limits import Limits
from governor.poller import Poller
from governor.record import HAS_MEMORY, HAS_RATE, HAS_TREND, RISING, Levels, Record

POLL, PSI, BPF = 1, 2, 3
NAMES = {POLL: "poll", PSI: "psi", BPF: "bpf"}
RECONCILE_NS = 1_000_000_000
_HURRY_NS = 5_000_000_000
_NEVER_NS = (1 << 64) - 1
# 20 ms of stall in half a second; without CAP_SYS_RESOURCE windows are multiples of 2 s (psi_trigger_create)
_TRIGGERS = (b"some 20000 500000", b"some 80000 2000000")


class PollSource:
    """Looks at one governed memcg and the ancestors with a limit."""

    def __init__(
        self,
        limits: Limits,
        poller: Poller,
        with_psi: bool,
        now_ns: int,
        on_stir: Callable[[int], None],
        with_stalls: bool = True,
    ) -> None:
        """`on_stir` is called by the poller when the kernel stirs: stirred() is to follow."""
        self._limits = limits
        self._poller = poller
        self._tracks: dict[int, Track] = {}
        self._events = False
        self._oom_kills = 0
        self._psi_fd = -1
        self._hurry_until_ns = 0
        self.fds: list[int] = []  # on the poller
        self.seen_ids: set[int] = set()  # of the memcgs with a limit, at the last look
        self.due_ns = now_ns
        self._with_psi, self._on_stir = with_psi and not limits.own.v1, on_stir
        if self._with_psi:
            self._open_events()
            self.heed_stalls(with_stalls)

    @property
    def name(self) -> int:
        """PSI where a trigger could be set, else POLL."""
        return PSI if self._psi_fd >= 0 else POLL

    def heed_stalls(self, wanted: bool) -> bool:
        """Have a PSI trigger, or none; whether that is a change. There is none where BPF tells of stalls.

        Each costs a kernel thread (psi_trigger_create), and closing it waits for RCU (psi_trigger_destroy).
        """
        before = self._psi_fd
        if wanted and before < 0 and self._with_psi:
            self._open_psi()
        elif not wanted and before >= 0:
            self._poller.unregister(before)
            os.close(before)
            self.fds.remove(before)
            self._psi_fd = -1
        return self._psi_fd != before

    def _open_events(self) -> None:
        with suppress(OSError):
            fd = self._limits.own.open("memory.events", os.O_RDONLY)
            try:
                self._poller.register(fd, self._on_stir, select.EPOLLPRI)
            except OSError:
                os.close(fd)
                raise
            self.fds.append(fd)
            self._events = True
            self._oom_kills = self._read_events()

    def _open_psi(self) -> None:
        memcg = self._limits.own
        for trigger in _TRIGGERS:
            try:
                fd = memcg.open("memory.pressure", os.O_RDWR | os.O_NONBLOCK)
            except OSError:
                return
            try:
                os.write(fd, trigger + b"\0")
                self._poller.register(fd, self._on_stir, select.EPOLLPRI)
            except OSError:
                os.close(fd)
                continue
            self._psi_fd = fd
            self.fds.append(fd)
            return

    def stirred(self, now_ns: int) -> Record | None:
        """One of the descriptors is ready; a record when the kernel's OOM killer chose somebody meanwhile."""
        self.due_ns = 0
        before = self._oom_kills
        self._oom_kills = self._read_events()
        if self._oom_kills <= before:
            return None
        empty = Record._make([0] * len(Record._fields))
        return empty._replace(ktime_ns=now_ns, cgroup_id=self._limits.cgroup_id, kind=record.OOM_KILL)

    def _read_events(self) -> int:
        """The OOM killer's victims here and below, so far; reading arms the descriptor again."""
        try:
            data = os.pread(self.fds[0], 512, 0) if self._events else b""
        except OSError:  # the memcg is gone
            return 0
        return figure(data, b"oom_kill")

    def hurry(self, now_ns: int) -> None:
        """Beside BPF, too, look at the usual intervals for a while: its bound, or its pid, was of no use."""
        self._hurry_until_ns = now_ns + _HURRY_NS
        self.due_ns = 0

    def forget(self) -> None:
        """Levels that lie behind are reported again, at the next growth."""
        for track in self._tracks.values():
            track.forget()
        self.due_ns = 0

    def told(self, found: Record) -> None:
        """BPF reported a crossing of the memcg with this id."""
        if found.cgroup_id in self._tracks:
            self._tracks[found.cgroup_id].told(found.level, bool(found.flags & record.HORIZON))

    def look(self, wanted: Levels, now_ns: int, watched: bool, spared_ns: int = RECONCILE_NS) -> Record | None:
        """Look; a record of the highest crossing. Where BPF has `watched`, only of one that it should have reported.

        Beside BPF the next look is `spared_ns` later.

        When the memcg cannot be read, the descriptors, which would be ready forever, are closed.
        """
        seen = self._limits.look(now_ns)
        if not seen:
            self.due_ns = now_ns + RECONCILE_NS
            self.close()
            return None
        found: Record | None = None
        wait_ns = levels.INTERVAL_MAX_NS
        for memcg, state, _, ours in seen:
            track = self._tracks.setdefault(memcg.cgroup_id, Track())
            # A limit above is reached by siblings as well: braking helps only where the growth is from inside.
            crossing = track.look(wanted, state.unreclaimable_bytes, state.max_bytes, now_ns, ours)
            room_bytes = state.max_bytes - state.unreclaimable_bytes
            wait_ns = min(wait_ns, levels.interval_ns(room_bytes, track.worst_rate_bytes))
            if (
                crossing
                and not (watched and not crossing.flags & RISING)
                and (not found or crossing.level > found.level)
            ):
                found = self._record(state, crossing, now_ns)
        self.seen_ids = {one.memcg.cgroup_id for one in seen}
        is_spared = watched and now_ns >= self._hurry_until_ns
        self.due_ns = now_ns + (spared_ns if is_spared else wait_ns)
        return found

    def _record(self, state: MemoryState, crossing: levels.Crossing, now_ns: int) -> Record:
        rate, trend = crossing.fill_rate_bytes, crossing.trend_bytes
        return Record(
            ktime_ns=now_ns,
            cgroup_id=self._limits.cgroup_id,
            kind=record.CROSSING,
            flags=crossing.flags,
            valid=HAS_MEMORY | (0 if rate is None else HAS_RATE) | (0 if trend is None else HAS_TREND),
            level=crossing.level,
            pid=0,
            tid=0,
            usage_pages=pages(state.usage_bytes),
            bound_pages=pages(state.unreclaimable_bytes),
            max_pages=pages(state.max_bytes),
            charged_pages=0,
            fill_rate_pages=pages(rate or 0),
            time_to_max_ns=_NEVER_NS if crossing.time_to_max_ns is None else crossing.time_to_max_ns,
            stall_ns=0,
            trend_pages=pages(trend or 0),
        )

    def close(self) -> None:
        """Close the trigger and the events."""
        for fd in self.fds:
            self._poller.unregister(fd)
            os.close(fd)
        self.fds.clear()
        self._on_stir = lambda _: None  # a cycle otherwise, and reflex collects none that are older than a moment
        self._events = self._with_psi = False
        self._psi_fd = -1
