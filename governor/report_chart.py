"""What an SVG picture is made of, its scale from time and bytes, and its axes. Pure values; knows of no episode."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from governor.policy import SECOND


@dataclass(frozen=True, slots=True)
class Shape:
    """A path, or a rectangle's x and width as `x` and `width`; `title` is read out and shown by a pointer."""

    css: str
    title: str
    path: str = ""
    x: float = 0
    width: float = 0


@dataclass(frozen=True, slots=True)
class Label:
    """Text at a place; `line` is the y that it is about, where it had to move."""

    x: float
    y: float
    text: str
    css: str = ""
    line: float = 0


@dataclass(frozen=True, slots=True)
class Flag:
    """What was done: `lines` are the x of each, `text` its numbers in the trace."""

    x: float
    width: float
    text: str
    css: str
    title: str
    lines: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Mark:
    """A crossing."""

    x: float
    y: float
    rising: bool
    title: str


@dataclass(frozen=True, slots=True)
class Scale:
    """From time and bytes to the picture."""

    from_ns: int
    to_ns: int
    top_bytes: float
    left: float
    right: float
    top: float
    bottom: float

    def x(self, at_ns: int) -> float:
        """Where a moment is; what is outside is at the edge."""
        share = (at_ns - self.from_ns) / (self.to_ns - self.from_ns)
        return round(self.left + min(1.0, max(0.0, share)) * (self.right - self.left), 1)

    def y(self, size_bytes: float) -> float:
        """Where so many bytes are; what is outside is at the edge."""
        share = min(1.0, max(0.0, size_bytes / self.top_bytes))
        return round(self.bottom - share * (self.bottom - self.top), 1)


@dataclass(frozen=True, slots=True)
class Chart:
    """Everything of one picture, in its own units."""

    css: str  # wide or narrow
    width: int
    height: int
    scale: Scale
    description: str
    areas: tuple[Shape, ...]
    counted: str  # path of the upper edge of what counts
    levels: tuple[Shape, ...]
    level_labels: tuple[Label, ...]
    holds: tuple[Shape, ...]
    crossings: tuple[Mark, ...]
    flags: tuple[Flag, ...]
    x_ticks: tuple[Label, ...]
    y_ticks: tuple[Label, ...]


def x_ticks(zero_ns: int, scale: Scale, count: int) -> Iterable[Label]:
    """About so many, counted from `zero_ns`."""
    step_ns = _step((scale.to_ns - scale.from_ns) / count)
    at_ns = zero_ns - (zero_ns - scale.from_ns) // step_ns * step_ns
    while at_ns <= scale.to_ns:
        yield Label(scale.x(at_ns), scale.bottom + 18, _tick(at_ns - zero_ns, step_ns))
        at_ns += step_ns


def _tick(span_ns: int, step_ns: int) -> str:
    seconds = span_ns / SECOND
    if step_ns >= 60 * SECOND:
        return f"{seconds / 60:g} min"
    return f"{seconds:g} s"


def _step(least_ns: float) -> int:
    """1, 2 or 5 of a decimal of a second, or whole minutes, at least so long."""
    for step_s in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600):
        if step_s * SECOND >= least_ns:
            return int(step_s * SECOND)
    return (int(least_ns / (3600 * SECOND)) + 1) * 3600 * SECOND


def y_ticks(scale: Scale) -> Iterable[Label]:
    """Powers of two, five at most."""
    step_bytes = 1.0
    while scale.top_bytes / step_bytes > 5:
        step_bytes *= 2
    for number in range(int(scale.top_bytes / step_bytes) + 1):
        yield Label(scale.left - 8, scale.y(number * step_bytes), _bytes_tick(number * step_bytes))


def _bytes_tick(size_bytes: float) -> str:
    """Steps are powers of two: short, and never rounded."""
    units = (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
    return next((f"{size_bytes / unit:g} {name}" for name, unit in units if size_bytes >= unit), f"{size_bytes:g}")
