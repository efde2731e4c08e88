"""What a memcg may hold: its own limit, its ancestors', the policy's, or what the machine has left.

Levels are evaluated for each memcg with a limit, from the governed one up to the pod; the highest ratio counts.
Imported by the real-time process.
"""

from __future__ import annotations

from typing import NamedTuple

from governor.cgroup import UNLIMITED, Memcg, MemoryState
from governor.levels import Share

_REFRESH_NS = 1_000_000_000
_LATE_RATIO = 0.97  # as the policy's last level, unless it says otherwise
_QOS = ("burstable", "besteffort", "guaranteed")
_NODE = ("kubepods", *(f"kubepods-{name}" for name in _QOS))  # no pod's, the node's; kind's: kubelet-kubepods


class Seen(NamedTuple):
    """One memcg with a limit, and what it holds; `state.max_bytes` is the limit that counts there."""

    memcg: Memcg
    state: MemoryState
    given_bytes: int  # a limit that the kernel does not know of; 0: none
    ours: bool  # what it has last grown by is the governed memcg's


class Limits:
    """A governed memcg and the ancestors whose limits bind it."""

    def __init__(self, own: Memcg) -> None:
        """Ancestors that cannot be read are left out."""
        self.own = own
        self.above: list[Memcg] = []
        self.chosen_bytes = 0  # the policy's limit; 0: none
        self.of_machine = False  # no limit anywhere: MemAvailable counts
        self.tightest = own
        self.is_ours = True  # what the tightest has last grown by is the governed memcg's
        self._shares: dict[int, Share] = {}  # of those above, by cgroup id
        self._own_state: MemoryState | None = None  # at the last look
        self._before: tuple[Memcg | None, int, int] = (None, 0, 0)  # own_part: the tightest, held here, held there
        self._machine_bytes = 0
        self._machine_ns: int | None = None
        for path in ancestors(own.path):
            try:
                self.above.append(Memcg(path))
            except OSError:
                continue  # a root, or a directory that is no memcg

    def close(self) -> None:
        """Close the memcgs above; the governed one belongs to whoever opened it."""
        for memcg in self.above:
            memcg.close()

    @property
    def cgroup_id(self) -> int:
        """Of the governed memcg."""
        return self.own.cgroup_id

    @property
    def own_held_bytes(self) -> int:
        """What the governed memcg held that cannot be reclaimed, at the last look."""
        return self._own_state.unreclaimable_bytes if self._own_state else 0

    def look(self, now_ns: int) -> list[Seen]:
        """Every memcg with a limit, the governed one first if it is one of them; empty when that is gone."""
        state = self.own.memory_state()
        if state is None:
            return []
        grown_bytes, self._own_state = state.unreclaimable_bytes - self.own_held_bytes, state
        limits = [limit for limit in (state.max_bytes, self.chosen_bytes) if limit > 0]
        seen = [Seen(self.own, state._replace(max_bytes=min(limits)), self.chosen_bytes, True)] if limits else []
        for memcg in self.above:
            if memcg.limit_bytes() != UNLIMITED and (found := memcg.memory_state()):
                share = self._shares.setdefault(memcg.cgroup_id, Share())
                held_bytes, part_bytes = found.unreclaimable_bytes, state.unreclaimable_bytes
                ours = share.look(held_bytes, part_bytes, found.unreclaimable_ratio)
                seen.append(Seen(memcg, found, 0, ours))
        self.of_machine = not seen
        if not seen:
            machine_bytes = self._of_machine(state, now_ns)
            seen = [Seen(self.own, state._replace(max_bytes=machine_bytes), machine_bytes, grown_bytes > 0)]
        tightest = max(seen, key=lambda one: one.state.unreclaimable_ratio)
        self.tightest, self.is_ours = tightest.memcg, tightest.ours
        return seen

    def memory_state(self, now_ns: int) -> MemoryState | None:
        """The state with the highest ratio; None when the governed memcg is gone or cannot be read now."""
        return next((seen.state for seen in self.look(now_ns) if seen.memcg is self.tightest), None)

    def own_part(self, state: MemoryState) -> MemoryState:
        """What memory_state() just gave, as far as the governed memcg answers for it: siblings' growth is not its.

        All of it where it has grown by half of what that has since the last call; or where it holds half of that, and
        nobody grows or little is left.
        """
        own, held_bytes = self._own_state, self.own_held_bytes
        before, self._before = self._before, (self.tightest, held_bytes, state.unreclaimable_bytes)
        if self.tightest is self.own or own is None:
            return state
        grown = held = 0
        if before[0] is self.tightest:
            grown, held = held_bytes - before[1], state.unreclaimable_bytes - before[2]
        # Who holds most is whom the kernel kills: who only sits still answers once whoever grows was not stopped.
        is_late = held <= 0 or state.unreclaimable_ratio >= _LATE_RATIO
        if (is_late and 2 * held_bytes >= state.unreclaimable_bytes) or (
            self.is_ours and grown > 0 and 2 * grown >= held
        ):
            return state
        limits = (own.max_bytes, self.chosen_bytes, state.max_bytes)
        return own._replace(max_bytes=min(limit for limit in limits if limit > 0))

    def own_usage_bytes(self) -> int:
        """What the governed memcg uses now; 0 when it is gone."""
        try:
            return int(self.own.read("memory.usage_in_bytes" if self.own.v1 else "memory.current"))
        except (OSError, ValueError):
            return 0

    def own_share_bytes(self, usage_bytes: int) -> int:
        """A usage of the tightest memcg as the same part of what the governed memcg uses; 0 when it is gone."""
        if self.tightest is self.own:
            return usage_bytes
        own, tightest = self.own.memory_state(), self.tightest.memory_state()
        return own.usage_bytes * usage_bytes // max(1, tightest.usage_bytes) if own and tightest else 0

    def own_high_bytes(self, high_bytes: int) -> int:
        """What the tightest memcg may hold that cannot be reclaimed, as a memory.high of the governed memcg.

        Not counting what others there have cached: throttled for that, it would hardly ever get to the level at which
        it is braked. At least what it holds itself; 0 when one of them is gone.
        """
        if self.tightest is self.own:
            return high_bytes
        own, tightest = self.own.memory_state(), self.tightest.memory_state()
        if own is None or tightest is None:
            return 0
        return own.unreclaimable_bytes + max(0, high_bytes - tightest.unreclaimable_bytes)

    def describe(self) -> str:
        """Which limit counts, in words."""
        if self.of_machine:
            return "no limit anywhere: what the machine has available"
        return "its own limit" if self.tightest is self.own else f"the limit of {self.tightest.path}"

    def _of_machine(self, state: MemoryState, now_ns: int) -> int:
        """Unreclaimable bytes + MemAvailable, which counts this memcg's cache already; refreshed every second."""
        if self._machine_ns is None or now_ns - self._machine_ns >= _REFRESH_NS:
            self._machine_ns = now_ns
            self._machine_bytes = state.unreclaimable_bytes + _available_bytes()
        return self._machine_bytes


def ancestors(path: str) -> list[str]:
    """The directories above a memcg's, nearest first, up to the hierarchy's root or the node's part of kubepods."""
    found = []
    parts = path.strip("/").split("/")
    while len(parts) > 3:  # sys/fs/cgroup: in a container it may have a limit, and the true root has no such file
        parts = parts[:-1]
        stem = parts[-1].removesuffix(".slice")
        by_slice = stem != parts[-1] and any(stem == name or stem.endswith(f"-{name}") for name in _NODE)
        in_kubepods = parts[-1] in _QOS and parts[-2] == "kubepods"
        if parts[-1] == "kubepods" or by_slice or in_kubepods:
            break
        found.append("/" + "/".join(parts))
    return found


def _available_bytes() -> int:
    try:
        with open("/proc/meminfo", "rb") as listed:  # noqa: PTH123  no pathlib here
            return parse_meminfo(listed.read())
    except OSError:
        return 0


def parse_meminfo(data: bytes) -> int:
    """MemAvailable in bytes; 0 where there is none."""
    words = next((line.split() for line in data.splitlines() if line.startswith(b"MemAvailable:")), [])
    return int(words[1]) << 10 if len(words) > 1 and words[1].isdigit() else 0
