"""Which remedy comes next: the table, and the step from an event to what follows.

Everything that decides stands here and in `ladder_brake`, `ladder_climb` and `tiers`: nothing there acts or reads a
clock.

Theory. An event comes in, `step` returns the next state and the instructions to carry out; what becomes of an
instruction comes back as a further event. At most one instruction of a step changes anything for the target
(ACTIONS); the others prepare, tell or undo. TRANSITIONS is the whole of it: a test holds every step that any history
takes against it, and the README's diagram is drawn from it.

A brake is a loan, and a decision ends it: the growth of a tool is shed (the tool dies, the agent lives), growth with
room for it gets a probation, anything else is terminated once the session is archived. Compact comes before that in
every episode: delivered, failed, queued by the brake, or found impossible; never silently skipped. Where it frees
nothing, an idle agent is recycled: restarted with its session compacted, if it is predicted to fit. Clear follows a
compact of the last five minutes that has settled and has not helped. A person's veto stops everything but the brake.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from governor import ladder_brake, ladder_climb, ladder_state, tiers
from governor.cgroup import MemoryState
from governor.ladder_state import Step
from governor.model import (
    AgentEnded,
    Answered,
    Archive,
    Archived,
    Braked,
    Deliver,
    Event,
    HoldNow,
    Instruction,
    Kill,
    NothingLeft,
    Phase,
    Prolong,
    Reachable,
    Ready,
    Restart,
    Sampled,
    Settled,
    Shed,
    Shedded,
    Signalled,
    Squeeze,
    Stalled,
    State,
    Status,
    StillGrowing,
    Terminate,
    Thaw,
    Thawed,
    Tier,
    TierState,
    UsualLevels,
    Vetoed,
    Warn,
    Withheld,
)
from governor.policy import SECOND, Policy
from governor.tiers import since

ACTIONS = (Deliver, Restart, HoldNow, Squeeze, Thaw, Shed, Terminate, Kill)
_CALM_NS = 10 * SECOND  # below the release level for so long ends an episode
_STALL_COUNTS_NS = 2 * SECOND


@dataclass(frozen=True, slots=True)
class Transition:
    """One row of the table: what may follow from an event in a phase."""

    phase: Phase
    event: type[Event]
    when: str
    next: Phase
    does: tuple[type[Instruction], ...] = ()


_W, _H, _P, _T = Phase.WATCHING, Phase.HELD, Phase.PROBATION, Phase.TERMINATING

TRANSITIONS = (
    Transition(
        _W, Sampled, "compact is due, or clear after compact, or recycle where that frees nothing", _W, (Deliver,)
    ),
    Transition(_W, Sampled, "recycle is due, and the agent would not fit when it comes back", _W, (Withheld,)),
    Transition(_W, Ready, "recycle is still due, and the user is to be warned before", _W, (Warn,)),
    Transition(_W, Ready, "recycle is still due", _W, (Restart,)),
    Transition(_W, Sampled, "a delivery has settled", _W, (Settled,)),
    Transition(_W, Sampled, "a delivery is due, and the user is to be warned before", _W, (Warn,)),
    Transition(_W, Sampled, "over the brake level, and no crossing was heard", _W, (HoldNow,)),
    Transition(_W, Sampled, "no brake by policy, over the terminate level, compact attempted", _H, (Archive, Warn)),
    Transition(_W, Sampled, "full, and policy or a veto forbids the rest", _W, (NothingLeft,)),
    Transition(_W, Braked, "there is room", _H, (Archive,)),
    Transition(_W, Braked, "no room, the growth is a tool's", _H, (Archive, Shed)),
    Transition(_W, Braked, "no room, the growth is the agent's own", _H, (Archive, Prolong, Warn)),
    Transition(_W, AgentEnded, "", _W, (UsualLevels,)),
    Transition(_H, Archived, "there is room", _P, (Thaw,)),
    Transition(_H, Archived, "it grew on although frozen, and the growth is a tool's", _H, (Shed,)),
    Transition(_H, Archived, "no room, or it grew on although frozen", _T, (Terminate,)),
    Transition(_H, Archived, "as above, and policy or a veto forbids it", _P, (Thaw, NothingLeft)),
    Transition(_H, Sampled, "the tool's memory came back", _P, (Thaw,)),
    Transition(_H, Sampled, "it did not come back, or was not enough, and another grew", _H, (Prolong, Shed)),
    Transition(_H, Sampled, "no archive came, and the growth is a tool's", _H, (Shed,)),
    Transition(_H, Sampled, "it did not come back, or no archive came", _T, (Terminate,)),
    Transition(_H, Sampled, "as above, and policy or a veto forbids it", _P, (Thaw, NothingLeft)),
    Transition(_H, StillGrowing, "one long system call, which only memory.high slows", _H, (Squeeze,)),
    Transition(_H, Thawed, "the loan was over", _P),
    Transition(_H, Braked, "braked in the meantime", _H, (Archive,)),
    Transition(_H, Braked, "the same, no room, the growth is a tool's", _H, (Archive, Shed)),
    Transition(_H, Braked, "the same, no room, the growth is the agent's own", _H, (Archive, Prolong, Warn)),
    Transition(_H, AgentEnded, "", _W, (UsualLevels,)),
    Transition(_P, Sampled, "over, and calm", _W, (UsualLevels,)),
    Transition(
        _P, Sampled, "compact is due, or clear after compact, or recycle where that frees nothing", _P, (Deliver,)
    ),
    Transition(_P, Sampled, "recycle is due, and the agent would not fit when it comes back", _P, (Withheld,)),
    Transition(_P, Ready, "recycle is still due, and the user is to be warned before", _P, (Warn,)),
    Transition(_P, Ready, "recycle is still due", _P, (Restart,)),
    Transition(_P, Sampled, "a delivery has settled", _P, (Settled,)),
    Transition(_P, Sampled, "a delivery is due, and the user is to be warned before", _P, (Warn,)),
    Transition(_P, Sampled, "over the last level, and no crossing was heard", _P, (HoldNow,)),
    Transition(_P, Sampled, "no brake by policy, over the terminate level, compact attempted", _H, (Archive, Warn)),
    Transition(_P, Sampled, "full, and policy or a veto forbids the rest", _P, (NothingLeft,)),
    Transition(_P, Braked, "there is room; the first was early, or the growth is the agent's own", _H, (Archive,)),
    Transition(_P, Braked, "again, the growth is a tool's", _H, (Archive, Shed)),
    Transition(_P, Braked, "again, the growth is the agent's own", _H, (Archive, Prolong, Warn)),
    Transition(_P, AgentEnded, "", _W, (UsualLevels,)),
    Transition(_T, Signalled, "frozen, below the last level", _T, (Thaw,)),
    Transition(_T, Signalled, "at the last level", _T, (Kill,)),
    Transition(_T, Braked, "at the last level, before it had ended", _T, (Kill,)),
    Transition(_T, Sampled, "the grace is over, or not frozen and at the last level", _T, (Kill,)),
    Transition(_T, Sampled, "killed, and nobody knew the agent", _W, (UsualLevels,)),
    Transition(_T, AgentEnded, "", _W, (UsualLevels,)),
)


def step(state: State, event: Event, now_ns: int, policy: Policy) -> Step:
    """The next state and what to do. What the table does not name changes no phase and asks for nothing."""
    match event:
        case Sampled(state=memory, at_ns=at_ns):
            fresh = memory if since(at_ns, now_ns) <= policy.signals.stale_ns else None
            return _sampled(_peaked(state, event), fresh, now_ns, policy, event.agent_bytes)
        case Stalled():
            return replace(state, stalled_ns=now_ns), ()
        case Braked():
            return ladder_brake.braked(state, event, now_ns, policy)
        case StillGrowing() if state.phase is Phase.HELD and state.shed_ns is None:
            return ladder_brake.still_growing(state, policy)
        case Archived() if state.phase is Phase.HELD:
            state = replace(state, archived=True)
            if state.shed_ns is not None:
                return state, ()
            return ladder_brake.decide(state, event.state, now_ns, policy)
        case Shedded() if state.phase is Phase.HELD and state.shed_ns is not None:
            return ladder_brake.shedded(state, event, now_ns), ()
        case Thawed() if state.phase is Phase.HELD:
            return ladder_brake.running(state, now_ns), ()
        case Signalled(state=memory) if state.phase is Phase.TERMINATING:
            return ladder_brake.signalled(replace(state, signalled=True), memory, policy)
        case Answered(tier=Tier.COMPACT, status=status, state=memory):
            return replace(state, compact=tiers.answered(state.compact, status, memory, now_ns)), ()
        case Answered(tier=Tier.RECYCLE):
            return ladder_climb.recycle_answered(state, event, now_ns), ()
        case Answered(tier=Tier.CLEAR, status=status, state=memory):
            return replace(state, clear=tiers.answered(state.clear, status, memory, now_ns)), ()
        case Ready() if state.recycle.status is Status.RUNNING:
            return ladder_climb.ready(state, event, now_ns, policy)
        case Reachable(tier=Tier.COMPACT, reachable=reachable):
            return replace(state, compact=replace(state.compact, reachable=reachable)), ()
        case Reachable(tier=Tier.RECYCLE, reachable=reachable):
            return replace(state, recycle=replace(state.recycle, reachable=reachable)), ()
        case Reachable(tier=Tier.CLEAR, reachable=reachable):
            return replace(state, clear=replace(state.clear, reachable=reachable)), ()
        case AgentEnded():
            return ladder_state.agent_ended(state), (UsualLevels(),)
        case Vetoed(for_ns=for_ns):
            return replace(state, veto_from_ns=now_ns if for_ns else None, veto_for_ns=for_ns), ()
    return state, ()


_WHEN = {(t.phase, t.event, t.next, t.does): t.when or t.event.__name__ for t in reversed(TRANSITIONS)}


def rule(before: Phase, event: Event, after: Phase, instructions: tuple[Instruction, ...]) -> str:
    """The row of the table that a step was; empty for one that only remembers something."""
    return _WHEN.get((before, type(event), after, tuple(type(each) for each in instructions)), "")


def resumed(state: State, same_agent: bool, now_ns: int) -> State:
    """What an earlier governor left, taken up again: it may have died in the middle of anything.

    What was held is on probation (whoever survived has thawed it), unless its agent is gone. A delivery that was
    under way may have reached the agent: it counts as delivered, so that it is not made twice; one that was only
    queued or deferred has failed, and so has a recycle, unless its agent is gone: then it goes on. The grace of an
    agent that was told to end goes on if it is still the same; if it was not told yet, that is decided anew.
    """
    state = replace(state, veto_from_ns=None, veto_for_ns=0)  # what still holds is heard again
    recycle = replace(state.recycle, reachable=False)
    if same_agent or recycle.status is not Status.RESTARTING:
        recycle = tiers.lost(recycle)
    state = replace(state, recycle=recycle)
    if not same_agent and state.phase is not Phase.WATCHING:  # it was about another one
        return ladder_state.agent_ended(state)
    state = ladder_state.disturbed(state)
    unreachable = [replace(tier, reachable=False) for tier in (state.compact, state.clear)]  # nobody is there yet
    compact, clear = (tiers.lost(tiers.interrupted(tier, now_ns)) for tier in unreachable)
    state = replace(state, compact=compact, clear=clear, shed_ns=None)
    if state.phase is Phase.HELD or (state.phase is Phase.TERMINATING and not state.signalled):
        return replace(state, phase=Phase.PROBATION, probation_ns=now_ns)
    return state


def _peaked(state: State, sample: Sampled) -> State:
    """While a recycle settles: how much the agent that came back has held at most."""
    if state.recycle.status is not Status.DELIVERED or sample.agent_peak_bytes <= state.resumed_peak_bytes:
        return state
    return replace(state, resumed_peak_bytes=sample.agent_peak_bytes)


def _sampled(state: State, memory: MemoryState | None, now_ns: int, policy: Policy, agent_bytes: int) -> Step:
    if state.phase is Phase.TERMINATING:
        return ladder_brake.while_terminating(state, memory, now_ns, policy)
    if memory is None or memory.max_bytes <= 0:
        return state, ()
    if state.phase is Phase.HELD:
        return ladder_brake.while_held(state, memory, now_ns, policy)
    ratio = memory.unreclaimable_ratio
    state = _engaged(state, ratio, now_ns, policy)
    on_probation = state.phase is Phase.PROBATION
    over = on_probation and since(state.probation_ns, now_ns) >= policy.brake.probation_ns
    if over and ratio < policy.brake.release_ratio:
        return replace(state, phase=Phase.WATCHING, held=None, probation_ns=None), (UsualLevels(),)
    if not state.in_episode:
        return state, ()
    statuses = {state.compact.status, state.recycle.status, state.clear.status}
    waiting = statuses & {Status.RUNNING, Status.RESTARTING, Status.DELIVERED}
    if ratio >= policy.compact.release_ratio or waiting or on_probation:
        state = replace(state, calm_since_ns=None)
    elif state.calm_since_ns is None:
        state = replace(state, calm_since_ns=now_ns)
    elif since(state.calm_since_ns, now_ns) >= _CALM_NS:
        return _episode_over(state), ()
    return ladder_climb.climb(state, memory, now_ns, policy, agent_bytes)


def _engaged(state: State, ratio: float, now_ns: int, policy: Policy) -> State:
    compact, recycle, clear, end = policy.compact, policy.recycle, policy.clear, policy.terminate
    engage_ratio = compact.engage_ratio
    if since(state.stalled_ns, now_ns) <= _STALL_COUNTS_NS:
        engage_ratio = min(engage_ratio, policy.signals.stalled_compact_ratio)
    release_ratio = min(compact.release_ratio, engage_ratio)
    levels = (
        tiers.engaged_since(state.compact.engaged_ns, ratio, engage_ratio, release_ratio, now_ns),
        tiers.engaged_since(state.recycle.engaged_ns, ratio, recycle.engage_ratio, recycle.release_ratio, now_ns),
        tiers.engaged_since(state.clear.engaged_ns, ratio, clear.engage_ratio, clear.release_ratio, now_ns),
        tiers.engaged_since(state.terminate_engaged_ns, ratio, end.engage_ratio, end.release_ratio, now_ns),
    )
    return replace(
        state,
        in_episode=state.in_episode or levels[0] is not None,
        compact=_since(tiers.advanced(state.compact, compact, now_ns), levels[0]),
        recycle=_since(tiers.advanced(state.recycle, recycle, now_ns, end.grace_ns), levels[1]),
        clear=_since(tiers.advanced(state.clear, clear, now_ns), levels[2]),
        terminate_engaged_ns=levels[3],
    )


def _since(tier: TierState, engaged_ns: int | None) -> TierState:
    """Mostly as it was: a copy each time would be half of what a calm sample takes."""
    return tier if tier.engaged_ns == engaged_ns else replace(tier, engaged_ns=engaged_ns)


def _episode_over(state: State) -> State:
    return replace(
        state,
        in_episode=False,
        calm_since_ns=None,
        compact=tiers.over(state.compact),
        recycle=tiers.over(state.recycle),
        clear=tiers.over(state.clear),
    )
