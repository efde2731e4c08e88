"""What is counted while it happens: plain integers, of the node and of each container. Pure.

Told by the loop and its targets with the events that they have anyway. Formats nothing: `metrics.py` does, elsewhere.

A container has a series of its own while there is room for one; all beyond share OTHER. Whoever has the same names,
as a container that was started again, goes on with the same series. The series of one that went stays for a while,
so that its last figures are scraped.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from governor import link, model, record
from governor.model import Phase
from governor.standing import Decided

Names = tuple[str, str, str]  # namespace, pod, container: escaped

SERIES_LIMIT = 1000
GRACE_NS = 5 * 60 * 1_000_000_000  # of a series whose container is gone: five scrapes at a minute each
OTHER: Names = ("", "", "other")
ACTIONS = ("compact", "recycle", "clear", "archive", "shed", "terminate", "kill", "nothing_left")
TIERS = ("compact", "recycle", "clear", "shed", "terminate")
OUTCOMES = {  # of each action, as they are exported: from the start, so that a first one is seen as a rise
    **dict.fromkeys(
        ("compact", "recycle", "clear"),
        ("begun", "dry_run", "withheld", "delivered", "deferred", "failed", "unavailable", "of_use", "no_use"),
    ),
    "archive": ("begun", "dry_run", "done", "failed"),
    "shed": ("begun", "dry_run", "done", "nobody"),
    "terminate": ("begun", "dry_run", "done"),
    "kill": ("begun", "dry_run"),
    "nothing_left": ("begun", "dry_run"),
}
_MS = 1_000_000
_GIVEN_BACK_NS = 2_000 * _MS  # by then the memory of what was killed is given back
_BOUNDS_NS = tuple(int(ms * _MS) for ms in (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000))


@dataclass(slots=True)
class Histogram:
    """How many durations fell below each bound, and above all of them."""

    bounds_ns: tuple[int, ...] = _BOUNDS_NS
    counts: list[int] = field(default_factory=lambda: [0] * (len(_BOUNDS_NS) + 1))
    sum_ns: int = 0

    def observe(self, duration_ns: int) -> None:
        """One more; a clock that seems to go backwards between two CPUs counts as 0."""
        duration_ns = max(0, duration_ns)
        self.counts[bisect_left(self.bounds_ns, duration_ns)] += 1
        self.sum_ns += duration_ns


@dataclass(slots=True)
class Series:
    """What is counted of one container, or of all that have no series of their own."""

    names: Names
    members: int = 0
    gone_ns: int = 0  # since when it has no member; only then
    episodes: int = 0
    brakes: int = 0
    braked_ns: int = 0
    oom_kills: int = 0
    actions: Counter[str] = field(default_factory=Counter)


@dataclass(slots=True)
class _Target:
    """One slot: what has begun and has not ended."""

    series: Series
    frozen_ns: int | None = None
    freed: tuple[str, int, int] | None = None  # a tier that killed, the bytes before it, and when: boottime
    decided: Decided | None = None
    freed_bytes: Counter[str] = field(default_factory=Counter)  # by tier


class Tally:
    """Everything that is counted, by slot of the loop. Nothing here raises for a slot that is not known."""

    def __init__(self, series_limit: int = SERIES_LIMIT) -> None:
        self.to_callback = Histogram()  # from the kernel's stamp of a crossing
        self.to_frozen = Histogram()
        self.turns = Histogram()  # how long the loop was busy
        self.actions: Counter[tuple[str, str]] = Counter()  # action and outcome
        self.freed_bytes: Counter[str] = Counter()  # by tier
        self.false_alarms = self.not_held = 0
        self.oom_kills = self.dropped_records = 0
        self.reflex_starts = self.faults = 0
        self.found = self.gone = self.not_selected = self.not_governed = 0  # containers, by discovery
        self.scans = self.scan_ns = 0
        self.other = Series(OTHER)
        self._limit = series_limit
        self._series: dict[Names, Series] = {}
        self._gone: dict[Names, Series] = {}  # of these, without a member; who went first comes first
        self._targets: dict[int, _Target] = {}

    # Who is governed

    def adopt(self, slot: int, names: Names, now_ns: int) -> None:
        """A target is governed, or its names are known better now."""
        if slot in self._targets:
            if self._targets[slot].series.names == names:
                return
            self.release(slot, now_ns)
        self._forget_gone(now_ns, make_room=names not in self._series)
        series = self._series.get(names)
        if series is None:
            series = Series(names) if len(self._series) < self._limit and names != OTHER else self.other
            if series is not self.other:
                self._series[names] = series
        self._gone.pop(names, None)
        series.members += 1
        self._targets[slot] = _Target(series)

    def release(self, slot: int, now_ns: int) -> None:
        """A target is governed no more."""
        self.thawed(slot, now_ns)
        if target := self._targets.pop(slot, None):
            series = target.series
            series.members -= 1
            series.gone_ns = now_ns
            if not series.members and series is not self.other:
                self._gone[series.names] = series

    def series(self, now_ns: int) -> list[Series]:
        """All that are to be shown now; OTHER once it has counted anything."""
        self._forget_gone(now_ns)
        other = self.other
        used = other.members or other.gone_ns
        return [*self._series.values(), *([other] if used else [])]

    def series_of(self, slot: int) -> Series | None:
        """Where the figures of a slot are counted."""
        target = self._targets.get(slot)
        return target.series if target else None

    def decided(self, slot: int) -> Decided | None:
        """The last thing that was decided for a slot."""
        target = self._targets.get(slot)
        return target.decided if target else None

    def freed_bytes_of(self, slot: int) -> dict[str, int]:
        """What each tier has freed of a slot, since it has its names."""
        target = self._targets.get(slot)
        return dict(target.freed_bytes) if target else {}

    def frozen_for_ns(self, slot: int, now_ns: int) -> int | None:
        """How long it has been held; None if it is not."""
        target = self._targets.get(slot)
        return None if target is None or target.frozen_ns is None else max(0, now_ns - target.frozen_ns)

    def frozen_ns(self, now_ns: int) -> dict[Names, int]:
        """Brake time, by series, of the brakes that are held now."""
        held: dict[Names, int] = {}
        for target in self._targets.values():
            if target.frozen_ns is not None:
                names = target.series.names
                held[names] = held.get(names, 0) + max(0, now_ns - target.frozen_ns)
        return held

    def _forget_gone(self, now_ns: int, make_room: bool = False) -> None:
        """Those whose time is over; to make room in a full table also the one that went first."""
        while self._gone:
            names, first = next(iter(self._gone.items()))
            if now_ns - first.gone_ns < GRACE_NS and not (make_room and len(self._series) >= self._limit):
                break
            del self._gone[names], self._series[names]

    # What reflex says

    def heard(self, found: record.Record, called_back_ns: int) -> None:
        """A record: how long after the kernel's stamp reflex had it. One without a pid was polled: no stamp."""
        if found.kind == record.CROSSING and found.pid:
            self.to_callback.observe(called_back_ns - found.ktime_ns)

    def braked(self, slot: int, braked: link.Braked) -> None:
        """A brake, confirmed."""
        if not braked.frozen:
            self.not_held += 1
            return
        if braked.crossed_ns and braked.charging_pid:
            self.to_frozen.observe(braked.frozen_ns - braked.crossed_ns)
        self.thawed(slot, braked.frozen_ns)
        if target := self._targets.get(slot):
            target.frozen_ns = braked.frozen_ns
            target.series.brakes += 1

    def thawed(self, slot: int, at_ns: int, reason: int = link.ASKED) -> None:
        """It runs again, whoever let it."""
        self.false_alarms += reason == link.FALSE_ALARM
        target = self._targets.get(slot)
        if target and target.frozen_ns is not None:
            target.series.braked_ns += max(0, at_ns - target.frozen_ns)
            target.frozen_ns = None

    def released_all(self, at_ns: int) -> None:
        """reflex is gone, and every knob was restored."""
        for slot in self._targets:
            self.thawed(slot, at_ns)

    # What the ladder decides

    def stepped(
        self,
        slot: int,
        event: model.Event,
        before: model.State,
        after: model.State,
        instructions: Iterable[model.Instruction],
        at_ns: int,
        dry_run: bool,
    ) -> None:
        """A step of the ladder, before it is carried out; `at_ns` on its clock."""
        target = self._targets.get(slot)
        if target is None:
            return
        target.series.episodes += after.in_episode and not before.in_episode
        if not dry_run:
            self._outcome(target, event, before, at_ns)
        for instruction in instructions:
            self._decided(target, instruction, before, at_ns, dry_run)

    def _outcome(self, target: _Target, event: model.Event, before: model.State, at_ns: int) -> None:
        held_bytes = before.held.state.unreclaimable_bytes if before.held else 0
        match event:
            case model.Answered(tier=tier, status=status):
                self._count(tier.value, status.value)
            case model.Archived(ok=ok):
                self._count("archive", "done" if ok else "failed")
            case model.Shedded(killed=killed):
                self._count("shed", "done" if killed else "nobody")
                if killed and held_bytes:
                    target.freed = ("shed", held_bytes, at_ns)
            case model.AgentEnded() if before.phase is Phase.TERMINATING:
                self._count("terminate", "done")
                if held_bytes:
                    target.freed = ("terminate", held_bytes, at_ns)
            case model.Sampled(state=state) if state and target.freed:
                tier_name, before_bytes, since_ns = target.freed
                if at_ns - since_ns >= _GIVEN_BACK_NS:
                    target.freed = None
                    self._freed(target, tier_name, before_bytes - state.unreclaimable_bytes)

    def _decided(
        self, target: _Target, instruction: model.Instruction, before: model.State, at_ns: int, dry_run: bool
    ) -> None:
        begun = "dry_run" if dry_run else "begun"
        match instruction:
            case model.Settled(tier=tier, freed_bytes=freed_bytes, useless=useless):
                self._freed(target, tier.value, freed_bytes, getattr(before, tier.value).isolated)
                self._count(tier.value, "no_use" if useless else "of_use")
                return
            case model.Withheld(tier=tier, reason=reason):
                name, begun = tier.value, "withheld"
            case model.Deliver(tier=tier, reason=reason):
                name = tier.value
            case model.NothingLeft(reason=reason):
                name = "nothing_left"
            case model.Archive() | model.Shed() | model.Terminate() | model.Kill():
                name, reason = type(instruction).__name__.lower(), instruction.reason
            case _:
                return
        self._count(name, begun)
        if begun == "begun":
            target.series.actions[name] += 1
        target.decided = Decided(name if begun == "begun" else f"{name} ({begun})", reason, at_ns)

    def _freed(self, target: _Target, tier: str, freed_bytes: int, isolated: bool = True) -> None:
        """What another step may have freed meanwhile is not put down to this one where people look at one target."""
        self.freed_bytes[tier] += max(0, freed_bytes)
        target.freed_bytes[tier] += max(0, freed_bytes) if isolated else 0

    def _count(self, action: str, outcome: str) -> None:
        self.actions[action, outcome] += 1

    # What else happens

    def oom_killed(self, slot: int, kills: int = 1) -> None:
        """The kernel's OOM killer was there."""
        self.oom_kills += kills
        if target := self._targets.get(slot):
            target.series.oom_kills += kills

    def scanned(self, took_ns: int) -> None:
        """Discovery has looked at the whole tree."""
        self.scans += 1
        self.scan_ns += took_ns
