"""What the rules of the ladder have in common: what is forbidden now, what is over, what has been disturbed. Pure."""

from __future__ import annotations

from dataclasses import replace

from governor import tiers
from governor.cgroup import MemoryState
from governor.model import Instruction, Phase, State, Status
from governor.policy import Policy
from governor.tiers import since

Step = tuple[State, tuple[Instruction, ...]]


def agent_ended(state: State) -> State:
    """Attempts, cooldowns and what was learned outlast the agent; what was under way does not, but for a recycle."""
    state = disturbed(state)
    return replace(
        state,
        phase=Phase.WATCHING,
        held=None,
        held_ns=None,
        archived=False,
        must_terminate=False,
        shed_ns=None,
        probation_ns=None,
        killed=False,
        compact=tiers.lost(state.compact),
        recycle=state.recycle if state.recycle.status is Status.RESTARTING else tiers.lost(state.recycle),
        clear=tiers.lost(state.clear),
    )


def disturbed(state: State) -> State:
    """Something is done that changes memory: no tier under way can be judged by itself any more."""
    restarting = state.recycle.status is Status.RESTARTING  # judged when the next agent has settled
    return replace(
        state,
        compact=tiers.disturbed(state.compact),
        recycle=state.recycle if restarting else tiers.disturbed(state.recycle),
        clear=tiers.disturbed(state.clear),
    )


def is_vetoed(state: State, now_ns: int) -> bool:
    """Whether a person has stopped everything but the brake."""
    return since(state.veto_from_ns, now_ns) < state.veto_for_ns


def why_forbidden(state: State, now_ns: int, policy: Policy) -> str:
    """Why nothing may be terminated; empty if it may."""
    if is_vetoed(state, now_ns):
        return "governor hold forbids more"
    return "" if policy.terminate.enabled else "the policy has no terminate"


def percent(memory: MemoryState) -> str:
    """How much of max is in use, for people."""
    return f"{100 * memory.unreclaimable_ratio:.1f} %"
