"""Holds a memcg that fills and lets it go again: upon a crossing, by order of governor, at the end of a loan.

Decides nothing beyond that. Imported by the real-time process.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from governor import link, record
from governor.bpf_watches import BpfWatches
from governor.cgroup import MemoryState
from governor.governed import Governed
from governor.levels import CONFIRM_SLACK_RATIO
from governor.loan import Loan
from governor.record import LEVEL_BRAKE, PPM, Record
from governor.schedule import Schedule

AFTER_LOAN_PPM = 940_000  # where a memcg whose loan was over is braked again
HIGH_MARGIN_BYTES = 512 << 10  # memory.high under the usage would reclaim inside our write


class Braking:
    """Of all governed memcgs of one instance; `tell` takes what governor is to hear."""

    def __init__(self, watches: BpfWatches, schedule: Schedule[int], tell: Callable[[bytes], None]) -> None:
        self._watches, self._schedule, self._tell = watches, schedule, tell
        self.suspects: list[Governed] = []  # held, and not confirmed yet

    # From a crossing to a frozen memcg.

    def on_crossing(self, governed: Governed, found: Record) -> None:
        """From any source: hold what rises to the brake level, or is about to; _confirm follows."""
        wanted = found.level >= LEVEL_BRAKE or found.flags & record.HORIZON
        if not governed.levels.holds:
            return
        if found.rising and wanted and governed.suspect is None and not governed.knobs.frozen_by_us:
            frozen = governed.knobs.freeze()
            governed.suspect = (found, time.monotonic_ns() if frozen else 0)
            self.suspects.append(governed)

    def confirm_all(self) -> None:
        """Of every suspect: was it right to hold it?"""
        while self.suspects:
            self._confirm(self.suspects.pop(0))

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
        state = self.verify(governed)
        if state is None:  # gone, or unreadable: nothing may stay held that nobody can judge
            governed.knobs.restore()
            return
        level_ppm = governed.levels.engage_ppm[LEVEL_BRAKE - 1]
        if found.flags & record.HORIZON:
            level_ppm = min(level_ppm, governed.levels.horizon_floor_ppm)
        # A memcg that sits still is charged a batch of pages now and then, which may be what crossed a limit above.
        is_anothers = found.cgroup_id != governed.limits.cgroup_id and not governed.limits.is_ours
        if is_anothers or state.unreclaimable_bytes < (level_ppm / PPM - CONFIRM_SLACK_RATIO) * state.max_bytes:
            governed.knobs.lift_high()
            if not is_anothers:  # whose next page would be another false alarm
                self.verify(governed, hear_again=True)
            # The kernel's bound is useless here for a while, or whoever grows was not heard.
            for one in {governed, *self._watches.watchers(found.cgroup_id)}:
                one.poll.hurry(found.ktime_ns)
                self.plan(one)
            self._thaw(governed, link.FALSE_ALARM)
            return
        if frozen_ns:
            governed.loan.begin(frozen_ns)
            if governed.last_word:
                governed.loan.prolong(frozen_ns + Loan.WINDOW_NS)
            self.plan(governed)
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

    def verify(self, governed: Governed, hear_again: bool = False) -> MemoryState | None:
        """Read memory.stat and let the kernel side start from what it says.

        With `hear_again`, levels that lie behind are reported again if they still hold.
        """
        governed.wants_verify = False
        governed.verified_ns = time.monotonic_ns()
        if hear_again:
            governed.epoch += 1
            governed.poll.forget()
        seen = self._watches.verify(governed)
        self.plan(governed)
        return next((one.state for one in seen if one.memcg is governed.limits.tightest), None)

    def _thaw(self, governed: Governed, reason: int) -> None:
        now_ns = time.monotonic_ns()
        governed.loan.end(now_ns)
        self.plan(governed)
        if governed.knobs.thaw():
            self._tell(link.Thawed(governed.slot, now_ns, reason).encode())

    def plan(self, governed: Governed) -> None:
        """To be called whenever one of its times has changed."""
        self._schedule.set(governed.slot, governed.due_ns)

    def loan_over(self, governed: Governed) -> None:
        """Nobody has decided: it goes on, and is held again where it is fuller."""
        self._brake_at(governed, max(governed.levels.engage_ppm[LEVEL_BRAKE - 1], AFTER_LOAN_PPM), False)
        self._thaw(governed, link.LOAN_OVER)

    # By order of governor.

    def thaw_as_asked(self, governed: Governed, asked: link.Thaw) -> None:
        """Let it go on as decided."""
        governed.last_word = asked.last_word
        self._brake_at(governed, asked.brake_ppm, asked.heed_horizon)
        own_high_bytes = governed.limits.own_high_bytes(asked.high_bytes) if asked.high_bytes > 0 else 0
        if own_high_bytes > 0:  # below its usage the kernel would reclaim within the write: governor has done that
            least_bytes = governed.limits.own_usage_bytes() + HIGH_MARGIN_BYTES
            governed.knobs.set_high(max(own_high_bytes, least_bytes))
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
        self.verify(governed, hear_again=True)

    def brake_as_asked(self, governed: Governed) -> None:
        """Hold it, though no crossing was heard."""
        if governed.knobs.frozen_by_us or governed.knobs.frozen_by_others():
            return
        frozen = governed.knobs.freeze()
        now_ns = time.monotonic_ns()
        state = self.verify(governed)
        if state is None:
            governed.knobs.thaw()
            return
        throttled = self._throttle(governed, HIGH_MARGIN_BYTES)
        if frozen:
            governed.loan.begin(now_ns)
            self.plan(governed)
        self._tell(
            link.Braked(governed.slot, 0, now_ns if frozen else 0, state, -1, -1, 0, frozen, throttled).encode()
        )
