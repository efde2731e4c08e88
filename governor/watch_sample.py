"""One look of `governor watch` at a memcg: what it holds by kind, its stalls, its events. Opens nothing for writing.

What counts is the memcg whose limit is the tightest, as for the guard: the memory by kind and `memory.events` are
that one's; stalls and whether it is frozen are the watched memcg's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from governor.cgroup import UNLIMITED, Memcg, MemoryState, parse_flat_keyed, parse_limit
from governor.limits import Limits, Seen

EVENTS = ("high", "max", "oom", "oom_kill")


@dataclass(frozen=True, slots=True)
class Stalls:
    """`memory.pressure`: the share of time of the last ten seconds (0-1), and the sum since the memcg was made."""

    some_ratio: float
    full_ratio: float
    some_usec: int
    full_usec: int


@dataclass(frozen=True, slots=True)
class Sample:
    """What was seen at one moment. `anon_bytes` + `kernel_bytes` + `cache_bytes` is the usage."""

    at_ns: int  # monotonic
    memory: MemoryState
    shmem_bytes: int = 0
    high_bytes: int = UNLIMITED  # memory.high
    limit: str = ""  # whose limit counts, in words
    stalls: Stalls | None = None  # None: the kernel does not tell
    events: Mapping[str, int] = field(default_factory=dict)  # of EVENTS, since the memcg was made
    frozen: bool = False

    @property
    def anon_bytes(self) -> int:
        """Anonymous memory and shmem, which is on the anon lists."""
        return min(self.memory.unreclaimable_bytes, self.memory.anon_bytes + self.shmem_bytes)

    @property
    def kernel_bytes(self) -> int:
        """All else that cannot be reclaimed: slab, page tables, stacks, sockets, what the CPUs keep in stock."""
        return self.memory.unreclaimable_bytes - self.anon_bytes

    @property
    def cache_bytes(self) -> int:
        """What gives way: the file LRU and reclaimable slab."""
        return self.memory.usage_bytes - self.memory.unreclaimable_bytes

    @property
    def free_bytes(self) -> int:
        """From the usage to max; 0 without a limit."""
        return max(0, self.memory.max_bytes - self.memory.usage_bytes)

    @property
    def headroom_bytes(self) -> int:
        """What can be charged before max is reached with nothing left to reclaim; 0 without a limit."""
        return max(0, self.memory.max_bytes - self.memory.unreclaimable_bytes)


def take(limits: Limits, now_ns: int, seen: list[Seen] | None = None) -> Sample | None:
    """A fresh look, of which `seen` may be a part; None when the memcg is gone or cannot be read now."""
    seen = limits.look(now_ns) if seen is None else seen
    own, counts = limits.own, limits.tightest
    memory = next((one.state for one in seen if one.memcg is counts), None)
    if memory is None:
        return None
    stat = parse_flat_keyed(counts.read_or_none("memory.stat") or b"")
    told = parse_flat_keyed(counts.read_or_none("memory.events") or counts.read_or_none("memory.oom_control") or b"")
    return Sample(
        at_ns=now_ns,
        memory=memory,
        shmem_bytes=stat.get(b"total_shmem" if counts.v1 else b"shmem", 0),
        high_bytes=_high_bytes(counts),
        limit=limits.describe(),
        stalls=parse_pressure(own.read_or_none("memory.pressure") or b""),
        events={name: told[name.encode()] for name in EVENTS if name.encode() in told},
        frozen=b"frozen 1" in (own.read_or_none("cgroup.events") or b""),
    )


def _high_bytes(memcg: Memcg) -> int:
    try:
        return parse_limit(memcg.read("memory.high"))
    except (OSError, ValueError):
        return UNLIMITED


def parse_pressure(data: bytes) -> Stalls | None:
    """`memory.pressure`; None for what is none."""
    found: dict[bytes, tuple[float, int]] = {}
    try:
        for line in data.splitlines():
            kind, *fields = line.split()
            values = dict(field.split(b"=") for field in fields)
            found[kind] = float(values[b"avg10"]) / 100, int(values[b"total"])
        (some_ratio, some_usec), (full_ratio, full_usec) = found[b"some"], found[b"full"]
    except (ValueError, KeyError):
        return None
    return Stalls(some_ratio, full_ratio, some_usec, full_usec)
