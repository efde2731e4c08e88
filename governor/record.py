"""The records and map values that the BPF programs and user space exchange: `bpf/record.h` in Python.

Pure: bytes in, tuples out. `tests/unit/test_record.py` compiles the header and compares every offset with this
file. Named tuples rather than dataclasses, because the real-time process imports this module.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

PAGE_BYTES = 4096
PPM = 1_000_000

# enum record_kind
CROSSING, VERIFY, STALL, OOM_KILL = 1, 2, 3, 4
# enum record_flag
RISING, HORIZON = 1, 2
# enum record_valid
HAS_MEMORY, HAS_RATE, HAS_STALL, HAS_TREND = 1, 2, 4, 8

LEVELS = 4
LEVEL_COMPACT, LEVEL_ARM, LEVEL_BRAKE, LEVEL_LAST = 1, 2, 3, 4
KIND_NAMES = {CROSSING: "crossing", STALL: "stall", OOM_KILL: "oom_kill"}
LEVEL_NAMES = ("below", "compact", "arm", "brake", "last")

_RECORD = struct.Struct("=QQIIIIIIQQQQQQQQ")
_CONFIG = struct.Struct("=QQQQQ")
_WATCH = struct.Struct(f"=Q{LEVELS}Q{LEVELS}QQQQQQQQ")
WATCH_BYTES = _WATCH.size
TRACK = struct.Struct("=17Q")
CGROUP_ID = struct.Struct("=Q")
CONFIG_KEY = struct.pack("=I", 0)
RECORD_BYTES = _RECORD.size


class Record(NamedTuple):
    """One record from a ring; see `struct record` for the meaning and unit of each field."""

    ktime_ns: int
    cgroup_id: int
    kind: int
    flags: int
    valid: int
    level: int
    pid: int
    tid: int
    usage_pages: int
    bound_pages: int
    max_pages: int
    charged_pages: int
    fill_rate_pages: int
    time_to_max_ns: int
    stall_ns: int
    trend_pages: int

    def encode(self) -> bytes:
        """The bytes, as a ring would hold them."""
        return _RECORD.pack(*self)

    @property
    def rising(self) -> bool:
        """Whether the crossing went upwards, or max came near."""
        return bool(self.flags & RISING)

    @property
    def bound_ratio(self) -> float:
        """Upper bound of the unreclaimable share of max, 0 to 1; 0 where the record holds no memory group."""
        return self.bound_pages / self.max_pages if self.valid & HAS_MEMORY and self.max_pages else 0.0

    @property
    def fill_rate_bytes(self) -> int | None:
        """Bytes per second over a few milliseconds, None where it is unknown."""
        return self.fill_rate_pages * PAGE_BYTES if self.valid & HAS_RATE else None

    @property
    def trend_bytes(self) -> int | None:
        """Bytes per second over about a third of a second, None where it is unknown."""
        return self.trend_pages * PAGE_BYTES if self.valid & HAS_TREND else None


def decode(data: bytes) -> Record:
    """Decode one record; raises ValueError when it has another size than this version of the programs writes."""
    if len(data) != RECORD_BYTES:
        raise ValueError(f"found a record of {len(data)} bytes, expected {RECORD_BYTES}: other BPF programs?")
    return Record._make(_RECORD.unpack(data))


class Config(NamedTuple):
    """`struct config`: switches of one module."""

    heartbeat_ns: int
    idle_after_ns: int
    rate_window_ns: int = 4_000_000
    stall_window_ns: int = 200_000_000
    enabled: int = 1

    def encode(self) -> bytes:
        """The map value."""
        return _CONFIG.pack(*self)

    @classmethod
    def size_bytes(cls) -> int:
        """Size of the map value."""
        return _CONFIG.size


class Levels(NamedTuple):
    """Where crossings are reported, in millionths of max, and when max is near in time."""

    engage_ppm: tuple[int, int, int, int] = (700_000, 850_000, 900_000, 970_000)
    release_ppm: tuple[int, int, int, int] = (650_000, 800_000, 850_000, 950_000)
    horizon_ns: int = 100_000_000
    horizon_floor_ppm: int = 700_000
    stall_engage_ns: int = 100_000_000
    max_pages: int = 0
    holds: bool = True  # False: what reaches the brake level is only told of


class Verified(NamedTuple):
    """What `memory.stat` said of the unreclaimable pages, and at how many charged pages it said so."""

    pages: int
    at_charged_pages: int
    verify_after_pages: int


def encode_watch(levels: Levels, verified: Verified, epoch: int) -> bytes:
    """`struct watch`."""
    return _WATCH.pack(
        levels.max_pages,
        *levels.engage_ppm,
        *levels.release_ppm,
        levels.horizon_ns,
        levels.horizon_floor_ppm,
        *verified,
        levels.stall_engage_ns,
        epoch,
    )


_TRACK_CHARGED = 0
_TRACK_STALL_NS = 8


def charged_pages(track: bytes) -> int:
    """Pages charged so far, from `struct track`."""
    return int(TRACK.unpack(track)[_TRACK_CHARGED])


def stall_ns(track: bytes) -> int:
    """Nanoseconds stalled so far, from `struct track`."""
    return int(TRACK.unpack(track)[_TRACK_STALL_NS])
