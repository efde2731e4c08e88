"""What an episode comes to: its outcome, who grew, what each tier freed, what can be restored. Pure; no words."""

from __future__ import annotations

import shlex
from bisect import bisect_right
from dataclasses import dataclass
from enum import Enum

from governor import model
from governor.model import Growth, Status, Tier
from governor.policy import SECOND
from governor.report_episodes import Episode
from governor.report_read import Look, Said, Saved

_GIVEN_BACK_NS = 2 * SECOND  # by then the memory of what was killed is given back, as in tally.py


class Outcome(Enum):
    """How it ended: the gravest that happened."""

    OOM_KILLED = "oom_killed"  # the agent, by the kernel
    KILLED = "killed"  # the agent, by governor's SIGKILL
    TERMINATED = "terminated"  # the agent, by governor's SIGTERM
    SHED = "shed"  # a tool
    OOM_KILL = "oom_kill"  # somebody beside the agent, by the kernel
    RECYCLED = "recycled"
    NOTHING_LEFT = "nothing_left"
    CLEARED = "cleared"
    COMPACTED = "compacted"
    HELD = "held"
    CROSSED = "crossed"


@dataclass(frozen=True, slots=True)
class Freed:
    """What a tier gave back; `bytes` None: no look followed. `is_use` only of what the ladder has judged."""

    tier: str
    at_ns: int
    bytes: int | None
    is_use: bool | None = None


@dataclass(frozen=True, slots=True)
class Findings:
    """What the answers are made of."""

    outcome: Outcome
    dry_run: bool
    growths: tuple[tuple[int, Growth], ...]  # and when
    killed: tuple[tuple[int, str], ...]  # what governor said of each SIGKILL
    freed: tuple[Freed, ...]
    asked: tuple[tuple[int, Tier, Status], ...]  # when and how each delivery ended
    held_ns: int
    held_at_most: bool  # not all thaws were heard of
    sigterm: Said | None
    agent_ended_ns: int | None  # after that
    restore: Saved | None  # the archive to restore


def of(episode: Episode) -> Findings:
    """All of it."""
    steps = episode.steps
    growths = tuple(
        (step.at_ns, step.event.since_first or step.event.growth)
        for step in steps
        if isinstance(step.event, model.Braked) and step.event.growth
    )
    asked = tuple(
        (step.at_ns, step.event.tier, step.event.status) for step in steps if isinstance(step.event, model.Answered)
    )
    killed = tuple((said.at_ns, said.text) for said in episode.said if said.kind in ("killed", "shed"))
    held = [hold for hold in episode.holds if hold.frozen]
    sigterm = next((said for said in episode.said if said.kind == "terminating" and said.sent), None)
    return Findings(
        outcome=_outcome(episode),
        dry_run=episode.policy.dry_run,
        growths=growths,
        killed=killed,
        freed=_freed(episode),
        asked=asked,
        held_ns=sum(episode.until_ns(hold) - hold.from_ns for hold in held),
        held_at_most=not all(hold.is_heard for hold in held),
        sigterm=sigterm,
        agent_ended_ns=_agent_ended_ns(episode, sigterm),
        restore=next((saved for saved in reversed(episode.saved) if saved.files or saved.base), None),
    )


def restore_command(saved: Saved, to: str = "restored") -> str:
    """What brings an archive's files back; those of its base come with it."""
    words = ("governor", "archive", "restore", saved.name, "--to", to, "--archive-dir", saved.directory)
    return shlex.join(words)


def _outcome(episode: Episode) -> Outcome:
    kinds = {said.kind for said in episode.said}
    done = {type(each) for step in episode.steps for each in step.instructions}
    delivered = {
        step.event.tier
        for step in episode.steps
        if isinstance(step.event, model.Answered) and step.event.status is Status.DELIVERED
    }
    shed = any(isinstance(step.event, model.Shedded) and step.event.killed for step in episode.steps)
    asked_to_end = [said.sent for said in episode.said if said.kind == "terminating"]
    told = (
        (Outcome.OOM_KILLED, "oom_killed" in kinds),
        (Outcome.KILLED, model.Kill in done),
        (Outcome.TERMINATED, model.Terminate in done and (not asked_to_end or any(asked_to_end))),
        (Outcome.SHED, shed),
        (Outcome.OOM_KILL, bool(kinds & {"oom_kill", "oom_kills"})),
        (Outcome.RECYCLED, "recycling" in kinds),
        (Outcome.NOTHING_LEFT, "nothing_left" in kinds),
        (Outcome.CLEARED, Tier.CLEAR in delivered),
        (Outcome.COMPACTED, Tier.COMPACT in delivered),
        (Outcome.HELD, bool(episode.holds)),
    )
    return next((outcome for outcome, happened in told if happened), Outcome.CROSSED)


def _agent_ended_ns(episode: Episode, sigterm: Said | None) -> int | None:
    """From SIGTERM to the agent's end; None where it got none, or was not seen to end."""
    ended = (said.at_ns for said in episode.said if said.kind == "agent_ended")
    return next((at_ns - sigterm.at_ns for at_ns in ended if at_ns >= sigterm.at_ns), None) if sigterm else None


def _freed(episode: Episode) -> tuple[Freed, ...]:
    found = []
    held_bytes = 0
    asked = False  # to end
    for step in episode.steps:
        if isinstance(step.event, model.Braked):
            held_bytes = step.event.state.unreclaimable_bytes
        for each in step.instructions:
            if isinstance(each, model.Settled):
                found.append(Freed(each.tier.value, step.at_ns, each.freed_bytes, not each.useless))
            asked = asked or isinstance(each, model.Terminate)
        tier = "shed" if isinstance(step.event, model.Shedded) and step.event.killed else ""
        if tier or (asked and isinstance(step.event, model.AgentEnded)):
            after = _given_back(episode.looks, step.at_ns)
            freed = held_bytes - after.memory.unreclaimable_bytes if after and held_bytes else None
            found.append(Freed(tier or "terminate", step.at_ns, freed))
            asked = asked and bool(tier)
    return tuple(found)


def _given_back(looks: tuple[Look, ...], at_ns: int) -> Look | None:
    """The look that shows most of what was freed within the time that it takes."""
    at = bisect_right(looks, at_ns, key=lambda look: look.at_ns)
    until = bisect_right(looks, at_ns + _GIVEN_BACK_NS, key=lambda look: look.at_ns)
    return min(looks[at : max(until, at + 1)], key=lambda look: look.memory.unreclaimable_bytes, default=None)
