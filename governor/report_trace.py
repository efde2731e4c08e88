"""The decision trace of an episode in words: what was heard, the rule that applied, the values, what was decided and
what became of it. Pure.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby

from governor import model, record
from governor.cgroup import MemoryState
from governor.model import Growth, Instruction
from governor.policy import SECOND, Policy, levels
from governor.report_episodes import Episode
from governor.report_figures import clock, duration, offset, percent, plural, rate, size
from governor.report_read import Crossed, Hold, Step

ROWS_LIMIT = 400
_CROSSINGS_SHOWN = 4  # of a row of them, the first and the last
# What the ladder's own rows say already, and what concerns nobody after the fact.
_SAID_TWICE = frozenset({"shedding", "deliver", "withheld", "settled", "nothing_left", "warning", "dry_run", "shown"})
_GRAVE = frozenset(
    {"killed", "shed", "terminating", "oom_kill", "oom_kills", "oom_killed", "fault", "archive_failed"}
)
_FLAGGED = _GRAVE | {"archived", "agent_ended", "delivered", "recycling", "thawed"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the trace; `kind` is signal, decision, done or grave, `number` its flag in the timeline or 0."""

    at_ns: int
    clock: str
    offset: str
    kind: str
    what: str
    rule: str = ""
    values: str = ""
    decided: tuple[str, ...] = ()
    number: int = 0


def rows(episode: Episode) -> tuple[tuple[Row, ...], int]:
    """In the order of time, and how many were left out of the middle of a long one."""
    found = [*_of_crossings(episode), *_of_steps(episode), *_of_said(episode)]
    found.sort(key=lambda row: (row.at_ns, row.kind != "signal"))
    left_out = max(0, len(found) - ROWS_LIMIT)
    if left_out:
        found = [*found[: ROWS_LIMIT // 2], *found[-ROWS_LIMIT // 2 :]]
    numbered, number = [], 0
    for row in found:
        number += bool(row.number)
        numbered.append(replace(row, number=number if row.number else 0))
    return tuple(numbered), left_out


def of_level(level: int, policy: Policy) -> str:
    """A level's name and where the policy has it."""
    if not level:
        return f"below compact ({percent(policy.compact.release_ratio)})"
    return f"{record.LEVEL_NAMES[level]} ({percent(levels(policy).engage_ppm[level - 1] / record.PPM)})"


def of_growth(growth: Growth) -> str:
    """Who grew, by how much, in what time."""
    took = f" in {duration(growth.window_ns)}" if growth.window_ns else ""
    agent = f"the agent itself by {size(growth.agent_grown_bytes)}"
    if not growth.culprit_pid:
        return f"{agent}{took}, others by {size(growth.others_grown_bytes)}"
    who = f"{growth.culprit_comm or 'a process'} (process {growth.culprit_pid})"
    return f"{who} grew by {size(growth.grown_bytes)}{took} to {size(growth.held_bytes)}, {agent}"


def in_use(memory: MemoryState) -> str:
    """The share of max, and in bytes."""
    return f"{percent(memory.unreclaimable_ratio)} ({size(memory.unreclaimable_bytes)} of {size(memory.max_bytes)})"


def _row(episode: Episode, at_ns: int, kind: str, what: str, flagged: bool = False) -> Row:
    return Row(at_ns, clock(at_ns), offset(at_ns - episode.from_ns), kind, what, number=int(flagged))


# What was heard from the kernel


def _of_crossings(episode: Episode) -> list[Row]:
    steps = [step.at_ns for step in episode.steps]
    found = []
    for _, group in groupby(episode.crossings, key=lambda one: bisect_left(steps, one.at_ns)):
        run = list(group)
        between = len(run) - _CROSSINGS_SHOWN
        shown = run if between <= 0 else [*run[: _CROSSINGS_SHOWN // 2], *run[-_CROSSINGS_SHOWN // 2 :]]
        found += [_row(episode, one.at_ns, "signal", _crossed(one, episode.policy)) for one in shown]
        if between > 0:
            what = f"… {plural(between, 'more crossing')} up to then …"
            found.append(_row(episode, run[-_CROSSINGS_SHOWN // 2].at_ns - 1, "signal", what))
    return found


def _crossed(one: Crossed, policy: Policy) -> str:
    speed = f", filling at {rate(one.fill_rate_bytes)}" if one.fill_rate_bytes else ""
    by = f", charged by process {one.pid}" if one.pid else ""
    held = f"at most {percent(one.ratio)} of max{speed}{by}"
    if one.is_early and one.rising:
        horizon = duration(policy.brake.horizon_ns)
        return f"Max is less than {horizon} away: {held}"
    way = "Rising to" if one.rising else "Falling to"
    return f"{way} {of_level(one.level, policy)}: {held}"


# What the ladder heard and decided


def _of_steps(episode: Episode) -> list[Row]:
    found = []
    before = model.Phase.WATCHING
    for step in episode.steps:
        way = f"{before.value} → {step.phase.value}" if step.phase is not before else step.phase.value
        rule = f"{way}: {step.rule}" if step.rule else (way if step.phase is not before else "")
        decided = tuple(_decided(each, episode.policy) for each in step.instructions)
        ends = any(isinstance(each, model.Terminate | model.Kill | model.Shed) for each in step.instructions)
        acts = any(isinstance(each, model.Deliver | model.HoldNow) for each in step.instructions)
        flagged = ends or acts or isinstance(step.event, model.Braked)
        kind = "grave" if ends else "decision" if decided else "done"
        row = _row(episode, step.at_ns, kind, _heard(step, episode), flagged)
        found.append(replace(row, rule=rule, values=_values(step, episode.policy), decided=decided))
        before = step.phase
    return found


def _heard(step: Step, episode: Episode) -> str:
    match step.event:
        case model.Braked(state=memory, frozen=frozen):
            hold = _hold_at(episode.holds, step.at_ns)
            took = f", {duration(hold.took_ns)} after the crossing" if hold and hold.took_ns else ""
            return f"Braked: {'held' if frozen else 'could not be held'}{took}, at {in_use(memory)}"
        case model.Sampled(state=memory) if memory:
            return f"A look: {in_use(memory)}"
        case model.Archived(ok=ok):
            return "The archive is complete" if ok else "The archive failed"
        case model.Answered(tier=tier, status=status):
            return f"The request to {tier.value}: {status.value}"
        case model.Ready(state=memory):
            return "The agent is idle and its session archived" + (f": {in_use(memory)}" if memory else "")
        case model.Shedded(killed=killed):
            return f"{plural(killed, 'process', 'processes')} got SIGKILL" if killed else "Nobody was left to kill"
        case model.Signalled(state=memory):
            return "SIGTERM is on its way to the agent" + (f", at {in_use(memory)}" if memory else "")
        case model.AgentEnded():
            return "The agent has ended"
        case model.Thawed():
            return "It runs again unasked: the loan was over, or it was a false alarm"
        case model.StillGrowing():
            return "It grows on although it is frozen: one long system call"
        case model.Stalled():
            return "Tasks wait for memory"
        case model.Vetoed(for_ns=for_ns):
            return (
                f"A person forbids everything but the brake for {duration(for_ns)}" if for_ns else "The veto is over"
            )
    return type(step.event).__name__


def _values(step: Step, policy: Policy) -> str:
    """The figures that the rule compared."""
    told = []
    match step.event:
        case model.Braked(state=memory, trend_bytes=trend_bytes, growth=growth, fill_rate_bytes=fill_bytes):
            last = policy.terminate.last_ratio
            if trend_bytes:
                left_ns = (last * memory.max_bytes - memory.unreclaimable_bytes) * SECOND / trend_bytes
                room = duration(policy.brake.probation_room_ns)
                told.append(
                    f"at {rate(trend_bytes)} {percent(last)} is {duration(max(0, left_ns))} away (room: {room})"
                )
            if fill_bytes:
                told.append(f"over the last milliseconds {rate(fill_bytes)}")
            if growth:
                least = size(policy.shed.grown_ratio * memory.max_bytes)
                told.append(f"{of_growth(growth)} (a tool is shed from {least} on)")
            if step.event.since_first:
                told.append(f"since before the first brake {of_growth(step.event.since_first)}")
    for each in step.instructions:
        match each:
            case model.Deliver(tier=tier):
                told.append(f"{tier.value} from {percent(getattr(policy, tier.value).engage_ratio)} on")
            case model.HoldNow():
                told.append(f"brake from {percent(policy.brake.engage_ratio)} on")
            case model.Kill():
                told.append(f"SIGKILL from {percent(policy.terminate.last_ratio)} on")
            case model.Settled(tier=tier):
                told.append(f"of use is {percent(getattr(policy, tier.value).freed_ratio)} of max or more")
    return "; ".join(told)


def _decided(instruction: Instruction, policy: Policy) -> str:
    said = _SAYS[type(instruction)](instruction)
    return f"(dry run) {said}" if policy.dry_run else said


_SAYS: dict[type[Instruction], Callable[..., str]] = {
    model.Warn: lambda one: f"warn: {one.what} {f'in {duration(one.in_ns)}' if one.in_ns else 'now'}: {one.reason}",
    model.Deliver: lambda one: f"ask the agent to {one.tier.value}: {one.reason}",
    model.Restart: lambda one: f"restart the agent with its session compacted: {one.reason}",
    model.Withheld: lambda one: f"no {one.tier.value}: {one.reason}",
    model.Settled: lambda one: (
        f"{one.tier.value} freed {size(one.freed_bytes)}: {'no use' if one.useless else 'of use'}"
    ),
    model.HoldNow: lambda one: f"brake: {one.reason}",
    model.Archive: lambda one: f"archive the session: {one.reason}",
    model.Squeeze: lambda one: f"throttle it above {size(one.high_bytes)}",
    model.Prolong: lambda one: f"hold it for up to {duration(one.for_ns)}, for the archive",
    model.Thaw: lambda one: f"thaw: {one.reason}; brake again at {percent(one.brake_ppm / record.PPM)}{_high(one)}",
    model.Shed: lambda one: f"kill the tree of process {one.culprit_pid} while it is held: {one.reason}",
    model.Terminate: lambda one: f"end the agent: {one.reason}",
    model.Kill: lambda one: f"SIGKILL to all of it: {one.reason}",
    model.UsualLevels: lambda one: "back to the usual levels, no throttle",
    model.NothingLeft: lambda one: f"NOTHING LEFT TO DO: {one.reason}",
}


def _high(thaw: model.Thaw) -> str:
    return "" if thaw.high_bytes is None else f", memory.high {size(thaw.high_bytes)}"


def _hold_at(holds: tuple[Hold, ...], at_ns: int) -> Hold | None:
    at = bisect_right(holds, at_ns, key=lambda hold: hold.from_ns)
    return holds[at - 1] if at else None


# What became of it


def _of_said(episode: Episode) -> list[Row]:
    found = []
    told_ns = max((step.at_ns for step in episode.steps if isinstance(step.event, model.Braked)), default=0)
    for said in episode.said:
        if said.kind in _SAID_TWICE or (said.kind == "braked" and said.at_ns <= told_ns):
            continue
        kind = "grave" if said.kind in _GRAVE else "done"
        found.append(_row(episode, said.at_ns, kind, said.text, said.kind in _FLAGGED))
    return found
