"""A journal's lines read for a post-mortem: bytes in, a frozen Report out. Pure; words and draws nothing.

What is torn (no JSON object) or foreign (no line of a governor, or of another version) is passed over and counted.
All text is escaped here as for a terminal (`journal.printable`): processes choose their names, and journals can be
forged. Every time is nanoseconds since the epoch: the journal's monotonic and boottime stamps are put on the wall
clock by the line that holds them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import orjson

from governor import model, record
from governor.cgroup import MemoryState
from governor.codec import restored
from governor.journal import printable
from governor.model import Event, Instruction, Phase
from governor.policy import Policy
from governor.policy_keys import flatten

_EVENTS: dict[str, Any] = {kind.__name__: kind for kind in model.Event.__args__}
_INSTRUCTIONS: dict[str, Any] = {kind.__name__: kind for kind in model.Instruction.__args__}
_SILENT = frozenset({"Reachable", "Sampled", "Stalled"})  # worth telling of only where something was decided
_TEXT_LIMIT = 2000
_PAGES_LIMIT = 1 << 50
_RATIO_LIMIT = 10.0  # a level above 1 is one that is never reached
NOT_HEARD = "not heard of"
_FURTHEST_NS = 3600 * 1_000_000_000  # a stamp that is further from its line's is none


@dataclass(frozen=True, slots=True)
class Look:
    """What the memcg held at one moment; `agent_bytes` of it by the agent and what descends from it, 0: unknown."""

    at_ns: int
    memory: MemoryState
    agent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Crossed:
    """A crossing as the source reported it; `ratio` is an upper bound."""

    at_ns: int
    level: int
    rising: bool
    is_early: bool  # not by the level: max was within the horizon
    ratio: float
    fill_rate_bytes: int | None
    pid: int  # that charged; 0: unknown


@dataclass(frozen=True, slots=True)
class Hold:
    """From a brake to its end; `took_ns` from the crossing, None: unknown.

    Where no thaw was heard of, `to_ns` is the next brake or begin, the latest that it can have been; None: there is
    none either.
    """

    from_ns: int
    to_ns: int | None
    took_ns: int | None
    memory: MemoryState
    frozen: bool
    why_thawed: str

    @property
    def is_heard(self) -> bool:
        """Whether the thaw was."""
        return self.to_ns is not None and self.why_thawed != NOT_HEARD


@dataclass(frozen=True, slots=True)
class Step:
    """What the ladder heard and decided. Samples that led to nothing are looks only."""

    at_ns: int
    event: Event
    phase: Phase
    rule: str
    instructions: tuple[Instruction, ...]


@dataclass(frozen=True, slots=True)
class Said:
    """What became of something, in governor's own words."""

    at_ns: int
    kind: str
    text: str
    pids: tuple[int, ...] = ()
    sent: bool = True  # of "terminating": somebody got the signal


@dataclass(frozen=True, slots=True)
class Saved:
    """An archive: `base` is the full one that it goes with, "" if it is one itself."""

    at_ns: int
    name: str
    directory: str
    base: str
    files: int
    skipped: int
    is_new: bool


@dataclass(frozen=True, slots=True)
class Begun:
    """A governor began, or its journal's next file did: by which policy, where, and as what."""

    at_ns: int
    policy: Policy
    guard: dict[str, str]
    facts: dict[str, str]


@dataclass(slots=True)
class History:
    """All of one target, each list in the order of time once it is read."""

    target: str
    begun: list[Begun] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    crossings: list[Crossed] = field(default_factory=list)
    holds: list[Hold] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    said: list[Said] = field(default_factory=list)
    saved: list[Saved] = field(default_factory=list)
    first_ns: int = 0
    last_ns: int = 0


@dataclass(frozen=True, slots=True)
class Report:
    """Everything that could be read, the target that was heard of last first."""

    histories: tuple[History, ...]
    lines: int
    torn: int
    foreign: int


def read(lines: Iterable[bytes]) -> Report:
    """Raises nothing for what the lines hold; what raises for reading them is passed on."""
    readers: dict[str, _Reader] = {}
    count = torn = foreign = 0
    for data in lines:
        count += 1
        try:
            line = orjson.loads(data)
        except orjson.JSONDecodeError:
            line = None
        if not isinstance(line, dict):
            torn += 1
            continue
        try:
            if not data.isascii() or b"\\" in data or b"\x7f" in data:  # else nothing in it wants escaping
                line = _escaped(line)
            target = _text(line["target"])
            readers.setdefault(target, _Reader(History(target))).take(line)
        except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
            foreign += 1
    histories = [reader.done() for reader in readers.values() if reader.history.first_ns]
    histories.sort(key=lambda history: history.last_ns, reverse=True)
    return Report(tuple(histories), count, torn, foreign)


def _escaped(value: Any) -> Any:
    if isinstance(value, str):
        return printable(value)[:_TEXT_LIMIT]
    if isinstance(value, dict):
        return {printable(key): _escaped(item) for key, item in value.items()}
    return [_escaped(item) for item in value] if isinstance(value, list) else value


class _Reader:
    """The lines of one target, as they come."""

    def __init__(self, history: History) -> None:
        self.history = history
        self._ahead_ns: int | None = None  # boottime before monotonic
        self._wall_ns = self._monotonic_ns = 0  # of the line at hand

    def take(self, line: dict[str, Any]) -> None:
        """Raises KeyError, ValueError, TypeError, AttributeError for what is no line of ours."""
        self._wall_ns, self._monotonic_ns = _wall_ns(line["time"]), _whole(line["monotonic_ns"])
        kind, history = _text(line["kind"]), self.history
        text = _text(line.get("text", ""))
        pids = tuple(_whole(pid) for pid in line.get("pids", [line["pid"]] if "pid" in line else []))
        match kind:
            case "begin" | "policy":
                self._begin(line, kind)
            case "step":
                self._step(line)
            case "crossing":
                self._crossing(restored(record.Record, _unsigned(line["record"])))
            case "braked":
                self._braked(line)
            case "thawed":
                self._thawed(_whole(line["at_ns"]), _text(line["text"]))
            case "archived":
                name, directory, base = (_text(line[key]) for key in ("name", "directory", "base"))
                files, skipped = _whole(line["files"]), _whole(line["skipped"])
                if name.startswith("-"):  # it would be an option in the command to copy
                    raise ValueError(f"found {name!r}, expected the name of an archive")
                history.saved.append(Saved(self._wall_ns, name, directory, base, files, skipped, bool(line["new"])))
        if text:
            history.said.append(Said(self._wall_ns, kind, text, pids, line.get("sent") is not False))
        history.first_ns = history.first_ns or self._wall_ns
        history.last_ns = max(history.last_ns, self._wall_ns)

    def done(self) -> History:
        """Everything in the order of time; lines of two clocks need not have come so."""
        history = self.history
        for times in (history.looks, history.crossings, history.steps, history.said, history.saved):
            times.sort(key=lambda one: one.at_ns)
        history.holds.sort(key=lambda one: one.from_ns)
        return history

    def _at(self, monotonic_ns: int) -> int:
        ago_ns = self._monotonic_ns - monotonic_ns
        return self._wall_ns - ago_ns if abs(ago_ns) < _FURTHEST_NS else self._wall_ns

    def _begin(self, line: dict[str, Any], kind: str) -> None:
        if kind == "begin":
            self._end_hold(self._wall_ns, NOT_HEARD)
        if "policy" not in line:  # of a node, which has no policy of its own
            return
        begun, policy = self.history.begun, _policy(line["policy"])
        if kind == "policy" and begun:  # read again
            begun.append(Begun(self._wall_ns, policy, begun[-1].guard, begun[-1].facts))
            return
        guard, facts = line.get("guard", {}), line.get("facts", {})
        if not isinstance(guard, dict) or not isinstance(facts, dict):
            raise TypeError("no line of a governor")
        asked = {key: str(value)[:_TEXT_LIMIT] for key, value in guard.items() if value}
        facts = {key: str(value)[:_TEXT_LIMIT] for key, value in facts.items()}
        self._ahead_ns = None  # the machine may have been started anew
        begun.append(Begun(self._wall_ns, policy, asked, facts))

    def _step(self, line: dict[str, Any]) -> None:
        name, of, now_ns = line["event"], line["of"], _whole(line["now_ns"])
        ahead_ns = now_ns - self._monotonic_ns
        if self._ahead_ns is None or ahead_ns > self._ahead_ns:  # less: the line was written late
            self._ahead_ns = ahead_ns
        if name == "Sampled" and not line["instructions"] and not line["rule"]:  # most lines: without restored()
            if of["state"] is not None:
                self._look(_memory(of["state"]), _whole(of["at_ns"]), _whole(of.get("agent_bytes", 0)))
            return
        event = restored(_EVENTS[name], of)
        instructions = tuple(
            restored(_INSTRUCTIONS[which], values) for each in line["instructions"] for which, values in each.items()
        )
        step = Step(self._at(now_ns - self._ahead_ns), event, Phase(line["phase"]), _text(line["rule"]), instructions)
        if isinstance(memory := getattr(event, "state", None), MemoryState):
            self._look(memory, getattr(event, "at_ns", now_ns), getattr(event, "agent_bytes", 0))
        if instructions or name not in _SILENT:
            self.history.steps.append(step)

    def _look(self, memory: MemoryState, at_ns: int, agent_bytes: int) -> None:
        if memory.max_bytes > 0:
            self.history.looks.append(Look(self._at(at_ns - (self._ahead_ns or 0)), memory, agent_bytes))

    def _crossing(self, found: record.Record) -> None:
        if found.kind != record.CROSSING or not 0 <= found.level <= record.LEVELS:
            raise ValueError("no crossing")
        self.history.crossings.append(
            Crossed(
                self._at(found.ktime_ns),
                found.level,
                found.rising,
                bool(found.flags & record.HORIZON),
                found.bound_ratio,
                found.fill_rate_bytes,
                found.pid,
            )
        )

    def _braked(self, line: dict[str, Any]) -> None:
        crossed_ns, frozen_ns = _whole(line["crossed_ns"]), _whole(line["frozen_ns"])
        took_ns = frozen_ns - crossed_ns if crossed_ns else None
        hold = Hold(self._at(frozen_ns), None, took_ns, _memory(line["state"]), bool(line["frozen"]), "")
        self._end_hold(hold.from_ns, NOT_HEARD)
        self.history.holds.append(hold)

    def _thawed(self, at_ns: int, text: str) -> None:
        self._end_hold(self._at(at_ns), text)

    def _end_hold(self, at_ns: int, why: str) -> None:
        """That of the last brake; a journal begins anew in the middle of a hold, too, and its thaw comes later."""
        holds = self.history.holds
        if holds and (holds[-1].to_ns is None or (why != NOT_HEARD and not holds[-1].is_heard)):
            holds[-1] = replace(holds[-1], to_ns=max(holds[-1].from_ns, at_ns), why_thawed=why)


def _wall_ns(written: str) -> int:
    at = datetime.fromisoformat(written)
    seconds = int(at.timestamp())
    if at.tzinfo is None or not 0 < seconds < 1 << 36:
        raise ValueError(f"found {written!r}, expected a time of UTC")
    return seconds * 1_000_000_000 + at.microsecond * 1000


def _memory(values: Any) -> MemoryState:
    return MemoryState(**{name: _whole(value) for name, value in values.items()})


def _unsigned(values: Any) -> dict[str, Any]:
    """A record as restored() takes it: the kernel's "never" (2^64 - 1) is more than any number of ours."""
    if any(value < 0 for value in values.values()):
        raise ValueError("no record")
    return {name: min(value, _PAGES_LIMIT if name.endswith("_pages") else 1 << 62) for name, value in values.items()}


def _policy(values: Any) -> Policy:
    policy: Policy = restored(Policy, values)
    if any(isinstance(value, float) and not 0 <= value <= _RATIO_LIMIT for value in flatten(policy).values()):
        raise ValueError("no policy of ours")
    return policy


def _whole(value: Any) -> int:
    if type(value) is not int or not -1 <= value < 1 << 62:
        raise ValueError(f"found {value!r}, expected a number")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"found {value!r}, expected text")
    return value
