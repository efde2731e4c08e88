"""What reflex keeps of one memcg under the brake. Imported by the real-time process."""

from __future__ import annotations

import time
from collections.abc import Callable

from governor import record
from governor.brake import Knobs
from governor.limits import Limits
from governor.loan import Loan
from governor.poll_source import PollSource
from governor.poller import Poller
from governor.record import Levels, Record

VERIFY_GAP_NS = 20_000_000


class Governed:
    """One memcg under the brake."""

    def __init__(
        self,
        slot: int,
        knobs: Knobs,
        levels: Levels,
        poller: Poller,
        with_psi: bool,
        on_stir: Callable[[Governed], None],
        with_stalls: bool,
    ) -> None:
        self.slot = slot
        self.knobs = knobs
        self.limits = Limits(knobs.memcg)
        now_ns = time.monotonic_ns()
        self.poll = PollSource(self.limits, poller, with_psi, now_ns, lambda _: on_stir(self), with_stalls)
        self.loan = Loan()
        self.epoch = time.monotonic_ns()  # differs from whatever an earlier reader wrote
        self.verified_ns = 0
        self.wants_verify = False
        self.watched: set[int] = set()  # cgroup ids that BPF watches for it: its own, ancestors with a limit
        self.crowded_out = False  # BPF has no room to watch all of them: it is polled
        self.suspect: tuple[Record, int] | None = None  # what froze it and when, until confirmed
        self.last_word = False
        self.told = (0, 0)  # source and brake, as governor knows them
        self.set_levels(levels)

    @property
    def due_ns(self) -> int:
        """When it is to be looked after next."""
        times = [self.poll.due_ns]
        if self.loan.deadline_ns is not None:
            times.append(self.loan.deadline_ns)
        if self.wants_verify:
            times.append(self.verified_ns + VERIFY_GAP_NS)
        return min(times)

    def close(self) -> None:
        """Close everything; no knob is turned."""
        self.poll.close()
        self.knobs.close()
        self.limits.close()

    def set_levels(self, levels: Levels) -> None:
        """The policy's levels and limit."""
        self.base_levels = self.levels = levels
        self.limits.chosen_bytes = levels.max_pages * record.PAGE_BYTES
