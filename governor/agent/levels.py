"""When an agent sheds load, and how often it looks: statuses with hysteresis and the pace of polling. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass

INTERVAL_MIN_S, INTERVAL_MAX_S = 0.01, 30.0
# Per second. What a program may do that was quiet for hours; its tools do more, and that only governor hears in time.
LEAST_WORST_BYTES = 256 << 20
_LOOKS_BEFORE_CRITICAL = 4


class Status(enum.IntEnum):
    """How near the end is; they compare."""

    OK = 0
    WARNING = 1
    SHEDDING = 2
    CRITICAL = 3

    def __str__(self) -> str:
        return self.name.lower()


@dataclass(frozen=True, slots=True)
class Levels:
    """The ratios at which a status is reached, and how far below them it is left."""

    warning_ratio: float = 0.75
    shedding_ratio: float = 0.85
    critical_ratio: float = 0.92
    release_ratio: float = 0.05

    def __post_init__(self) -> None:
        if not 0 < self.warning_ratio < self.shedding_ratio < self.critical_ratio <= 1:
            raise ValueError(f"found {self}, expected 0 < warning < shedding < critical <= 1")
        if not 0 <= self.release_ratio < self.warning_ratio:
            raise ValueError(f"found release_ratio {self.release_ratio}, expected 0 or more, and less than warning")

    def status(self, ratio: float, before: Status) -> Status:
        """The status at this ratio; one that was reached is left under its release level only."""
        engage = (self.warning_ratio, self.shedding_ratio, self.critical_ratio)
        reached = (i for i, level in enumerate(engage) if ratio >= level - (self.release_ratio if i < before else 0))
        return Status(max((i + 1 for i in reached), default=0))


class Pace:
    """How long not to look: a quarter of the time to critical, or past it to max, at the worst rate ever seen."""

    def __init__(self, levels: Levels) -> None:
        self._levels = levels
        self.worst_rate_bytes = float(LEAST_WORST_BYTES)  # per second
        self._seen: tuple[float, int] | None = None
        self._bound_by = ""

    def next_s(self, unreclaimable_bytes: int, max_bytes: int, now_s: float, bound_by: str = "") -> float:
        """Between 10 ms and 30 s from a look at `now_s`, monotonic; another memcg's figure is no growth."""
        if self._seen is None or bound_by != self._bound_by:
            self._seen, self._bound_by = (now_s, unreclaimable_bytes), bound_by
        elif (elapsed_s := now_s - self._seen[0]) >= INTERVAL_MIN_S / 2:  # over less, rates are noise
            self.worst_rate_bytes = max(self.worst_rate_bytes, (unreclaimable_bytes - self._seen[1]) / elapsed_s)
            self._seen = now_s, unreclaimable_bytes
        room_bytes = self._levels.critical_ratio * max_bytes - unreclaimable_bytes
        if room_bytes <= 0:
            room_bytes = max_bytes - unreclaimable_bytes
        wait_s = room_bytes / (_LOOKS_BEFORE_CRITICAL * self.worst_rate_bytes)
        return max(INTERVAL_MIN_S, min(INTERVAL_MAX_S, wait_s))
