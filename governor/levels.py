"""Crossings decided in user space: levels with hysteresis, fill rate and time to max, and how often to look.

The same rules as `look()` in bpf/charge.bpf.c, for memcgs that no BPF program watches. Pure: reads no file and no
clock. Imported by the real-time process.
"""

from __future__ import annotations

from typing import NamedTuple

from governor.record import HORIZON, LEVELS, PPM, RISING, Levels

SECOND_NS = 1_000_000_000
INTERVAL_MIN_NS, INTERVAL_MAX_NS = 10_000_000, SECOND_NS
# Per second: a tool call may do that in a memcg that was quiet for hours, so no memcg is ever known to be slower.
LEAST_WORST_BYTES = 1_000_000_000
CONFIRM_SLACK_RATIO = 0.02  # memory.stat may lag by a batch per CPU, and the record counts pages not charged yet
CHARGE_BYTES = 64 * 4096  # the kernel's batch: less growth than this is none
_SPAN_BYTES = 16 * CHARGE_BYTES  # growth is put down to memcgs below in such parts
_OWN_LEAST_BYTES = 3 * CHARGE_BYTES  # what is charged and not used yet may be as much on two CPUs
_LATE_RATIO = 0.93
_RATE_WINDOW_NS = 4_000_000
_TREND_NS = 250_000_000
_TREND_LEAST_NS = 1_000_000


class Crossing(NamedTuple):
    """A level was crossed, or max is near in time; `flags` as in a record, the rate in bytes per second."""

    level: int
    flags: int
    fill_rate_bytes: int | None
    time_to_max_ns: int | None  # None: unknown, or not growing
    trend_bytes: int | None  # per second over 250 ms or more, or since the levels were forgotten


def level_of(levels: Levels, ppm: int, before: int) -> int:
    """The level at so many millionths of max; one that was reached is left under its release level only."""
    reached = [
        i + 1 for i in range(LEVELS) if ppm >= levels.engage_ppm[i] or (i < before and ppm >= levels.release_ppm[i])
    ]
    return reached[-1] if reached else 0


def interval_ns(headroom_bytes: int, worst_rate_bytes: int) -> int:
    """How long not to look: headroom to max / (4 x the worst rate seen, 1 GB/s at least), between 10 ms and 1 s."""
    wait_ns = max(0, headroom_bytes) * SECOND_NS // (4 * max(LEAST_WORST_BYTES, worst_rate_bytes))
    return max(INTERVAL_MIN_NS, min(INTERVAL_MAX_NS, wait_ns))


class Share:
    """Whose growth is it: that of a memcg, or of others below the one above it whose limit both share?

    Over the last 4 to 8 MiB of it. A memcg that sits still is charged a batch of pages on each CPU where it wakes,
    and gives it back when another one is charged there (refill_stock): beside less than that it seems to grow too.
    Where the one above is so full that nobody's half was enough (of several that grow alike), whoever grows counts.
    """

    def __init__(self) -> None:
        self._bases: list[tuple[int, int]] = []  # growth counts from the first, the next time from the second

    def look(self, held_bytes: int, part_bytes: int, ratio: float) -> bool:
        """Whether the part has grown by half of what all of it has, and by more than it may seem to.

        `ratio`: how full the one above is.
        """
        here = (held_bytes, part_bytes)
        self._bases = [(min(base[0], held_bytes), min(base[1], part_bytes)) for base in self._bases] or [here, here]
        if held_bytes - self._bases[1][0] >= _SPAN_BYTES:
            self._bases = [self._bases[1], here]
        grown_bytes, part_grown_bytes = held_bytes - self._bases[0][0], part_bytes - self._bases[0][1]
        is_half = 2 * part_grown_bytes >= grown_bytes or ratio >= _LATE_RATIO
        return is_half and part_grown_bytes >= _OWN_LEAST_BYTES


class Track:
    """What was last seen of one memcg with a limit."""

    def __init__(self) -> None:
        self.level = 0
        self.fill_rate_bytes: int | None = None
        self.worst_rate_bytes = 0  # ever seen
        self._near = False
        self._base_bytes: int | None = None  # growth counts from here
        self._max_bytes = 0
        self._window: tuple[int, int] | None = None  # where the window of the fill rate began: (ns, bytes)
        self._trend: list[tuple[int, int]] = []  # where that of the trend began, and where the next one will have

    def forget(self) -> None:
        """Levels that lie behind are reported again, at the next growth."""
        self.level = 0
        self._near = False
        self._trend = []

    def told(self, level: int, near: bool) -> None:
        """Somebody else reported this level: it need not be reported again."""
        self.level, self._near = level, near

    def look(
        self, levels: Levels, held_bytes: int, max_bytes: int, now_ns: int, ours: bool = True
    ) -> Crossing | None:
        """What a look at the unreclaimable bytes shows; `ours`: their growth is that of the memcg that would be held.

        As in the kernel only growth is reported as rising: a full memcg that stands still is no burst. A limit that
        changed counts as growth. What is not ours is not reported as rising, now: the next growth that is reports it.
        """
        rate, trend = self._measure(held_bytes, now_ns), self._slope(held_bytes, now_ns)
        base_bytes = held_bytes if self._base_bytes is None else min(self._base_bytes, held_bytes)
        grown = held_bytes - base_bytes >= CHARGE_BYTES or 0 < self._max_bytes != max_bytes
        self._base_bytes = held_bytes if grown else base_bytes
        self._max_bytes = max_bytes
        if max_bytes <= 0:
            return None
        time_to_max_ns = max(0, max_bytes - held_bytes) * SECOND_NS // rate if rate else None
        ppm = held_bytes * PPM // max_bytes
        level = level_of(levels, ppm, self.level)
        near = time_to_max_ns is not None and time_to_max_ns < levels.horizon_ns and ppm >= levels.horizon_floor_ppm
        if self._near and (time_to_max_ns is None or time_to_max_ns > 2 * levels.horizon_ns):
            self._near = False
        rising = level > self.level or (near and not self._near)
        unheeded = not (grown and ours) if rising else level == self.level
        if unheeded:
            return None
        self.level, self._near = level, self._near or near
        flags = (RISING if rising else 0) | (HORIZON if near else 0)
        return Crossing(level, flags, rate, time_to_max_ns, trend)

    def _measure(self, held_bytes: int, now_ns: int) -> int | None:
        """Growth in bytes per second since a look that is long enough ago; None at the first."""
        if self._window is None:
            self._window = (now_ns, held_bytes)
        since_ns, since_bytes = self._window
        if now_ns - since_ns >= _RATE_WINDOW_NS:
            self.fill_rate_bytes = max(0, held_bytes - since_bytes) * SECOND_NS // (now_ns - since_ns)
            self._window = (now_ns, held_bytes)
            self.worst_rate_bytes = max(self.worst_rate_bytes, self.fill_rate_bytes)
        return self.fill_rate_bytes

    def _slope(self, held_bytes: int, now_ns: int) -> int | None:
        """Growth in bytes per second since a look that is a quarter of a second ago, or the first; None at that."""
        here = (now_ns, held_bytes)
        if not self._trend:
            self._trend = [here, here]
            return None
        if now_ns - self._trend[1][0] >= _TREND_NS:
            self._trend = [self._trend[1], here]
        self._trend = [(ns, min(at_bytes, held_bytes)) for ns, at_bytes in self._trend]
        since_ns, since_bytes = self._trend[0]
        return max(0, held_bytes - since_bytes) * SECOND_NS // max(_TREND_LEAST_NS, now_ns - since_ns)
