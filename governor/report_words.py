"""A report in words: what the reader of a post-mortem asks, answered, before anything is drawn. Pure.

When did it start, who grew, what did governor do, what was lost, how do I get it back; then the trace and the facts.
Every form of a report (HTML, Markdown, JSON) is this Document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from governor import report_trace
from governor.model import Status, Tier
from governor.policy import Policy
from governor.policy_keys import KEYS, flatten, written
from governor.report_episodes import Episode, episodes
from governor.report_figures import clock, duration, moment, percent, plural, rate, size, times
from governor.report_findings import Findings, Freed, Outcome, of, restore_command
from governor.report_read import Begun, History, Report
from governor.report_trace import Row, in_use, of_growth

EPISODES_LIMIT = 20
_DEEDS_LIMIT, _FREED_LIMIT = 12, 50
_HEADLINES = {
    Outcome.OOM_KILLED: "The agent was killed by the kernel's OOM killer",
    Outcome.KILLED: "The agent was killed: memory was full before it had ended",
    Outcome.TERMINATED: "The agent was ended: there was no room to let it run on",
    Outcome.SHED: "A tool burst and was killed; the agent lived",
    Outcome.OOM_KILL: "The kernel's OOM killer got through",
    Outcome.RECYCLED: "The idle agent was restarted with its session compacted",
    Outcome.NOTHING_LEFT: "Memory was full, and governor was not allowed to do more",
    Outcome.CLEARED: "The agent was asked to clear its context",
    Outcome.COMPACTED: "The agent was asked to compact",
    Outcome.HELD: "It was held for a moment and went on",
    Outcome.CROSSED: "A level was crossed; nothing was lost",
}


_END_IT = (Outcome.OOM_KILLED, Outcome.KILLED, Outcome.TERMINATED)  # the agent


@dataclass(frozen=True, slots=True)
class Answer:
    """A question, its answer in sentences, and commands to copy."""

    question: str
    sentences: tuple[str, ...]
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Told:
    """One episode in words; the newest is number 1."""

    number: int
    when: str
    headline: str
    answers: tuple[Answer, ...]
    freed: tuple[tuple[str, str, str], ...]  # tier, when, how much; the last ones
    rows: tuple[Row, ...]
    left_out: int
    episode: Episode


@dataclass(frozen=True, slots=True)
class Document:
    """A whole report."""

    title: str
    span: str
    episodes: tuple[Told, ...]
    remarks: tuple[str, ...]
    facts: tuple[tuple[str, str], ...]
    policy: tuple[tuple[str, str, bool], ...]  # key, value as a policy file has it, whether it is the built-in one
    history: History | None  # of the target that was heard of last: drawn where there is no episode


def document(report: Report) -> Document:
    """Everything in words; a journal without anything in it makes a document that says so."""
    found = [(history, episode) for history in report.histories for episode in episodes(history)]
    found.sort(key=lambda one: one[1].from_ns, reverse=True)
    history = report.histories[0] if report.histories else None
    begun = history.begun[-1] if history and history.begun else None
    several = f" and {len(report.histories) - 1} more" if len(report.histories) > 1 else ""
    return Document(
        title=f"{history.target}{several}" if history else "an empty journal",
        span=f"{moment(min(each.first_ns for each in report.histories))} to {moment(history.last_ns)}"
        if history
        else "",
        episodes=tuple(_told(number, one) for number, (_, one) in enumerate(found[:EPISODES_LIMIT], 1)),
        remarks=tuple(_remarks(report, len(found))),
        facts=tuple(_facts(history, begun)) if history else (),
        policy=_policy(begun.policy) if begun else (),
        history=history,
    )


def _told(number: int, episode: Episode) -> Told:
    findings = of(episode)
    rows, left_out = report_trace.rows(episode)
    return Told(
        number,
        moment(episode.from_ns),
        _headline(findings),
        (
            Answer("When did it start?", tuple(_start(episode))),
            Answer("Who grew?", tuple(_who(episode, findings))),
            Answer("What did governor do?", tuple(_did(episode, findings))),
            Answer("What was lost?", tuple(_lost(findings))),
            _back(episode, findings),
        ),
        tuple((one.tier, clock(one.at_ns), _freed(one)) for one in findings.freed[-_FREED_LIMIT:]),
        rows,
        left_out,
        episode,
    )


def _headline(findings: Findings) -> str:
    headline = _HEADLINES[findings.outcome]
    ends_agent = findings.outcome in _END_IT
    if ends_agent and findings.restore is None:
        headline += "; no session file was archived"
    if ends_agent and any(one.tier == "shed" for one in findings.freed):
        headline = f"A tool burst and was killed; later {headline[0].lower()}{headline[1:]}"
    if findings.dry_run:
        return f"Dry run, nothing was touched. As decided: {headline[0].lower()}{headline[1:]}"
    return headline


# The answers


def _start(episode: Episode) -> Iterator[str]:
    peak, rise = episode.peak, episode.rise
    if rise and peak and peak.at_ns > rise.at_ns:
        grown_bytes = peak.memory.unreclaimable_bytes - rise.memory.unreclaimable_bytes
        span_ns = peak.at_ns - rise.at_ns
        yield (
            f"At {clock(rise.at_ns)} UTC, from {in_use(rise.memory)}. It grew to {in_use(peak.memory)} in "
            f"{duration(span_ns)}: by {size(grown_bytes)}, {rate(grown_bytes * 1e9 / span_ns)}."
        )
    first = next((one for one in episode.crossings if one.rising), None)
    if first:
        name = report_trace.of_level(first.level, episode.policy)
        yield f"The first crossing was heard at {clock(first.at_ns)}: {name}."
    fastest = max((one.fill_rate_bytes or 0 for one in episode.crossings), default=0)
    if fastest:
        yield f"At its fastest, over some milliseconds, it filled at {rate(fastest)}."
    yield f"It was over, or the journal ends, {duration(episode.to_ns - episode.from_ns)} after the first level."


def _who(episode: Episode, findings: Findings) -> Iterator[str]:
    for at_ns, growth in findings.growths[:5]:
        seen = (
            "" if growth.known_ratio >= 1 else f"; {percent(growth.known_ratio)} of the processes could be looked at"
        )
        yield f"At the brake of {clock(at_ns)}: {of_growth(growth)}{seen}."
    if len(findings.growths) > 5:
        yield f"And {plural(len(findings.growths) - 5, 'more brake')}: see the trace."
    rise, peak = episode.rise, episode.peak
    if not findings.growths and rise and peak and rise.agent_bytes and peak.agent_bytes:
        agent_bytes = peak.agent_bytes - rise.agent_bytes
        all_bytes = peak.memory.unreclaimable_bytes - rise.memory.unreclaimable_bytes
        yield f"The agent and what descends from it by {size(agent_bytes)}, of {size(all_bytes)} in all."
    elif not findings.growths:
        yield "It is not known: whose growth it was is journaled with a brake, and nothing was braked."


def _did(episode: Episode, findings: Findings) -> Iterator[str]:
    if findings.dry_run:
        yield "Nothing: the policy is a dry run. What it would have done is in the trace."
        return
    held = [hold for hold in episode.holds if hold.frozen]
    took = [hold.took_ns for hold in held if hold.took_ns is not None]
    if held:
        soon = f"; the first {duration(took[0])} after the crossing" if took else ""
        yield f"Held it {times(len(held))}, {_held_for(findings)} in all{soon}."
    if missed := len(episode.holds) - len(held):
        yield f"Wanted to hold it {times(missed)} and could not."
    deeds = sorted(_deeds(episode, findings))
    yield from (f"{clock(at_ns)}: {text}." for at_ns, text in deeds[:_DEEDS_LIMIT])
    if len(deeds) > _DEEDS_LIMIT:
        yield f"And {len(deeds) - _DEEDS_LIMIT} more: see the trace."
    if not (episode.holds or deeds):
        yield "Watched: no action was due."


def _deeds(episode: Episode, findings: Findings) -> Iterator[tuple[int, str]]:
    """What was done, and when."""
    for saved in episode.saved:
        if saved.is_new:
            delta = "changed session file" if saved.base else "session file"
            left = f", left out {saved.skipped}" if saved.skipped else ""
            yield saved.at_ns, f"archived {plural(saved.files, delta)}{left}"
    for at_ns, tier, status in findings.asked:
        yield at_ns, f"asked the agent to {tier.value}: {status.value}"
    yield from findings.killed
    if findings.sigterm:
        ended_ns = findings.agent_ended_ns
        after = "" if ended_ns is None else f"; it ended {duration(ended_ns)} later"
        yield findings.sigterm.at_ns, f"{findings.sigterm.text.partition(':')[0]}{after}"
    for said in episode.said:
        if said.kind in ("oom_killed", "oom_kills", "recycling", "nothing_left"):
            yield said.at_ns, said.text
        elif said.kind == "terminating" and not said.sent:
            yield said.at_ns, f"wanted to end the agent, and nobody was signalled: {said.text}"


def _lost(findings: Findings) -> Iterator[str]:
    delivered = {tier for _, tier, status in findings.asked if status is Status.DELIVERED} - {Tier.RECYCLE}
    if findings.dry_run:
        yield "By governor: nothing."
        return
    match findings.outcome:
        case Outcome.OOM_KILLED:
            after = " Its session files were archived after the fact." if findings.restore else ""
            yield f"All that the agent held only in memory.{after}"
        case Outcome.KILLED:
            yield "What the agent held only in memory: its SIGTERM handler was cut short or had no time."
        case Outcome.TERMINATED:
            yield "What the agent held only in memory and its SIGTERM handler did not write."
        case Outcome.RECYCLED:
            yield "What the agent had running in the background, and the detail that compaction summarises."
        case Outcome.SHED:
            yield "The tool's work. The agent's process and session are unharmed."
        case Outcome.OOM_KILL:
            yield "The processes that the kernel chose. governor does not know what they held."
        case _ if not delivered:
            yield "Nothing."
    if delivered:
        asked = " and ".join(sorted(tier.value for tier in delivered))
        yield f"By {asked}: what the agent leaves out of its context."
    if findings.held_ns:
        yield f"Time: {_held_for(findings)} in which it stood still."


def _held_for(findings: Findings) -> str:
    return f"{'at most ' if findings.held_at_most else ''}{duration(findings.held_ns)}"


def _back(episode: Episode, findings: Findings) -> Answer:
    question = "How do I get it back?"
    saved = findings.restore
    if saved is None:
        empty = bool(episode.saved)
        why = "no session file was found to archive: name them with --archive" if empty else "no archive was made"
        return Answer(question, (f"There is nothing to restore: {why}.",))
    files = plural(saved.files, "changed file" if saved.base else "file")
    whole = ", with those of the full one before it" if saved.base else ""
    lives = () if findings.outcome in _END_IT else ("The agent went on with its session; as it was then:",)
    return Answer(
        question,
        (
            *lives,
            f"Archive {saved.name} of {clock(saved.at_ns)} holds {files}{whole}.",
            "Restore verifies it and replaces nothing; --to / --overwrite puts the files where they were.",
            "Where governor ran, as the same user:",
        ),
        (restore_command(saved),),
    )


def _freed(one: Freed) -> str:
    if one.bytes is None:
        return "not known: no look followed"
    verdict = {None: "", True: ", of use", False: ", no use"}[one.is_use]
    return f"{size(one.bytes)}{verdict}"


# The facts


def _remarks(report: Report, count: int) -> Iterator[str]:
    if report.histories and not any(history.begun for history in report.histories):
        yield "No policy is in it: a node's own journal, or a part of one. Each container has a journal of its own."
    elif not count:
        yield "No level was crossed, and governor had nothing to do."
    if count > EPISODES_LIMIT:
        yield f"The {EPISODES_LIMIT} newest of {count} episodes are told; the others are in the journal."
    if report.torn:
        yield f"{plural(report.torn, 'line')} of {report.lines} cut off or no JSON: passed over."
    if report.foreign:
        yield f"{plural(report.foreign, 'line')} of {report.lines} not known to this version: passed over."


def _facts(history: History, begun: Begun | None) -> Iterator[tuple[str, str]]:
    said = {one.kind: one.text for one in history.said}
    guard = begun.guard if begun else {}
    facts = begun.facts if begun else {}
    yield "target", history.target
    yield from {"kernel": "not in this journal: an earlier version wrote it", **facts}.items()
    yield "protection", said.get("protecting", "never began").removeprefix("protecting: ")
    if refused := said.get("bpf_refused"):
        yield "BPF", refused
    yield "agent", said.get("agent", "none was found")
    for name in ("policy", "profile", "program", "archive_directory", "journal_path"):
        if value := guard.get(name):
            yield name.replace("_", " "), value
    if history.looks:
        last = history.looks[-1]
        yield "last look", f"{in_use(last.memory)}, at {moment(last.at_ns)}"


def _policy(policy: Policy) -> tuple[tuple[str, str, bool], ...]:
    values, usual = flatten(policy), flatten(Policy())
    return tuple((path, written(key, values[path]), values[path] == usual[path]) for path, key in KEYS.items())
