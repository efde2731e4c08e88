"""What `governor watch` knows of one memcg at a moment, and what follows from it. Pure: reads no file and no clock.

Samples, standings of a governor and events go in; a `Picture` comes out, which is drawn (watch_picture), printed
(watch_lines) or left.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from governor.attribution import Held
from governor.levels import Track
from governor.policy import Policy, levels
from governor.record import LEVEL_NAMES, PPM, Levels
from governor.standing import levels_by_name
from governor.watch_sample import Sample

SECOND_NS = 1_000_000_000
HISTORY = 240  # samples that the sparkline may show
LOG = 200  # entries that are kept
DEFAULT_LEVELS = levels_by_name(levels(Policy()))
LEVEL_WORDS = {"compact": "compact", "arm": "clear", "brake": "brake", "last": "kill"}  # what is done there
_RATE_NS = 900_000_000  # growth is measured over a second of looks
_NOTABLE_BYTES = 1 << 20  # per second: less growth of a process is noise
NOT_TOLD = "not told to this user: see it as root, or as governor's own user"
NOT_YET = "not known: its governor has not answered yet"
SILENT = "not known: its governor does not answer"
_NOT_DONE = ("source", "decided", "gone", "governor_gone")  # entries that are of nothing that a governor has done
_UNDER_WAY = ("queued", "running", "restarting", "deferred")


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the log. `text` is as it came: escape it before it is shown."""

    time_s: float  # since the epoch
    kind: str
    text: str
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Change:
    """A counter of `memory.events`: as it is, and what came in the last second and since watch began."""

    name: str
    count: int
    lately: int
    since: int


@dataclass(frozen=True, slots=True)
class Picture:
    """Everything that is shown of one memcg."""

    name: str
    cgroup: str
    source: str
    time_s: float
    sample: Sample | None  # None: it is gone
    levels: Mapping[str, float]
    level: str  # of LEVEL_NAMES
    fill_rate_bytes: int  # per second
    time_to_max_s: float | None
    history: tuple[
        float, ...
    ]  # the most of each second: share of max (of the largest, without a limit), oldest first
    stalled_usec: tuple[int, int]  # some, full, in the last second
    changes: tuple[Change, ...]
    processes: tuple[Held, ...]
    standing: Mapping[str, Any] | None  # as a governor tells it; None: nobody governs it, or does not tell
    next: str
    log: tuple[Entry, ...]
    holds: bool = False  # the picture stands still


@dataclass(frozen=True, slots=True)
class Summary:
    """What is said at the end."""

    name: str
    seconds: float
    samples: int
    first_bytes: int
    last_bytes: int
    peak_bytes: int
    max_bytes: int
    peak_ratio: float
    worst_rate_bytes: int
    crossings: int  # rising
    events: Mapping[str, int]  # kinds of what a governor did, and how often
    changes: Mapping[str, int]  # of memory.events
    freed_bytes: Mapping[str, int]  # by tier
    grew_most: str  # a process


class Model:
    """One memcg, from look to look."""

    def __init__(self, name: str, cgroup: str) -> None:
        self.name, self.cgroup = name, cgroup
        self.source = ""
        self.untold = ""  # why its governor does not tell how it stands; "": nobody governs it
        self.standing: Mapping[str, Any] | None = None
        self.processes: tuple[Held, ...] = ()
        self.log: deque[Entry] = deque(maxlen=LOG)
        self._samples: deque[Sample] = deque(maxlen=HISTORY)
        self._first: Sample | None = None
        self._gone = False
        self._count = 0
        self._peak: tuple[int, float] = (0, 0.0)  # bytes; share of max
        self._worst_rate_bytes = 0
        self._crossings = 0
        self._events: dict[str, int] = {}
        self._grew: tuple[int, str] = (0, "")
        self._track = Track()
        self._levels = levels(Policy())

    @property
    def sample(self) -> Sample | None:
        """The last; None when there is none, or the memcg is gone."""
        return None if self._gone or not self._samples else self._samples[-1]

    @property
    def gone(self) -> bool:
        """Whether the memcg is not there any more."""
        return self._gone

    def see(self, sample: Sample | None, processes: Iterable[Held] = ()) -> tuple[str, bool] | None:
        """A look. A level that was crossed since the one before, by what is seen, and whether rising."""
        if sample is None:
            self._gone = True
            return None
        self._gone = False
        self._first = self._first or sample
        self._samples.append(sample)
        self._count += 1
        self.processes = tuple(processes)
        self._peak = max(self._peak[0], sample.memory.unreclaimable_bytes), max(self._peak[1], _ratio(sample))
        self._worst_rate_bytes = max(self._worst_rate_bytes, self.fill_rate_bytes)
        for process in self.processes[:1]:
            if process.growth_bytes >= _NOTABLE_BYTES:
                self._grew = max(self._grew, (process.growth_bytes, f"{process.comm} ({process.pid})"))
        before = self._track.level
        crossing = self._track.look(
            self._levels, sample.memory.unreclaimable_bytes, sample.memory.max_bytes, sample.at_ns
        )
        if crossing is None or crossing.level == before:
            return None
        return LEVEL_NAMES[crossing.level], crossing.level > before

    def govern(self, standing: Mapping[str, Any] | None) -> Entry | None:
        """How a governor says that it stands; an entry for the log when it has decided something else meanwhile."""
        before, self.standing = self.standing, standing
        if found := (standing or {}).get("levels"):
            self._levels = as_levels(found)
        return None if standing is None or before is None else decided_between(before, standing)

    def note(self, entry: Entry) -> None:
        """Something happened."""
        self.log.append(entry)
        if entry.kind == "crossing":
            self._crossings += bool(entry.fields.get("rising"))
        elif entry.kind not in _NOT_DONE:
            self._events[entry.kind] = self._events.get(entry.kind, 0) + 1

    @property
    def levels(self) -> Levels:
        """Of the policy that governs it, else of the built-in one."""
        return self._levels

    @property
    def fill_rate_bytes(self) -> int:
        """Growth per second over the last second or so; less than 0 while it shrinks."""
        before, last = self._second_ago(), self._samples[-1] if self._samples else None
        if before is None or last is None or last.at_ns <= before.at_ns:
            return 0
        grown_bytes = last.memory.unreclaimable_bytes - before.memory.unreclaimable_bytes
        return grown_bytes * SECOND_NS // (last.at_ns - before.at_ns)

    def _second_ago(self) -> Sample | None:
        if len(self._samples) < 2:
            return None
        last = self._samples[-1]
        older = (each for each in reversed(self._samples) if last.at_ns - each.at_ns >= _RATE_NS)
        return next(older, self._samples[0])

    def picture(self, time_s: float, holds: bool = False) -> Picture:
        """All that is known now."""
        sample = self._samples[-1] if self._samples else None
        rate = self.fill_rate_bytes
        named = self.level_shares
        to_max_s = time_to_max_s(sample, rate)
        return Picture(
            name=self.name,
            cgroup=self.cgroup,
            source=self.source,
            time_s=time_s,
            sample=None if self._gone else sample,
            levels=named,
            level=level_of(named, _ratio(sample)) if sample and not self._gone else "below",
            fill_rate_bytes=rate,
            time_to_max_s=to_max_s,
            history=self._shares(),
            stalled_usec=self._stalled_usec(),
            changes=self._changes(),
            processes=self.processes,
            standing=self.standing,
            next=what_comes_next(self.standing, self.untold, named, sample, rate),
            log=tuple(self.log),
            holds=holds,
        )

    @property
    def level_shares(self) -> Mapping[str, float]:
        """Where each level engages, as a share of max."""
        return levels_by_name(self._levels)

    def summary(self) -> Summary:
        """What there was to be seen."""
        last = self._samples[-1] if self._samples else None
        first = self._first
        return Summary(
            name=self.name,
            seconds=(last.at_ns - first.at_ns) / SECOND_NS if first and last else 0.0,
            samples=self._count,
            first_bytes=first.memory.unreclaimable_bytes if first else 0,
            last_bytes=last.memory.unreclaimable_bytes if last else 0,
            peak_bytes=self._peak[0],
            max_bytes=last.memory.max_bytes if last else 0,
            peak_ratio=self._peak[1],
            worst_rate_bytes=self._worst_rate_bytes,
            crossings=self._crossings,
            events=dict(self._events),
            changes={change.name: change.since for change in self._changes() if change.since},
            freed_bytes=dict((self.standing or {}).get("freed_bytes") or {}),
            grew_most=self._grew[1],
        )

    def _shares(self) -> tuple[float, ...]:
        largest = max((each.memory.unreclaimable_bytes for each in self._samples), default=0) or 1
        seconds: dict[int, float] = {}
        for each in self._samples:
            share = _ratio(each) or each.memory.unreclaimable_bytes / largest
            second = each.at_ns // SECOND_NS
            seconds[second] = max(share, seconds.get(second, 0.0))
        return tuple(seconds.values())

    def _stalled_usec(self) -> tuple[int, int]:
        before = self._second_ago()
        then, now = before.stalls if before else None, self._samples[-1].stalls if self._samples else None
        if not then or not now:
            return 0, 0
        return max(0, now.some_usec - then.some_usec), max(0, now.full_usec - then.full_usec)

    def _changes(self) -> tuple[Change, ...]:
        if not self._samples or self._first is None:
            return ()
        before = self._second_ago() or self._first
        return tuple(
            Change(name, count, count - before.events.get(name, count), count - self._first.events.get(name, count))
            for name, count in self._samples[-1].events.items()
        )


def _ratio(sample: Sample | None) -> float:
    return sample.memory.unreclaimable_ratio if sample else 0.0


def level_of(shares: Mapping[str, float], ratio: float) -> str:
    """The highest level that is reached."""
    return next((name for name in reversed(LEVEL_NAMES[1:]) if ratio >= shares.get(name, 2.0)), LEVEL_NAMES[0])


def time_to_max_s(sample: Sample | None, rate_bytes: int) -> float | None:
    """Until max at this rate; None where it does not grow, or nothing limits it."""
    if sample is None or rate_bytes <= 0 or sample.memory.max_bytes <= 0:
        return None
    return sample.headroom_bytes / rate_bytes


def as_levels(shares: Mapping[str, float]) -> Levels:
    """Levels as a governor tells them, with the usual hysteresis."""
    usual = levels(Policy())
    engage = [round(float(shares.get(name, 2.0)) * PPM) for name in LEVEL_NAMES[1:]]
    release = [at - (was - below) for at, was, below in zip(engage, usual.engage_ppm, usual.release_ppm, strict=True)]
    first, second, third, fourth = engage
    one, two, three, four = release
    return usual._replace(engage_ppm=(first, second, third, fourth), release_ppm=(one, two, three, four))


def decided_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> Entry | None:
    """What a governor has decided between two of its answers, None if nothing; the time is to be filled in."""
    then, now = before.get("decided"), after.get("decided")
    if not now:
        return None
    same = then and (then["what"], then["reason"]) == (now["what"], now["reason"]) and now["ago_s"] >= then["ago_s"]
    return None if same else Entry(0.0, "decided", f"{now['what']}: {now['reason']}")


def what_comes_next(
    standing: Mapping[str, Any] | None,
    untold: str,
    shares: Mapping[str, float],
    sample: Sample | None,
    rate_bytes: int,
) -> str:
    """In words, what is done next if it goes on like this."""
    if sample is None:
        return "nothing: the memcg is gone"
    if standing is None:
        return untold or "nobody governs it: at 100 % the kernel's OOM killer comes; to protect it: governor guard"
    phase, tiers = standing.get("phase"), standing.get("tiers") or {}
    if phase == "held":
        return "the archive, then a thaw where there is room; else what bursts is killed, or the agent is ended"
    if phase == "terminating":
        return f"SIGKILL at {_percent(shares.get('last', 0.97))}, or when the agent's grace is over"
    if phase == "watching" and sample.frozen:
        return "frozen just now: what memory.stat says decides what follows"
    text = _next_tier(tiers, shares, sample, rate_bytes)
    if phase == "probation":
        text = f"held again if it grows on; {text}"
    return f"(dry run, nothing is done) {text}" if standing.get("dry_run") else text


def _next_tier(tiers: Mapping[str, str], shares: Mapping[str, float], sample: Sample, rate_bytes: int) -> str:
    ratio = _ratio(sample)
    for tier, level in (("compact", "compact"), ("clear", "arm")):
        status = str(tiers.get(tier, "none"))
        at = shares.get(level)
        if at is None:
            continue
        if status in _UNDER_WAY:
            return f"{tier} is under way ({status})"
        if status == "delivered":
            return f"{tier} was delivered: what it freed is judged when it has settled"
        if ratio < at and status == "none":
            return f"{tier} at {_percent(at)}{_distance(at, sample, rate_bytes)}"
    for level, words in (("brake", "brake: frozen, archived"), ("last", "SIGKILL")):
        at = shares.get(level)
        if at is not None and ratio < at:
            return f"{words}, at {_percent(at)}{_distance(at, sample, rate_bytes)}"
    return "nothing is left to do" if ratio >= max(shares.values(), default=2.0) else "nothing, by its policy"


def _distance(at: float, sample: Sample, rate_bytes: int) -> str:
    room_bytes = round(at * sample.memory.max_bytes) - sample.memory.unreclaimable_bytes
    if room_bytes <= 0:
        return ""
    within = f", in {short_time(room_bytes / rate_bytes)} at this rate" if rate_bytes > 0 else ""
    return f" (in {short_bytes(room_bytes)}{within})"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def short_time(seconds: float) -> str:
    """Three digits or so: "85 ms", "1.2 s", "14 min", "over a day"."""
    if seconds < 1:
        return f"{1000 * seconds:.0f} ms"
    for limit_s, unit_s, unit in ((100, 1, "s"), (6000, 60, "min"), (86400, 3600, "h")):
        if seconds < limit_s:
            return f"{seconds / unit_s:.1f} {unit}" if seconds / unit_s < 10 else f"{seconds / unit_s:.0f} {unit}"
    return "over a day"


def short_bytes(size_bytes: float) -> str:
    """In MiB, or GiB from ten on."""
    if abs(size_bytes) >= 10 << 30:
        return f"{size_bytes / (1 << 30):.1f} GiB"
    return f"{size_bytes / (1 << 20):.1f} MiB"
