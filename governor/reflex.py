"""The real-time half: drains the rings, brakes inside the drain, keeps the loans' deadlines, forwards records.

Started by the governor process with one end of a socket pair; decides nothing beyond the brake. When the other
end is gone it undoes every turn of a knob and exits. Runs with SCHED_FIFO, locked memory and no garbage collector
where it may. Imports ctypes and pure modules only: its resident memory is counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import sys
import time

from governor import bpflib, link, record
from governor.brake import KnobFile, Knobs, Loan
from governor.cgroup import MemoryState, pages
from governor.record import CONFIG_KEY, LEVEL_BRAKE, PPM, Config, Levels, Record, Verified

HEARTBEAT_NS = 1_000_000_000
IDLE_AFTER_NS = 10_000_000_000  # long enough for a reader to be restarted and find its records
VERIFY_GAP_NS = 20_000_000
CONFIRM_SLACK_RATIO = 0.02  # memory.stat may lag by a batch per CPU, and the record counts pages not charged yet
AFTER_LOAN_PPM = 940_000  # where a memcg whose loan was over is braked again
HIGH_MARGIN_BYTES = 512 << 10  # memory.high under the usage would reclaim inside our write
_REALTIME_PRIORITY = 10
_MLOCK = 1 | 2 | 4  # MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT


class Governed:
    """One memcg under the brake."""

    def __init__(self, slot: int, knobs: Knobs, levels: Levels) -> None:
        self.slot = slot
        self.knobs = knobs
        self.base_levels = self.levels = levels
        self.loan = Loan()
        self.epoch = time.monotonic_ns()  # differs from whatever an earlier reader wrote
        self.verified_ns = 0
        self.wants_verify = False
        self.suspect: tuple[Record, int] | None = None  # what froze it and when, until confirmed
        self.last_word = False

    @property
    def key(self) -> bytes:
        """Key in the watch and track maps."""
        return record.CGROUP_ID.pack(self.knobs.memcg.cgroup_id)

    def limit_bytes(self, state: MemoryState) -> int:
        """The smaller of memory.max and what the policy says; 0 without either."""
        chosen = self.levels.max_pages * record.PAGE_BYTES
        found = max(state.max_bytes, 0)
        return min(chosen, found) if chosen and found else chosen or found


class Reflex:
    """All governed memcgs of one instance, its rings, and the link to governor."""

    def __init__(self, link_fd: int, pins_directory: str, knob_path: str) -> None:
        lib = bpflib.open_libbpf()
        self._link_fd = link_fd
        self._unsent: list[bytes] = []
        self._knob_file = KnobFile(knob_path)
        self._governed: dict[int, Governed] = {}  # by cgroup id
        self._suspects: list[Governed] = []
        modules = [
            f"{pins_directory}/{name}"
            for name in ("charge", "stall", "victim")
            if os.path.exists(f"{pins_directory}/{name}/ring")  # noqa: PTH110  no pathlib here
        ]
        if not modules:
            raise OSError(f"found no programs pinned at {pins_directory}; somebody unloaded them")
        self._configs = [bpflib.PinnedMap(lib, f"{module}/config") for module in modules]
        watching = [module for module in modules if not module.endswith("/victim")]
        self._watches = [bpflib.PinnedMap(lib, f"{module}/watch") for module in watching]
        self._tracks = [bpflib.PinnedMap(lib, f"{module}/track") for module in watching]
        self._dropped = [bpflib.PinnedMap(lib, f"{module}/dropped") for module in modules]
        self._cpus = bpflib.possible_cpus()
        self._rings = bpflib.Rings(
            lib, [bpflib.PinnedMap(lib, f"{module}/ring") for module in modules], self._on_record
        )
        self._heartbeat_ns = 0

    # The hot path: from the kernel's record to a frozen memcg.

    def _on_record(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        found = record.decode(data)
        governed = self._governed.get(found.cgroup_id)
        if governed and found.kind == record.CROSSING and found.rising and not governed.knobs.frozen_by_us:
            wanted = found.level >= LEVEL_BRAKE or found.flags & record.HORIZON
            if wanted and governed.suspect is None:
                frozen = governed.knobs.freeze()
                governed.suspect = (found, time.monotonic_ns() if frozen else 0)
                self._suspects.append(governed)
        elif governed and found.kind == record.VERIFY:
            governed.wants_verify = True
        self._tell(link.encode_record(data, now_ns), may_drop=True)

    def _confirm(self, governed: Governed) -> None:
        """Throttle what freezing cannot stop, then ask memory.stat whether the brake was right."""
        assert governed.suspect
        found, frozen_ns = governed.suspect
        governed.suspect = None
        if not frozen_ns and governed.knobs.frozen_by_others():
            return
        usage_bytes, max_bytes = found.usage_pages * record.PAGE_BYTES, found.max_pages * record.PAGE_BYTES
        brake_bytes = governed.levels.engage_ppm[LEVEL_BRAKE - 1] * max_bytes // PPM
        throttled = governed.knobs.set_high(max(brake_bytes, usage_bytes + HIGH_MARGIN_BYTES))
        state = self._verify(governed)
        if state is None:  # gone, or unreadable: nothing may stay held that nobody can judge
            governed.knobs.restore()
            return
        level_ppm = governed.levels.engage_ppm[LEVEL_BRAKE - 1]
        if found.flags & record.HORIZON:
            level_ppm = min(level_ppm, governed.levels.horizon_floor_ppm)
        limit_bytes = governed.limit_bytes(state)
        if state.unreclaimable_bytes < (level_ppm / PPM - CONFIRM_SLACK_RATIO) * limit_bytes:
            governed.knobs.lift_high()
            self._verify(governed, hear_again=True)
            self._thaw(governed, link.FALSE_ALARM)
            return
        if frozen_ns:
            governed.loan.begin(frozen_ns)
            if governed.last_word:
                governed.loan.prolong(frozen_ns + Loan.WINDOW_NS)
        rate = found.fill_rate_bytes
        self._tell(
            link.Braked(
                governed.slot,
                found.ktime_ns,
                frozen_ns,
                state,
                -1 if rate is None else rate,
                found.pid,
                bool(frozen_ns),
                throttled,
            ).encode()
        )

    def _verify(self, governed: Governed, hear_again: bool = False) -> MemoryState | None:
        """Read memory.stat and let the kernel side start from what it says.

        With `hear_again`, levels that lie behind are reported again if they still hold.
        """
        governed.epoch += hear_again
        governed.wants_verify = False
        governed.verified_ns = time.monotonic_ns()
        track = self._tracks[0].lookup(governed.key, record.TRACK.size)
        state = governed.knobs.memcg.memory_state()
        if state is None or track is None:
            return None
        brake_bytes = governed.limit_bytes(state) * governed.levels.engage_ppm[LEVEL_BRAKE - 1] // PPM
        room_pages = pages(max(0, brake_bytes - state.unreclaimable_bytes))
        ask_after_pages = max(64, room_pages // 2) if brake_bytes else 0
        verified = Verified(pages(state.unreclaimable_bytes), record.charged_pages(track), ask_after_pages)
        value = record.encode_watch(governed.levels, verified, governed.epoch)
        for watch in self._watches:
            watch.update(governed.key, value)
        return state

    def _thaw(self, governed: Governed, reason: int) -> None:
        now_ns = time.monotonic_ns()
        governed.loan.end(now_ns)
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
            if governed := self._by_slot(asked.slot):
                self._thaw_as_asked(governed, asked)
        else:
            slot, ns = link.decode_slot(data)
            governed = self._by_slot(slot)
            if governed and kind == link.BRAKE:
                self._brake_as_asked(governed)
            elif governed and kind == link.PROLONG:
                governed.loan.prolong(ns)
            elif governed and kind == link.DROP:
                self._drop(governed)

    def _by_slot(self, slot: int) -> Governed | None:
        return next((g for g in self._governed.values() if g.slot == slot), None)

    def _adopt(self, slot: int, levels: Levels) -> None:
        knobs = self._knob_file.knobs(slot)
        if knobs is None:
            self._tell(link.Adopted(slot, False).encode())
            return
        governed = Governed(slot, knobs, levels)
        self._governed[knobs.memcg.cgroup_id] = governed
        for track in self._tracks:
            if track.lookup(governed.key, record.TRACK.size) is None:
                track.update(governed.key, bytes(record.TRACK.size))
        watched = self._verify(governed, hear_again=True) is not None
        self._tell(link.Adopted(slot, watched).encode())

    def _set_levels(self, slot: int, levels: Levels) -> None:
        if governed := self._by_slot(slot):
            governed.base_levels = governed.levels = levels
            self._verify(governed, hear_again=True)

    def _thaw_as_asked(self, governed: Governed, asked: link.Thaw) -> None:
        governed.last_word = asked.last_word
        self._brake_at(governed, asked.brake_ppm, asked.heed_horizon)
        if asked.high_bytes > 0:
            governed.knobs.set_high(asked.high_bytes)
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
        throttled = governed.knobs.set_high(state.usage_bytes + HIGH_MARGIN_BYTES)
        if frozen:
            governed.loan.begin(now_ns)
        self._tell(link.Braked(governed.slot, 0, now_ns if frozen else 0, state, -1, 0, frozen, throttled).encode())

    def _drop(self, governed: Governed) -> None:
        del self._governed[governed.knobs.memcg.cgroup_id]
        for table in (*self._watches, *self._tracks):
            table.delete(governed.key)
        governed.knobs.release()

    # Time.

    def _tick(self, now_ns: int) -> None:
        for governed in self._governed.values():
            if governed.loan.deadline_ns is not None and now_ns >= governed.loan.deadline_ns:
                self._brake_at(governed, max(governed.levels.engage_ppm[LEVEL_BRAKE - 1], AFTER_LOAN_PPM), False)
                self._thaw(governed, link.LOAN_OVER)
            if governed.wants_verify and now_ns - governed.verified_ns >= VERIFY_GAP_NS:
                self._verify(governed)
        if now_ns - self._heartbeat_ns >= HEARTBEAT_NS:
            self._heartbeat_ns = now_ns
            value = Config(heartbeat_ns=now_ns, idle_after_ns=IDLE_AFTER_NS).encode()
            for config in self._configs:
                config.update(CONFIG_KEY, value)
            self._tell(link.Alive(now_ns, self._dropped_records()).encode(), may_drop=True)

    def _dropped_records(self) -> int:
        total = 0
        for table in self._dropped:
            if values := table.lookup(CONFIG_KEY, 8 * self._cpus):
                total += sum(int.from_bytes(values[i : i + 8], sys.byteorder) for i in range(0, len(values), 8))
        return total

    def _next_deadline_ns(self) -> int:
        deadlines = [self._heartbeat_ns + HEARTBEAT_NS]
        for governed in self._governed.values():
            if governed.loan.deadline_ns is not None:
                deadlines.append(governed.loan.deadline_ns)
            if governed.wants_verify:
                deadlines.append(governed.verified_ns + VERIFY_GAP_NS)
        return min(deadlines)

    def _tell(self, message: bytes, may_drop: bool = False) -> None:
        sent = not self._unsent and link.send(self._link_fd, message)
        if not sent and not may_drop:
            self._unsent.append(message)

    def run(self) -> None:
        """Until governor is gone. Raises nothing of one memcg's: it loses its brake, the others keep theirs."""
        poller = select.poll()
        poller.register(self._rings.fd, select.POLLIN)
        poller.register(self._link_fd, select.POLLIN)
        while True:
            now_ns = time.monotonic_ns()
            self._tick(now_ns)
            timeout_ms = max(0, -(-(self._next_deadline_ns() - now_ns) // 1_000_000))
            ready = [fd for fd, _ in poller.poll(timeout_ms)]
            if self._rings.fd in ready:
                self._rings.drain()
                for governed in self._suspects:
                    self._confirm(governed)
                self._suspects.clear()
            while self._unsent and link.send(self._link_fd, self._unsent[0]):
                self._unsent.pop(0)
            if self._link_fd in ready:
                message = link.receive(self._link_fd)
                if message == b"":
                    return
                if message:
                    self._on_message(message)
            if not ready:
                gc.collect(0)

    def restore(self) -> None:
        """Undo every turn, in every memcg of the instance."""
        for told in self._knob_file.restore_all():
            sys.stderr.write(f"governor: reflex: {told}\n")


def become_real_time() -> None:
    """SCHED_FIFO, locked memory, spared by the OOM killer: each where the kernel lets us."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_REALTIME_PRIORITY))
        # A loop gone wild must not take a CPU away: after 0.2 s without sleeping, SIGXCPU makes us normal.
        signal.signal(signal.SIGXCPU, lambda *_: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)))
        resource.setrlimit(resource.RLIMIT_RTTIME, (200_000, 1_000_000))
    except OSError:
        pass  # an ordinary container may not; the brake is slower under load, as the README says
    if resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY:
        ctypes.CDLL(None).mlockall(_MLOCK)
    try:
        with open("/proc/self/oom_score_adj", "w") as adjust:  # noqa: PTH123  no pathlib here
            adjust.write("-900")
    except OSError:
        pass  # lowering it wants CAP_SYS_RESOURCE


def main(arguments: list[str]) -> None:
    """Entry point: LINK_FD PINS_DIRECTORY KNOB_FILE."""
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # governor says when to go, by closing the link
    ctypes.CDLL(None).prctl(15, b"governor-reflex", 0, 0, 0)  # PR_SET_NAME
    link_fd, pins_directory, knob_path = arguments
    os.set_blocking(int(link_fd), False)
    reflex = Reflex(int(link_fd), pins_directory, knob_path)
    gc.disable()
    gc.freeze()
    become_real_time()
    try:
        reflex.run()
    finally:
        reflex.restore()
