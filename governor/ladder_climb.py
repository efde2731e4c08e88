"""The deliberate tiers: which of compact, recycle, clear and the end is due by a sample, one at a time. Pure."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from governor import tiers
from governor.cgroup import MemoryState
from governor.ladder_state import Step, disturbed, is_vetoed, percent, why_forbidden
from governor.model import (
    Answered,
    Archive,
    Braked,
    Deliver,
    HoldNow,
    NothingLeft,
    Phase,
    Ready,
    Restart,
    State,
    Status,
    Tier,
    TierState,
    Warn,
    Withheld,
)
from governor.policy import MINUTE, Policy
from governor.tiers import since

_ASKED = (Status.RUNNING, Status.RESTARTING, Status.DEFERRED, Status.DELIVERED)  # and its effect is not known yet


def climb(state: State, memory: MemoryState, now_ns: int, policy: Policy, agent_bytes: int) -> Step:
    """One action, the strongest that is due; recycle before clear, as it keeps more."""
    compact, told = tiers.judged(Tier.COMPACT, state.compact, policy.compact, memory, now_ns)
    if told:
        return replace(state, compact=compact), told
    recycle, told = tiers.judged(Tier.RECYCLE, state.recycle, policy.recycle, memory, now_ns)
    if told:
        return replace(state, recycle=recycle), told
    clear, told = tiers.judged(Tier.CLEAR, state.clear, policy.clear, memory, now_ns)
    if told:
        return replace(state, clear=clear), told
    for tier in (_end, partial(_recycle, agent_bytes=agent_bytes), _clear, _compact):
        state, instructions = tier(state, memory, now_ns, policy)
        if instructions:
            return state, instructions
    return state, ()


def _end(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    """Tier 3 from samples: the brake first, if there is one."""
    if since(state.terminate_engaged_ns, now_ns) < policy.terminate.dwell_ns or state.terminate_engaged_ns is None:
        return state, ()
    ratio = memory.unreclaimable_ratio
    if policy.brakes:
        on_probation = state.phase is Phase.PROBATION
        just_told = bool(why_forbidden(state, now_ns, policy)) and since(state.told_ns, now_ns) < MINUTE
        if ratio < (policy.terminate.last_ratio if on_probation else policy.brake.engage_ratio) or just_told:
            return state, ()
        state = replace(state, terminate_engaged_ns=now_ns)  # should this be missed as well, in a dwell again
        return state, (HoldNow(f"{percent(memory)} of max, and the kernel's crossing was not heard"),)
    if ratio < policy.terminate.engage_ratio:
        return state, ()
    if forbidden := why_forbidden(state, now_ns, policy):
        if since(state.told_ns, now_ns) < MINUTE:
            return state, ()
        return replace(state, told_ns=now_ns), (NothingLeft(f"at {percent(memory)} of max; {forbidden}"),)
    waits = not tiers.finished(state.compact) and ratio < policy.terminate.last_ratio
    if waits or not tiers.attempted(state.compact):
        return state, ()
    if policy.dry_run and since(state.terminated_ns, now_ns) < MINUTE:
        return state, ()
    held = Braked(memory, None, False)
    state = replace(
        disturbed(state), phase=Phase.HELD, held=held, held_ns=now_ns, archived=False, must_terminate=True
    )
    where = f"at {percent(memory)} of max"
    return state, (Archive(where), Warn("terminate", 0, where))


def _compact(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    ratio, end_ratio = memory.unreclaimable_ratio, policy.terminate.engage_ratio
    due = tiers.is_due(state.compact, policy.compact, ratio, end_ratio, now_ns)
    if not due or is_vetoed(state, now_ns) or _is_asked(state.clear) or _is_asked(state.recycle):
        return replace(state, compact=replace(state.compact, warned_ns=None)), ()
    reason = f"{percent(memory)} of max is in use"
    compact, instructions = tiers.begun(Tier.COMPACT, state.compact, policy.compact, memory, now_ns, reason)
    return replace(state, compact=compact), instructions


def _recycle(state: State, memory: MemoryState, now_ns: int, policy: Policy, agent_bytes: int) -> Step:
    """Find out whether the agent can be restarted: where compact gives nothing, and there is room for it then."""
    recycle, wanted = state.recycle, policy.recycle
    deferred, vetoed = recycle.status is Status.DEFERRED, is_vetoed(state, now_ns)
    if vetoed or recycle.status not in (Status.RUNNING, Status.DEFERRED):  # it is not announced
        recycle = replace(recycle, warned_ns=None)
        state = replace(state, recycle=recycle)
    announced = recycle.warned_ns is not None and since(recycle.warned_ns, now_ns) < wanted.warning_ns
    cooled = deferred or since(recycle.delivered_ns, now_ns) >= wanted.cooldown_ns
    due = (
        not vetoed
        and not announced
        and cooled
        and recycle.reachable
        and tiers.gave_nothing(state.compact)
        and not _is_asked(state.clear)
    )
    if not due or not tiers.is_due(recycle, wanted, memory.unreclaimable_ratio, 1.0, now_ns):
        return state, ()
    if status := tiers.impossible(recycle, wanted, now_ns):
        return replace(state, recycle=replace(recycle, status=status, at_ns=now_ns)), ()
    if why_not := tiers.unfit(wanted, state.resumed_peak_bytes, memory, agent_bytes, _fits_under(policy)):
        if recycle.status is Status.UNFIT:
            return state, ()
        recycle = replace(recycle, status=Status.UNFIT, at_ns=now_ns, warned_ns=None)
        return replace(state, recycle=recycle), (
            Withheld(Tier.RECYCLE, f"{percent(memory)} of max is in use; {why_not}"),
        )
    reason = f"{percent(memory)} of max is in use; compact: {state.compact.status.value}"
    recycle = tiers.running(recycle, memory, now_ns)
    return replace(disturbed(state), recycle=recycle), (Deliver(Tier.RECYCLE, reason),)


def ready(state: State, event: Ready, now_ns: int, policy: Policy) -> Step:
    """The agent is idle and archived: restart it if that is still due, after a warning."""
    memory, recycle, wanted = event.state, state.recycle, policy.recycle
    later = replace(recycle, status=Status.DEFERRED, at_ns=now_ns)
    climbs = state.phase in (Phase.WATCHING, Phase.PROBATION) and not is_vetoed(state, now_ns)
    if not climbs or memory is None or memory.unreclaimable_ratio < wanted.release_ratio:
        return replace(state, recycle=replace(later, warned_ns=None)), ()
    if tiers.unfit(wanted, state.resumed_peak_bytes, memory, event.agent_bytes, _fits_under(policy)):
        return replace(state, recycle=replace(later, warned_ns=None)), ()  # the next sample says so
    held_mib = event.agent_bytes >> 20
    reason = (
        f"{percent(memory)} of max is in use, {held_mib} MiB by an idle agent; compact: {state.compact.status.value}"
    )
    if wanted.warning_ns and recycle.warned_ns is None:
        warned = replace(later, warned_ns=now_ns)
        return replace(state, recycle=warned), (Warn("recycle", wanted.warning_ns, reason),)
    at_bytes = max(recycle.at_bytes, memory.unreclaimable_bytes)
    recycle = replace(recycle, status=Status.RESTARTING, tried_ns=now_ns, delivered_ns=now_ns, at_bytes=at_bytes)
    return replace(state, recycle=replace(recycle, warned_ns=None)), (Restart(reason),)


def recycle_answered(state: State, event: Answered, now_ns: int) -> State:
    """A recycle was deferred, failed, or has brought an agent, whose peak is looked for from now on."""
    recycle = tiers.answered(state.recycle, event.status, event.state, now_ns)
    if recycle is not state.recycle:  # whoever is busy again is to be warned again
        recycle = replace(recycle, warned_ns=None)
    brought = recycle is not state.recycle and recycle.status is Status.DELIVERED
    return replace(state, recycle=recycle, resumed_peak_bytes=0 if brought else state.resumed_peak_bytes)


def _clear(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    compact, clear = state.compact, state.clear
    ratio = memory.unreclaimable_ratio
    recent = since(compact.at_ns, now_ns) <= policy.clear_after_compact_ns
    helped = compact.status is Status.SETTLED and memory.unreclaimable_bytes <= compact.at_bytes
    recycled = _is_asked(state.recycle) or (state.recycle.status is Status.SETTLED and not state.recycle.useless)
    due = tiers.finished(compact) and recent and not helped and tiers.is_due(clear, policy.clear, ratio, 1.0, now_ns)
    if not due or recycled or is_vetoed(state, now_ns):
        return replace(state, clear=replace(clear, warned_ns=None)), ()
    reason = f"{percent(memory)} of max is in use; compact: {compact.status.value}"
    clear, instructions = tiers.begun(Tier.CLEAR, clear, policy.clear, memory, now_ns, reason)
    if any(isinstance(instruction, Deliver) for instruction in instructions):
        compact = tiers.disturbed(compact)
    return replace(state, compact=compact, clear=clear), instructions


def _fits_under(policy: Policy) -> float:
    """The share of max that whoever comes back must not reach."""
    brake_ratio = policy.brake.engage_ratio if policy.brake.enabled else 1.0
    return min(brake_ratio, policy.terminate.engage_ratio)


def _is_asked(tier: TierState) -> bool:
    """Whether it was announced, or its effect is not known yet."""
    return tier.warned_ns is not None or tier.status in _ASKED
