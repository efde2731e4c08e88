"""What reflex and governor say to each other: one datagram a message, on a SOCK_SEQPACKET pair.

The kind is the first byte, a fixed struct follows. End of file on the pair means that the other process died.
Imported by the real-time process.
"""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from governor.cgroup import MemoryState
from governor.record import LEVELS, RECORD_BYTES, Levels, Record, decode

MESSAGE_BYTES = 512

# governor to reflex
ADOPT, BRAKE, THAW, PROLONG, SET_LEVELS, AGENT, OPEN_PINS, RELEASE = 1, 2, 3, 4, 5, 6, 7, 8
# reflex to governor
RECORD, BRAKED, THAWED, ALIVE, ADOPTED, SOURCE, REFUSED, RELEASED = 16, 17, 18, 19, 20, 21, 22, 23

# Why a memcg was thawed
FALSE_ALARM, LOAN_OVER, ASKED = 1, 2, 3
THAW_REASONS = {FALSE_ALARM: "false alarm", LOAN_OVER: "the loan was over", ASKED: "as decided"}

_LEVELS = struct.Struct(f"=BI{LEVELS}I{LEVELS}IQQQQ?")
_THAW = struct.Struct("=BIIq??")
_SLOT_AND_NS = struct.Struct("=BIQ")
_RECORD_HEAD = struct.Struct("=BQ")
_BRAKED = struct.Struct("=BIQQqqqqqqqQBB")
_THAWED = struct.Struct("=BIQB")
_ALIVE = struct.Struct("=BQQ")
_ADOPTED = struct.Struct("=BI?BB")
_SOURCE = struct.Struct("=BIBB")


class Thaw(NamedTuple):
    """Thaw a slot and brake again at `brake_ppm`; memory.high as given, -1 to lift it, 0 to leave it.

    Without `heed_horizon` it may come near max in time: it was braked for that already.
    """

    slot: int
    brake_ppm: int
    high_bytes: int
    heed_horizon: bool
    last_word: bool  # the agent is being terminated: frozen again it stays so, there is no further loan

    def encode(self) -> bytes:
        """The datagram."""
        return _THAW.pack(THAW, *self)


class Braked(NamedTuple):
    """reflex froze a slot, and memory.stat says that it was right to."""

    slot: int
    crossed_ns: int  # when the kernel saw the crossing; 0: governor asked
    frozen_ns: int  # when cgroup.freeze was written
    state: MemoryState
    trend_bytes: int  # per second, over about a third of a second; -1 unknown
    fill_rate_bytes: int  # per second, over a few milliseconds; -1 unknown
    charging_pid: int
    frozen: bool  # False: could not be frozen
    throttled: bool  # memory.high was set

    def encode(self) -> bytes:
        """The datagram."""
        return _BRAKED.pack(
            BRAKED,
            self.slot,
            self.crossed_ns,
            self.frozen_ns,
            *self.state,
            self.trend_bytes,
            self.fill_rate_bytes,
            self.charging_pid,
            self.frozen,
            self.throttled,
        )


class Thawed(NamedTuple):
    """reflex thawed a slot."""

    slot: int
    at_ns: int
    reason: int

    def encode(self) -> bytes:
        """The datagram."""
        return _THAWED.pack(THAWED, *self)


class Alive(NamedTuple):
    """reflex's sign of life, once a second, with the records that the kernel could not place in a ring so far."""

    at_ns: int
    dropped: int

    def encode(self) -> bytes:
        """The datagram."""
        return _ALIVE.pack(ALIVE, *self)


class Adopted(NamedTuple):
    """reflex watches a slot, or cannot."""

    slot: int
    ok: bool
    source: int  # poll_source.POLL, PSI or BPF
    brake: int  # brake.FREEZE, STOP or NONE

    def encode(self) -> bytes:
        """The datagram."""
        return _ADOPTED.pack(ADOPTED, *self)


class Source(NamedTuple):
    """From now on crossings of a slot come from another source, or something else can hold it."""

    slot: int
    source: int
    brake: int

    def encode(self) -> bytes:
        """The datagram."""
        return _SOURCE.pack(SOURCE, *self)


class Released(NamedTuple):
    """Every turn of a slot's knobs is undone, and nothing more is said of it: it may be another's."""

    slot: int

    def encode(self) -> bytes:
        """The datagram."""
        return encode_slot(RELEASED, self.slot)


class Refused(NamedTuple):
    """Why the BPF programs are not, or no longer, the source."""

    reason: str

    def encode(self) -> bytes:
        """The datagram."""
        return bytes([REFUSED]) + self.reason.encode(errors="replace")[: MESSAGE_BYTES - 1]


class Heard(NamedTuple):
    """A record that reflex drained, and when."""

    record: Record
    called_back_ns: int


FromReflex = Heard | Braked | Thawed | Alive | Adopted | Source | Refused | Released


def encode_levels(kind: int, slot: int, levels: Levels) -> bytes:
    """ADOPT or SET_LEVELS."""
    return _LEVELS.pack(
        kind,
        slot,
        *levels.engage_ppm,
        *levels.release_ppm,
        levels.horizon_ns,
        levels.horizon_floor_ppm,
        levels.stall_engage_ns,
        levels.max_pages,
        levels.holds,
    )


def decode_levels(data: bytes) -> tuple[int, Levels]:
    """The slot and levels of ADOPT or SET_LEVELS."""
    _, slot, *values = _LEVELS.unpack(data)
    engage, release = tuple(values[:LEVELS]), tuple(values[LEVELS : 2 * LEVELS])
    return slot, Levels(engage, release, *values[2 * LEVELS :])


def encode_slot(kind: int, slot: int, ns: int = 0) -> bytes:
    """BRAKE, PROLONG with its deadline, AGENT with its pid, 0 for none, or RELEASE: the memcg is gone."""
    return _SLOT_AND_NS.pack(kind, slot, ns)


def decode_slot(data: bytes) -> tuple[int, int]:
    """The slot of BRAKE, PROLONG, AGENT or RELEASE, and the deadline or pid."""
    _, slot, ns = _SLOT_AND_NS.unpack(data)
    return slot, ns


def encode_pins(directory: str) -> bytes:
    """OPEN_PINS: the directory where an instance's programs are pinned."""
    return bytes([OPEN_PINS]) + directory.encode()


def decode_pins(data: bytes) -> str:
    """The directory of OPEN_PINS."""
    return data[1:].decode()


def decode_thaw(data: bytes) -> Thaw:
    """THAW."""
    return Thaw._make(_THAW.unpack(data)[1:])


def encode_record(data: bytes, called_back_ns: int) -> bytes:
    """RECORD: the bytes from the ring as they are."""
    return _RECORD_HEAD.pack(RECORD, called_back_ns) + data


def decode_from_reflex(data: bytes) -> FromReflex:
    """What reflex said; raises ValueError for anything else."""
    kind = data[0]
    if kind == RECORD and len(data) == _RECORD_HEAD.size + RECORD_BYTES:
        return Heard(decode(data[_RECORD_HEAD.size :]), _RECORD_HEAD.unpack_from(data)[1])
    if kind == BRAKED and len(data) == _BRAKED.size:
        _, slot, crossed, frozen_ns, *state, trend, rate, pid, frozen, throttled = _BRAKED.unpack(data)
        memory = MemoryState(*state)
        return Braked(slot, crossed, frozen_ns, memory, trend, rate, pid, bool(frozen), bool(throttled))
    if kind == THAWED and len(data) == _THAWED.size:
        return Thawed._make(_THAWED.unpack(data)[1:])
    if kind == ALIVE and len(data) == _ALIVE.size:
        return Alive._make(_ALIVE.unpack(data)[1:])
    if kind == ADOPTED and len(data) == _ADOPTED.size:
        return Adopted._make(_ADOPTED.unpack(data)[1:])
    if kind == SOURCE and len(data) == _SOURCE.size:
        return Source._make(_SOURCE.unpack(data)[1:])
    if kind == RELEASED and len(data) == _SLOT_AND_NS.size:
        return Released(decode_slot(data)[0])
    if kind == REFUSED:
        return Refused(data[1:].decode(errors="replace"))
    raise ValueError(f"found a message of kind {kind} and {len(data)} bytes from reflex, expected 16 to 23")


def receive(fd: int) -> bytes | None:
    """The next message that waits, b"" when the other process is gone, None when none waits."""
    try:
        return os.read(fd, MESSAGE_BYTES)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""


def send(fd: int, message: bytes) -> bool:
    """Send without waiting; False when the other side is gone or does not keep up."""
    try:
        os.write(fd, message)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        return False
    return True
