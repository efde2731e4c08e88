"""The real-time half: hears crossings, brakes at once, keeps the loans' deadlines, forwards records.

Crossings come from the rings of BPF programs, from polling, or from both, and go one way. Started by the governor
process with one end of a socket pair; decides nothing beyond the brake. When the other end is gone it undoes every
turn of a knob and exits. Runs with SCHED_FIFO, locked memory and no garbage collector where it may. Imports ctypes
and pure modules only: its resident memory is counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time

from governor import link, record
from governor.bpf_source import BpfSource
from governor.brake import NONE, KnobFile, Loan
from governor.cgroup import MemoryState, is_inside, memcg_of
from governor.governed import Governed
from governor.poll_source import BPF, POLL
from governor.poller import Poller
from governor.real_time import become_real_time
from governor.record import LEVEL_BRAKE, PPM, Levels, Record
from governor.schedule import Schedule

HEARTBEAT_NS = 1_000_000_000
VERIFY_GAP_NS = 20_000_000
CONFIRM_SLACK_RATIO = 0.02  # memory.stat may lag by a batch per CPU, and the record counts pages not charged yet
AFTER_LOAN_PPM = 940_000  # where a memcg whose loan was over is braked again
LOOKS_NS = 2_000_000  # of looks, until the ring is drained: a thousand memcgs may be due at once
HIGH_MARGIN_BYTES = 512 << 10  # memory.high under the usage would reclaim inside our write


class Reflex:
    """All governed memcgs of one instance, their sources, and the link to governor."""

    def __init__(self, link_fd: int, knob_path: str, wanted: str) -> None:
        """`wanted` is auto, or the one source that is forced: bpf, psi or poll."""
        self._link_fd = link_fd
        self._governor_pid = os.getppid()
        self._wanted = wanted
        self._unsent: list[bytes] = []
        self._knob_file = KnobFile(knob_path)
        self._slots: dict[int, Governed] = {}
        self._governed: dict[int, Governed] = {}  # by cgroup id
        self._watchers: dict[int, set[Governed]] = {}  # for whom BPF watches a memcg: itself, or what is below
        self._schedule = Schedule()  # of the slots
        self._suspects: list[Governed] = []
        self._bpf: BpfSource | None = None
        self._poller = Poller()
        self._poller.register(link_fd, lambda _: self._hear())
        self._heartbeat_ns = 0
        self._is_over = False

    # The hot path: from a crossing to a frozen memcg.

    def _on_ring(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        found = record.decode(data)
        if found.kind == record.CROSSING and (governed := self._whose(found)):
            governed.poll.told(found)
            self._on_crossing(governed, found)
            data = found._replace(cgroup_id=governed.limits.cgroup_id).encode()
        elif found.kind == record.VERIFY:
            for governed in self._watchers.get(found.cgroup_id, ()):
                governed.wants_verify = True
                self._plan(governed)
        elif found.kind == record.OOM_KILL and found.cgroup_id not in self._governed:
            path = memcg_of(found.pid)  # the limit is one below or above: is the victim ours?
            for governed in self._governed.values():
                if is_inside(path, governed.knobs.memcg.path):
                    data = found._replace(cgroup_id=governed.limits.cgroup_id).encode()
        self._tell(link.encode_record(data, now_ns), may_drop=True)

    def _whose(self, found: Record) -> Governed | None:
        """The governed memcg that a crossing is of; an ancestor's only if the charge came from inside."""
        if (own := self._governed.get(found.cgroup_id)) is not None:
            return own
        below = self._watchers.get(found.cgroup_id)
        path = memcg_of(found.pid) if below else None
        for governed in below or ():
            if is_inside(path, governed.knobs.memcg.path):
                return governed
            governed.poll.hurry(found.ktime_ns)  # the kernel reports a level once, and it may be ours in a moment
            self._plan(governed)
        return None

    def _on_crossing(self, governed: Governed, found: Record) -> None:
        """From any source: hold what rises to the brake level, or is about to; _confirm follows."""
        wanted = found.level >= LEVEL_BRAKE or found.flags & record.HORIZON
        if found.rising and wanted and governed.suspect is None and not governed.knobs.frozen_by_us:
            frozen = governed.knobs.freeze()
            governed.suspect = (found, time.monotonic_ns() if frozen else 0)
            self._suspects.append(governed)

    def _confirm_all(self) -> None:
        while self._suspects:
            self._confirm(self._suspects.pop(0))

    def _confirm(self, governed: Governed) -> None:
        """Throttle what freezing cannot stop, then ask memory.stat whether the brake was right."""
        assert governed.suspect
        found, frozen_ns = governed.suspect
        governed.suspect = None
        if not frozen_ns and governed.knobs.frozen_by_others():
            return
        usage_bytes, max_bytes = found.usage_pages * record.PAGE_BYTES, found.max_pages * record.PAGE_BYTES
        brake_bytes = governed.levels.engage_ppm[LEVEL_BRAKE - 1] * max_bytes // PPM
        room_bytes = max(brake_bytes - usage_bytes, HIGH_MARGIN_BYTES)
        throttled = self._throttle(governed, room_bytes)
        state = self._verify(governed)
        if state is None:  # gone, or unreadable: nothing may stay held that nobody can judge
            governed.knobs.restore()
            return
        level_ppm = governed.levels.engage_ppm[LEVEL_BRAKE - 1]
        if found.flags & record.HORIZON:
            level_ppm = min(level_ppm, governed.levels.horizon_floor_ppm)
        if state.unreclaimable_bytes < (level_ppm / PPM - CONFIRM_SLACK_RATIO) * state.max_bytes:
            governed.knobs.lift_high()
            self._verify(governed, hear_again=True)
            governed.poll.hurry(found.ktime_ns)  # the kernel's bound is useless here for a while
            self._thaw(governed, link.FALSE_ALARM)
            return
        if frozen_ns:
            governed.loan.begin(frozen_ns)
            if governed.last_word:
                governed.loan.prolong(frozen_ns + Loan.WINDOW_NS)
            self._plan(governed)
        trend, rate = found.trend_bytes, found.fill_rate_bytes
        self._tell(
            link.Braked(
                governed.slot,
                found.ktime_ns,
                frozen_ns,
                state,
                -1 if trend is None else trend,
                -1 if rate is None else rate,
                found.pid,
                bool(frozen_ns),
                throttled,
            ).encode()
        )

    def _throttle(self, governed: Governed, room_bytes: int) -> bool:
        """memory.high so much above what the governed memcg uses now; False when it was left alone."""
        usage_bytes = governed.limits.own_usage_bytes()
        return usage_bytes > 0 and governed.knobs.set_high(usage_bytes + room_bytes)

    def _verify(self, governed: Governed, hear_again: bool = False) -> MemoryState | None:
        """Read memory.stat and let the kernel side start from what it says.

        With `hear_again`, levels that lie behind are reported again if they still hold.
        """
        governed.wants_verify = False
        governed.verified_ns = time.monotonic_ns()
        if hear_again:
            governed.epoch += 1
            governed.poll.forget()
        limits, bpf = governed.limits, self._bpf
        charged = {cgroup_id: bpf.charged_pages(cgroup_id) for cgroup_id in governed.watched} if bpf else {}
        seen = limits.look(governed.verified_ns)
        if bpf and seen:
            for one in seen:
                cgroup_id = one.memcg.cgroup_id
                at_pages = charged.pop(cgroup_id, None)
                at_pages = bpf.charged_pages(cgroup_id) if at_pages is None else at_pages
                bpf.watch(one, governed.levels, at_pages, governed.epoch)
            self._watch(governed, {one.memcg.cgroup_id for one in seen})
        self._plan(governed)
        return next((one.state for one in seen if one.memcg is limits.tightest), None)

    def _watch(self, governed: Governed, cgroup_ids: set[int]) -> None:
        """Write down what BPF watches for it; what is watched for nobody any more, it need not watch."""
        for cgroup_id in governed.watched - cgroup_ids:
            self._watchers[cgroup_id].discard(governed)
            if not self._watchers[cgroup_id]:
                del self._watchers[cgroup_id]
                if self._bpf:
                    self._bpf.unwatch(cgroup_id)
        for cgroup_id in cgroup_ids:
            self._watchers.setdefault(cgroup_id, set()).add(governed)
        governed.watched = cgroup_ids

    def _thaw(self, governed: Governed, reason: int) -> None:
        now_ns = time.monotonic_ns()
        governed.loan.end(now_ns)
        self._plan(governed)
        if governed.knobs.thaw():
            self._tell(link.Thawed(governed.slot, now_ns, reason).encode())

    # What governor asks for.

    def _on_message(self, data: bytes) -> None:
        kind = data[0]
        if kind in (link.ADOPT, link.SET_LEVELS):
            slot, levels = link.decode_levels(data)
            self._adopt(slot, levels) if kind == link.ADOPT else self._set_levels(slot, levels)
        elif kind == link.THAW:
            asked = link.decode_thaw(data)
            if governed := self._slots.get(asked.slot):
                self._thaw_as_asked(governed, asked)
        elif kind == link.OPEN_PINS:
            self._open_pins(link.decode_pins(data))
        else:
            slot, ns = link.decode_slot(data)
            governed = self._slots.get(slot)
            if governed and kind == link.BRAKE:
                self._brake_as_asked(governed)
            elif governed and kind == link.PROLONG:
                governed.loan.prolong(ns)
                self._plan(governed)
            elif governed and kind == link.AGENT:
                governed.knobs.set_agent(ns, self._governor_pid)
                self._tell_source(governed)
            elif kind == link.RELEASE:
                if governed:
                    self._release(governed)
                self._tell(link.Released(slot).encode())

    def _adopt(self, slot: int, levels: Levels) -> None:
        knobs = self._knob_file.knobs(slot)
        if knobs is None:
            self._tell(link.Adopted(slot, False, POLL, NONE).encode())
            return
        with_psi = self._wanted != "poll"
        governed = Governed(slot, knobs, levels, self._poller, with_psi, self._stirred, self._lacks_stalls)
        self._slots[slot] = self._governed[knobs.memcg.cgroup_id] = governed
        if knobs.frozen_by_us:  # by an earlier reflex that was killed: lent for no longer than by this one
            governed.loan.begin(time.monotonic_ns())
        ok = self._verify(governed, hear_again=True) is not None
        governed.told = self._source(governed)
        self._tell(link.Adopted(slot, ok, *governed.told).encode())

    def _release(self, governed: Governed) -> None:
        governed.knobs.restore()
        self._watch(governed, set())
        governed.close()
        self._schedule.drop(governed.slot)
        del self._slots[governed.slot], self._governed[governed.limits.cgroup_id]

    @property
    def _lacks_stalls(self) -> bool:
        return not (self._bpf and self._bpf.tells_of_stalls)

    def _source(self, governed: Governed) -> tuple[int, int]:
        return BPF if self._bpf else governed.poll.name, governed.knobs.brake

    def _tell_source(self, governed: Governed) -> None:
        if governed.told != self._source(governed):
            governed.told = self._source(governed)
            self._tell(link.Source(governed.slot, *governed.told).encode())

    def _open_pins(self, directory: str) -> None:
        """BPF takes over from polling."""
        self._close_pins()
        try:
            opened = BpfSource(directory, self._on_ring)
            opened.beat(time.monotonic_ns())
        except OSError as error:
            self._tell(link.Refused(str(error)).encode())
            return
        self._bpf = opened
        self._poller.register(self._bpf.fd, lambda _: self._drain())
        self._poller.first_fd = self._bpf.fd
        for governed in self._governed.values():
            self._verify(governed, hear_again=True)
            self._tell_source(governed)

    def _close_pins(self) -> None:
        """Polling takes over from BPF."""
        if self._bpf:
            self._poller.unregister(self._bpf.fd)
            self._bpf.close()
            self._bpf = None
        for governed in self._governed.values():
            self._watch(governed, set())
            governed.poll.heed_stalls(self._lacks_stalls)
            governed.poll.due_ns = 0
            self._plan(governed)

    def _set_levels(self, slot: int, levels: Levels) -> None:
        if governed := self._slots.get(slot):
            governed.set_levels(levels)
            self._verify(governed, hear_again=True)

    def _thaw_as_asked(self, governed: Governed, asked: link.Thaw) -> None:
        governed.last_word = asked.last_word
        self._brake_at(governed, asked.brake_ppm, asked.heed_horizon)
        if asked.high_bytes > 0:
            governed.knobs.set_high(governed.limits.own_high_bytes(asked.high_bytes))
        elif asked.high_bytes < 0:
            governed.knobs.lift_high()
        self._thaw(governed, link.ASKED)

    def _brake_at(self, governed: Governed, brake_ppm: int, heed_horizon: bool) -> None:
        """From now on brake at another level; the crossing is heard again even if it lies behind."""
        base = governed.base_levels
        compact, arm, _, last = base.engage_ppm
        released_compact, released_arm, _, released_last = base.release_ppm
        last = max(last, brake_ppm)
        governed.levels = base._replace(
            engage_ppm=(compact, arm, brake_ppm, last),
            release_ppm=(
                released_compact,
                released_arm,
                max(released_arm, brake_ppm - 50_000),
                released_last,
            ),
            horizon_ns=base.horizon_ns if heed_horizon else 0,
        )
        self._verify(governed, hear_again=True)

    def _brake_as_asked(self, governed: Governed) -> None:
        if governed.knobs.frozen_by_us or governed.knobs.frozen_by_others():
            return
        frozen = governed.knobs.freeze()
        now_ns = time.monotonic_ns()
        state = self._verify(governed)
        if state is None:
            governed.knobs.thaw()
            return
        throttled = self._throttle(governed, HIGH_MARGIN_BYTES)
        if frozen:
            governed.loan.begin(now_ns)
            self._plan(governed)
        self._tell(
            link.Braked(governed.slot, 0, now_ns if frozen else 0, state, -1, -1, 0, frozen, throttled).encode()
        )

    # Time.

    def _plan(self, governed: Governed) -> None:
        """When it is to be looked after next; to be called whenever one of the times has changed."""
        times = [governed.poll.due_ns]
        if governed.loan.deadline_ns is not None:
            times.append(governed.loan.deadline_ns)
        if governed.wants_verify:
            times.append(governed.verified_ns + VERIFY_GAP_NS)
        self._schedule.set(governed.slot, min(times))

    def _tick(self, now_ns: int) -> None:
        for slot in self._schedule.due(now_ns):
            governed = self._slots[slot]
            if governed.loan.deadline_ns is not None and now_ns >= governed.loan.deadline_ns:
                self._brake_at(governed, max(governed.levels.engage_ppm[LEVEL_BRAKE - 1], AFTER_LOAN_PPM), False)
                self._thaw(governed, link.LOAN_OVER)
            if governed.wants_verify and now_ns - governed.verified_ns >= VERIFY_GAP_NS:
                self._verify(governed)
            if now_ns >= governed.poll.due_ns:
                self._look(governed, now_ns)
            self._plan(governed)
            if self._suspects or time.monotonic_ns() - now_ns > LOOKS_NS:
                break
        self._confirm_all()
        if now_ns - self._heartbeat_ns >= HEARTBEAT_NS:
            self._heartbeat_ns = now_ns
            if self._bpf and self._bpf.vanished():
                self._tell(link.Refused("somebody unloaded the BPF programs").encode())
                self._close_pins()
                for governed in self._governed.values():
                    self._tell_source(governed)
            if self._bpf:
                self._bpf.beat(now_ns)
            dropped = self._bpf.dropped_records() if self._bpf else 0
            self._tell(link.Alive(now_ns, dropped).encode(), may_drop=True)

    def _look(self, governed: Governed, now_ns: int) -> None:
        """What polling sees; beside BPF, what it missed."""
        if governed.poll.heed_stalls(self._lacks_stalls):
            self._tell_source(governed)
        watched = self._bpf is not None or self._wanted == "bpf"
        found = governed.poll.look(governed.levels, now_ns, watched, len(self._slots))
        if found:
            self._on_crossing(governed, found)
            self._tell(link.encode_record(found.encode(), time.monotonic_ns()), may_drop=True)
        # A limit was set or lifted, or it is the machine's, which the kernel side does not know.
        if self._bpf and (governed.watched != governed.poll.seen_ids or governed.limits.of_machine):
            governed.wants_verify = True

    def _tell(self, message: bytes, may_drop: bool = False) -> None:
        sent = not self._unsent and link.send(self._link_fd, message)
        if not sent and not may_drop:
            self._unsent.append(message)

    def run(self) -> None:
        """Until governor is gone. Raises nothing of one memcg's: it loses its brake, the others keep theirs."""
        while not self._is_over:
            now_ns = time.monotonic_ns()
            self._tick(now_ns)
            heartbeat_ns, next_ns = self._heartbeat_ns + HEARTBEAT_NS, self._schedule.next_ns()
            until_ns = heartbeat_ns if next_ns is None else min(next_ns, heartbeat_ns)
            is_calm = not self._poller.wait(until_ns - now_ns)
            while self._unsent and link.send(self._link_fd, self._unsent[0]):
                self._unsent.pop(0)
            if is_calm:
                gc.collect(0)

    def _drain(self) -> None:
        if self._bpf:
            self._bpf.drain()
            self._confirm_all()

    def _stirred(self, governed: Governed) -> None:
        victim = governed.poll.stirred(time.monotonic_ns())
        if victim and not self._bpf:  # which tells of it by itself, and of whom
            self._tell(link.encode_record(victim.encode(), victim.ktime_ns), may_drop=True)
        self._plan(governed)

    def _hear(self) -> None:
        message = link.receive(self._link_fd)
        self._is_over = message == b""
        if message:
            self._on_message(message)

    def restore(self) -> None:
        """Undo every turn, in every memcg of the instance."""
        for told in self._knob_file.restore_all():
            sys.stderr.write(f"governor: reflex: {told}\n")


def main(arguments: list[str]) -> None:
    """Entry point: LINK_FD KNOB_FILE SOURCE."""
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # governor says when to go, by closing the link
    ctypes.CDLL(None).prctl(15, b"governor-reflex", 0, 0, 0)  # PR_SET_NAME
    link_fd, knob_path, wanted = arguments
    os.set_blocking(int(link_fd), False)
    reflex = Reflex(int(link_fd), knob_path, wanted)
    gc.disable()
    gc.freeze()
    become_real_time()
    try:
        reflex.run()
    finally:
        reflex.restore()
