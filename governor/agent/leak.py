"""Whether memory leaks, from samples of how much is in use: a verdict, how sure it is, and how fast.

A leak grows steadily; a cache that fills, or a heap that warms up, grows and then does not. So it has to grow over
all samples, and over the second half of them alone at a similar rate. Growth is judged by Mann-Kendall's test
(whether later samples are larger than earlier ones more often than chance makes them, however they are distributed),
the rate by the Theil-Sen estimator (the median slope between two samples, which single peaks do not move).
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

MIN_SAMPLES = 10
_SAMPLES_LIMIT = 512  # pairs of them are compared
_SURE = 0.99
_STEADY_RATIO = 0.5  # of the rate, in the second half
_NOISE_BYTES = 64 << 10


class Verdict(Enum):
    """What the samples say."""

    LEAK = "leak"
    NO_LEAK = "no leak"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Leak:
    """`confidence` (0-1): that it grows, and has not settled; at least 0.99 for a leak."""

    verdict: Verdict
    confidence: float
    bytes_per_s: float
    samples: int
    why: str


Sample = tuple[float, int]  # seconds, bytes


def judge(samples: Sequence[Sample], min_growth_bytes: int = _NOISE_BYTES) -> Leak:
    """From samples in order of time; ten at least, evenly spread at best."""
    taken = len(samples)
    if taken < MIN_SAMPLES:
        return Leak(Verdict.UNKNOWN, 0.0, 0.0, taken, f"{taken} samples, at least {MIN_SAMPLES} are needed")
    thinned = samples[:: -(-taken // _SAMPLES_LIMIT)]
    later = thinned[len(thinned) // 2 :]
    rate, later_rate = _slope(thinned), _slope(later)
    grows, still_grows = _confidence(thinned), _confidence(later)
    seconds = thinned[-1][0] - thinned[0][0]
    growth_bytes, sure = rate * seconds, min(grows, still_grows)

    def leak(verdict: Verdict, why: str) -> Leak:
        return Leak(verdict, sure, rate, taken, why)

    if grows < _SURE or growth_bytes < min_growth_bytes:
        return leak(
            Verdict.NO_LEAK, f"{max(0.0, growth_bytes):,.0f} bytes of growth in {seconds:.1f} s, or only noise"
        )
    if sure >= _SURE and later_rate >= _STEADY_RATIO * rate:
        return leak(Verdict.LEAK, f"steady growth, {rate:,.0f} bytes a second in {seconds:.1f} s")
    settled = still_grows < _SURE and later_rate < _STEADY_RATIO * rate
    why = f"it grew, but in the second half at {max(0.0, later_rate) / rate:.0%} of the rate of all"
    return leak(Verdict.NO_LEAK if settled else Verdict.UNKNOWN, why)


def _slope(samples: Sequence[Sample]) -> float:
    """Theil-Sen, in bytes a second."""
    slopes = [
        (after[1] - before[1]) / (after[0] - before[0])
        for place, before in enumerate(samples)
        for after in samples[place + 1 :]
        if after[0] > before[0]
    ]
    return statistics.median(slopes) if slopes else 0.0


def _confidence(samples: Sequence[Sample]) -> float:
    """That it grows: one less the chance of as many rising pairs without a trend (Mann-Kendall, ties counted)."""
    values = [value for _, value in samples]
    count = len(values)
    rising = sum(
        (after > before) - (after < before) for place, before in enumerate(values) for after in values[place + 1 :]
    )
    ties = sum(same * (same - 1) * (2 * same + 5) for same in Counter(values).values())
    variance = (count * (count - 1) * (2 * count + 5) - ties) / 18
    if rising <= 0 or variance <= 0:
        return 0.0
    return statistics.NormalDist().cdf((rising - 1) / math.sqrt(variance))
