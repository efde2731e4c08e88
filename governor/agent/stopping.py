"""When to stop because memory is nearly full: asked between two chunks by what streams and parses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

SHEDDING = 0.85


class HasRatio(Protocol):
    """What `governor.agent.pressure.MemoryPressure` is, of which no more is needed here."""

    @property
    def ratio(self) -> float:
        """What cannot be reclaimed, as a share of what there is; cheap to ask."""


Pressure = HasRatio | Callable[[], float]


class StoppedByPressure(Exception):
    """Memory is as full as was said to stop at; `done_bytes` were taken before."""

    def __init__(self, ratio: float, stop_at: float, done_bytes: int) -> None:
        super().__init__(
            f"stopped after {done_bytes:,} bytes: {ratio:.3f} of the memory limit is in use, to stop at {stop_at}"
        )
        self.ratio = ratio
        self.stop_at = stop_at
        self.done_bytes = done_bytes

    def __reduce__(self) -> tuple[type[StoppedByPressure], tuple[float, float, int]]:
        """As it is made: a pool of processes breaks over an exception that it cannot hand on."""
        return type(self), (self.ratio, self.stop_at, self.done_bytes)


def check(pressure: Pressure | None, stop_at: float, done_bytes: int) -> None:
    """Raises StoppedByPressure; None never stops."""
    if pressure is not None:
        ratio = pressure() if callable(pressure) else pressure.ratio
        if ratio >= stop_at:
            raise StoppedByPressure(ratio, stop_at, done_bytes)
