"""Figures as a post-mortem says them: bytes, durations, rates, clock times. Pure."""

from __future__ import annotations

from datetime import UTC, datetime

MS = 1_000_000
SECOND = 1_000_000_000
_MIB = 1 << 20
_GIB = 1 << 30


def size(size_bytes: float) -> str:
    """Bytes in the unit that reads best, two to four digits."""
    if abs(size_bytes) >= 4 * _GIB:
        return f"{size_bytes / _GIB:.1f} GiB"
    mib = size_bytes / _MIB
    if abs(mib) < 0.05:
        return "0 MiB"
    return f"{mib:.1f} MiB" if abs(mib) < 10 else f"{mib:.0f} MiB"


def percent(ratio: float) -> str:
    """A share of max."""
    return f"{100 * ratio:.1f} %"


def duration(span_ns: float) -> str:
    """How long something took."""
    seconds = span_ns / SECOND
    if abs(seconds) < 0.01:
        return f"{seconds * 1000:.2f} ms"
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    if abs(seconds) < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if abs(seconds) < 7200 else f"{seconds / 3600:.1f} h"


def rate(rate_bytes: float) -> str:
    """Bytes per second."""
    return f"{size(rate_bytes)}/s"


def clock(at_ns: int) -> str:
    """The time of day, UTC, to the millisecond."""
    return _utc(at_ns).strftime("%H:%M:%S.") + f"{at_ns // MS % 1000:03d}"


def moment(at_ns: int) -> str:
    """Day and time of day, UTC, to the second."""
    return _utc(at_ns).strftime("%Y-%m-%d %H:%M:%S UTC")


def offset(span_ns: int) -> str:
    """Before or after the reference of a table."""
    seconds = span_ns / SECOND
    return f"{seconds:+.3f} s" if abs(seconds) < 600 else f"{seconds / 60:+.1f} min"


def plural(count: int, what: str, many: str = "") -> str:
    """A number and what is counted."""
    return f"{count} {what if count == 1 else many or what + 's'}"


def times(count: int) -> str:
    """How often."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _utc(at_ns: int) -> datetime:
    return datetime.fromtimestamp(at_ns // SECOND, UTC)
