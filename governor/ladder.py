"""Which remedy comes next. Everything that decides stands here and in `tiers.py`; nothing here acts or reads a clock.

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
from functools import partial

from governor import tiers
from governor.cgroup import MemoryState
from governor.model import (
    UNDER_WAY,
    AgentEnded,
    Answered,
    Archive,
    Archived,
    Braked,
    Deliver,
    Event,
    Growth,
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
from governor.policy import MINUTE, MS, SECOND, Policy
from governor.record import PPM
from governor.tiers import since

Step = tuple[State, tuple[Instruction, ...]]

ACTIONS = (Deliver, Restart, HoldNow, Thaw, Shed, Terminate, Kill)
_ASKED = (Status.RUNNING, Status.RESTARTING, Status.DEFERRED, Status.DELIVERED)  # and its effect is not known yet
_CALM_NS = 10 * SECOND  # below the release level for so long ends an episode
_STALL_COUNTS_NS = 2 * SECOND
_SHED_SHOWS_NS = SECOND  # by then the memory of a killed tree is given back
_OWN_SHARE = 4  # a burst is a tool's if the agent's own growth is at most a quarter of it
_HIGHEST_RATIO = 0.99  # a brake is never set above
_REACTION_NS = 10 * MS  # at its speed of this moment it must not get to the last level so soon
_HANDLER_RATIO = 0.015  # of max, below the last level: what an agent's SIGTERM handler is left with


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
    Transition(_H, Shedded, "nothing was there to be killed, archived", _T, (Terminate,)),
    Transition(_H, Shedded, "as above, and policy or a veto forbids it", _P, (Thaw, NothingLeft)),
    Transition(_H, Sampled, "the tool's memory came back", _P, (Thaw,)),
    Transition(_H, Sampled, "no archive came, and the growth is a tool's", _H, (Shed,)),
    Transition(_H, Sampled, "it did not come back, or no archive came", _T, (Terminate,)),
    Transition(_H, Sampled, "as above, and policy or a veto forbids it", _P, (Thaw, NothingLeft)),
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
        case Braked() if state.phase is Phase.TERMINATING:
            return _kill(state, f"again at {_percent(event.state)} of max before the agent had ended")
        case Braked():
            return _braked(state, event, now_ns, policy)
        case StillGrowing() if state.phase is Phase.HELD and state.shed_ns is None:
            return replace(state, must_terminate=True), ()
        case Archived() if state.phase is Phase.HELD:
            state = replace(state, archived=True)
            return (state, ()) if state.shed_ns is not None else _decide(state, event.state, now_ns, policy)
        case Shedded(killed=0) if state.phase is Phase.HELD:
            state = replace(state, shed_ns=None, must_terminate=True)
            return _decide(state, None, now_ns, policy) if state.archived else (state, ())
        case Thawed() if state.phase is Phase.HELD:
            return _running(state, now_ns), ()
        case Signalled(state=memory) if state.phase is Phase.TERMINATING:
            return _signalled(replace(state, signalled=True), memory, policy)
        case Answered(tier=Tier.COMPACT, status=status, state=memory):
            return replace(state, compact=tiers.answered(state.compact, status, memory, now_ns)), ()
        case Answered(tier=Tier.RECYCLE):
            return _recycled(state, event, now_ns), ()
        case Answered(tier=Tier.CLEAR, status=status, state=memory):
            return replace(state, clear=tiers.answered(state.clear, status, memory, now_ns)), ()
        case Ready() if state.recycle.status is Status.RUNNING:
            return _ready(state, event, now_ns, policy)
        case Reachable(tier=Tier.COMPACT, reachable=reachable):
            return replace(state, compact=replace(state.compact, reachable=reachable)), ()
        case Reachable(tier=Tier.RECYCLE, reachable=reachable):
            return replace(state, recycle=replace(state.recycle, reachable=reachable)), ()
        case Reachable(tier=Tier.CLEAR, reachable=reachable):
            return replace(state, clear=replace(state.clear, reachable=reachable)), ()
        case AgentEnded():
            return _agent_ended(state), (UsualLevels(),)
        case Vetoed(for_ns=for_ns):
            return replace(state, veto_from_ns=now_ns if for_ns else None, veto_for_ns=for_ns), ()
    return state, ()


def rule(before: Phase, event: Event, after: Phase, instructions: tuple[Instruction, ...]) -> str:
    """The row of the table that a step was; empty for one that only remembers something."""
    row = (before, type(event), after, tuple(type(each) for each in instructions))
    return next((t.when or t.event.__name__ for t in TRANSITIONS if (t.phase, t.event, t.next, t.does) == row), "")


def resumed(state: State, same_agent: bool, now_ns: int) -> State:
    """What an earlier governor left, taken up again: it may have died in the middle of anything.

    What was held is on probation (whoever survived has thawed it). A delivery that was under way may have reached the
    agent: it counts as delivered, so that it is not made twice; one that was only queued or deferred has failed, and
    so has a recycle, unless its agent is gone: then it goes on. The grace of an agent that was told to end goes on if
    it is still the same; if it was not told yet, that is decided anew.
    """
    state = replace(state, veto_from_ns=None, veto_for_ns=0)  # what still holds is heard again
    recycle = replace(state.recycle, reachable=False)
    if same_agent or recycle.status is not Status.RESTARTING:
        recycle = _lost(recycle)
    state = replace(state, recycle=recycle)
    if state.phase is Phase.TERMINATING and not same_agent:
        return _agent_ended(state)
    state = _disturbed(state)
    unreachable = [replace(tier, reachable=False) for tier in (state.compact, state.clear)]  # nobody is there yet
    compact, clear = (_lost(tiers.interrupted(tier, now_ns)) for tier in unreachable)
    state = replace(state, compact=compact, clear=clear, shed_ns=None)
    if state.phase is Phase.HELD or (state.phase is Phase.TERMINATING and not state.signalled):
        return replace(state, phase=Phase.PROBATION, probation_ns=now_ns)
    return state


# The brake


def _braked(state: State, event: Braked, now_ns: int, policy: Policy) -> Step:
    if state.phase is Phase.PROBATION and state.held:
        event = replace(event, growth=_together(state.held.growth, event.growth))
    again = state.phase is Phase.PROBATION and _is_late(state.held, policy)
    # A loan that ended before its archive did decided nothing: then the second brake is the last.
    room = _has_room(event, policy, again) and (not again or state.archived)
    forbidden = _forbidden(state, now_ns, policy)
    memory = event.state
    state = replace(
        _disturbed(state),
        phase=Phase.HELD,
        in_episode=True,
        held=event,
        held_ns=now_ns,
        archived=False,
        shed_ns=None,
        shed_tried=False,
        must_terminate=again and (not room or bool(forbidden)),
        compact=tiers.queued(tiers.disturbed(state.compact), policy.compact, memory, now_ns),
    )
    where = f"braked at {_percent(memory)} of max" + (", again" if again else "")
    if room and not again:
        return state, (Archive(where),)
    if (shed := _shed(event, policy)) and not _vetoed(state, now_ns):
        return replace(state, shed_ns=now_ns, shed_tried=True), (Archive(where), shed)
    if forbidden or room:
        return state, (Archive(where),)
    hold = Prolong(policy.archive.deadline_ns + policy.archive.deadline_ns // 2)
    return state, (Archive(where), hold, Warn("terminate", 0, where))


def _together(before: Growth | None, now: Growth | None) -> Growth | None:
    """Growth up to the last brake and since: between two brakes a frozen or throttled tool grows little."""
    if before is None or now is None or not before.culprit_pid:
        return now
    culprit = (now.culprit_pid, now.culprit_start_ticks)
    if now.culprit_pid and culprit != (before.culprit_pid, before.culprit_start_ticks):
        return now
    return replace(
        now if now.culprit_pid else before,
        grown_bytes=before.grown_bytes + (now.grown_bytes if now.culprit_pid else 0),
        agent_grown_bytes=before.agent_grown_bytes + now.agent_grown_bytes,
        others_grown_bytes=before.others_grown_bytes + now.others_grown_bytes,
        window_ns=before.window_ns + now.window_ns,
    )


def _is_late(held: Braked | None, policy: Policy) -> bool:
    """Whether a brake came because memory was full, not because it filled fast."""
    return held is not None and held.state.unreclaimable_ratio >= policy.brake.probation_below_ratio


def _has_room(held: Braked, policy: Policy, again: bool) -> bool:
    """Whether the memcg may run on for a while: it is not full yet, or nears the last level slowly enough.

    `again`: it ran on before, so this may be the last chance for the agent's handler.
    """
    memory, brake = held.state, policy.brake
    if memory.unreclaimable_ratio < brake.probation_below_ratio:
        return True
    if memory.unreclaimable_ratio >= policy.terminate.last_ratio:
        return False
    if held.trend_bytes is None:  # seen for the first time, as when governor starts beside a full agent
        return memory.unreclaimable_ratio < brake.unknown_rate_ratio
    last_ratio = policy.terminate.last_ratio - (_HANDLER_RATIO if again else 0)
    needed_ns = max(brake.probation_room_ns * held.trend_bytes, _REACTION_NS * (held.fill_rate_bytes or 0))
    return (last_ratio * memory.max_bytes - memory.unreclaimable_bytes) * SECOND >= max(1, needed_ns)


def _shed(held: Braked, policy: Policy) -> Shed | None:
    """The tree to shed: it grew enough to matter, and the agent's own share did not."""
    growth = held.growth
    if growth is None or not growth.culprit_pid or not policy.shed.enabled:
        return None
    by_tools_bytes = growth.others_grown_bytes  # of eight that burst together, one is shed at a time
    enough = by_tools_bytes >= policy.shed.grown_ratio * held.state.max_bytes
    if not enough or not growth.grown_bytes or growth.agent_grown_bytes * _OWN_SHARE > by_tools_bytes:
        return None
    grown_mib = growth.grown_bytes >> 20
    reason = f"{growth.culprit_comm} (process {growth.culprit_pid}) grew by {grown_mib} MiB, the agent did not"
    return Shed(growth.culprit_pid, growth.culprit_start_ticks, growth.members, reason)


def _decide(state: State, fresh: MemoryState | None, now_ns: int, policy: Policy) -> Step:
    """Archived and held: let it run on, or end it."""
    held = state.held
    assert held
    memory = fresh or held.state
    recovered = memory.unreclaimable_ratio < min(policy.brake.release_ratio, held.state.unreclaimable_ratio)
    if recovered or not (state.must_terminate or not _has_room(held, policy, again=False)):
        return _probation(state, memory, now_ns, policy, "archived, and there is room")
    if not state.shed_tried and not _vetoed(state, now_ns) and (shed := _shed(held, policy)):
        return replace(state, shed_ns=now_ns, shed_tried=True), (shed,)
    why = "it did not end by itself" if state.must_terminate else "no room to let it run on"
    if forbidden := _forbidden(state, now_ns, policy):
        state, thaw = _probation(state, memory, now_ns, policy, forbidden)
        if since(state.told_ns, now_ns) < MINUTE:
            return state, thaw
        told = NothingLeft(f"{why}, at {_percent(memory)} of max; {forbidden}")
        return replace(state, told_ns=now_ns), (*thaw, told)
    state = replace(state, phase=Phase.TERMINATING, terminated_ns=now_ns, signalled=False, killed=False)
    return state, (Terminate(f"{why}; at {_percent(memory)} of max; compact: {state.compact.status.value}"),)


def _probation(state: State, memory: MemoryState, now_ns: int, policy: Policy, reason: str) -> Step:
    ratio, last_ratio = memory.unreclaimable_ratio, policy.terminate.last_ratio
    brake_ratio = policy.brake.engage_ratio
    if ratio >= min(policy.brake.probation_below_ratio, brake_ratio):
        brake_ratio = max(brake_ratio, min(_HIGHEST_RATIO, ratio + (max(last_ratio, ratio + 0.01) - ratio) / 3))
    queued = state.compact.status is Status.QUEUED  # a throttled agent could not compact
    high_bytes = None if queued or not policy.brake.throttle else int(brake_ratio * memory.max_bytes)
    # Where nothing may follow, a brake at every step would only be noise: once more, just before max.
    brake_at = _HIGHEST_RATIO if _forbidden(state, now_ns, policy) and state.must_terminate else brake_ratio
    thaw = Thaw(int(brake_at * PPM), high_bytes, False, f"probation: {reason}")
    return _running(state, now_ns), (thaw,)


def _running(state: State, now_ns: int) -> State:
    """It runs again: deadlines stood still while it was frozen."""
    if state.held and state.held.frozen and (span_ns := since(state.held_ns, now_ns)) < tiers.FOREVER_NS:
        state = replace(
            state,
            compact=tiers.shifted(state.compact, span_ns, now_ns),
            recycle=tiers.shifted(state.recycle, span_ns, now_ns),
            clear=tiers.shifted(state.clear, span_ns, now_ns),
        )
    return replace(state, phase=Phase.PROBATION, probation_ns=now_ns, shed_ns=None)


# The end


def _signalled(state: State, fresh: MemoryState | None, policy: Policy) -> Step:
    held = state.held
    assert held
    if (fresh or held.state).unreclaimable_ratio >= policy.terminate.last_ratio:
        return _kill(state, "no room for the agent to end by itself")
    if not held.frozen:
        return state, ()
    high_bytes = int(policy.terminate.throttle_ratio * held.state.usage_bytes) if policy.brake.throttle else None
    return state, (Thaw(int(policy.terminate.last_ratio * PPM), high_bytes, True, "so that it can end by itself"),)


def _kill(state: State, reason: str) -> Step:
    return (state, ()) if state.killed else (replace(state, killed=True), (Kill(reason),))


def _terminating(state: State, memory: MemoryState | None, now_ns: int, policy: Policy) -> Step:
    age_ns = since(state.terminated_ns, now_ns)
    frozen = state.held is not None and state.held.frozen
    if state.killed and age_ns >= 2 * policy.terminate.grace_ns:
        return _agent_ended(state), (UsualLevels(),)
    if age_ns >= policy.terminate.grace_ns:
        return _kill(state, f"the agent had not ended {policy.terminate.grace_ns / SECOND:g} s after SIGTERM")
    if memory and not frozen and memory.unreclaimable_ratio >= policy.terminate.last_ratio:
        return _kill(state, f"at {_percent(memory)} of max before the agent had ended")
    return state, ()


def _agent_ended(state: State) -> State:
    """Attempts, cooldowns and what was learned outlast the agent; what was under way does not, but for a recycle."""
    state = _disturbed(state)
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
        compact=_lost(state.compact),
        recycle=state.recycle if state.recycle.status is Status.RESTARTING else _lost(state.recycle),
        clear=_lost(state.clear),
    )


def _lost(tier: TierState) -> TierState:
    return replace(tier, status=Status.FAILED) if tier.status in UNDER_WAY else tier


# Samples


def _peaked(state: State, sample: Sampled) -> State:
    """While a recycle settles: how much the agent that came back has held at most."""
    if state.recycle.status is not Status.DELIVERED or sample.agent_peak_bytes <= state.resumed_peak_bytes:
        return state
    return replace(state, resumed_peak_bytes=sample.agent_peak_bytes)


def _sampled(state: State, memory: MemoryState | None, now_ns: int, policy: Policy, agent_bytes: int) -> Step:
    if state.phase is Phase.TERMINATING:
        return _terminating(state, memory, now_ns, policy)
    if memory is None or memory.max_bytes <= 0:
        return state, ()
    if state.phase is Phase.HELD:
        return _held(state, memory, now_ns, policy)
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
    return _climb(state, memory, now_ns, policy, agent_bytes)


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
        compact=replace(tiers.advanced(state.compact, compact, now_ns), engaged_ns=levels[0]),
        recycle=replace(tiers.advanced(state.recycle, recycle, now_ns, end.grace_ns), engaged_ns=levels[1]),
        clear=replace(tiers.advanced(state.clear, clear, now_ns), engaged_ns=levels[2]),
        terminate_engaged_ns=levels[3],
    )


def _episode_over(state: State) -> State:
    return replace(
        state,
        in_episode=False,
        calm_since_ns=None,
        compact=tiers.over(state.compact),
        recycle=tiers.over(state.recycle),
        clear=tiers.over(state.clear),
    )


def _held(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    """A shed shows its effect, or nobody answers any more."""
    if state.shed_ns is not None:
        waited = since(state.shed_ns, now_ns) >= _SHED_SHOWS_NS
        wanted_ratio = policy.brake.engage_ratio if waited else policy.brake.release_ratio
        if memory.unreclaimable_ratio < wanted_ratio:
            return _probation(state, memory, now_ns, policy, "the tool that burst is gone")
        if not waited:
            return state, ()
        state = replace(state, shed_ns=None, must_terminate=True)
        return _decide(state, memory, now_ns, policy) if state.archived else (state, ())
    if not state.archived and since(state.held_ns, now_ns) >= 2 * policy.archive.deadline_ns:
        return _decide(replace(state, archived=True), memory, now_ns, policy)
    return state, ()


def _climb(state: State, memory: MemoryState, now_ns: int, policy: Policy, agent_bytes: int) -> Step:
    """The deliberate tiers: one action, the strongest that is due; recycle before clear, as it keeps more."""
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
        just_told = bool(_forbidden(state, now_ns, policy)) and since(state.told_ns, now_ns) < MINUTE
        if ratio < (policy.terminate.last_ratio if on_probation else policy.brake.engage_ratio) or just_told:
            return state, ()
        state = replace(state, terminate_engaged_ns=now_ns)  # should this be missed as well, in a dwell again
        return state, (HoldNow(f"{_percent(memory)} of max, and the kernel's crossing was not heard"),)
    if ratio < policy.terminate.engage_ratio:
        return state, ()
    if forbidden := _forbidden(state, now_ns, policy):
        if since(state.told_ns, now_ns) < MINUTE:
            return state, ()
        return replace(state, told_ns=now_ns), (NothingLeft(f"at {_percent(memory)} of max; {forbidden}"),)
    waits = not tiers.finished(state.compact) and ratio < policy.terminate.last_ratio
    if waits or not tiers.attempted(state.compact):
        return state, ()
    if policy.dry_run and since(state.terminated_ns, now_ns) < MINUTE:
        return state, ()
    held = Braked(memory, None, False)
    state = replace(
        _disturbed(state), phase=Phase.HELD, held=held, held_ns=now_ns, archived=False, must_terminate=True
    )
    where = f"at {_percent(memory)} of max"
    return state, (Archive(where), Warn("terminate", 0, where))


def _compact(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    ratio, end_ratio = memory.unreclaimable_ratio, policy.terminate.engage_ratio
    due = tiers.is_due(state.compact, policy.compact, ratio, end_ratio, now_ns)
    if not due or _vetoed(state, now_ns) or _is_asked(state.clear) or _is_asked(state.recycle):
        return replace(state, compact=replace(state.compact, warned_ns=None)), ()
    reason = f"{_percent(memory)} of max is in use"
    compact, instructions = tiers.begun(Tier.COMPACT, state.compact, policy.compact, memory, now_ns, reason)
    return replace(state, compact=compact), instructions


def _recycle(state: State, memory: MemoryState, now_ns: int, policy: Policy, agent_bytes: int) -> Step:
    """Find out whether the agent can be restarted: where compact gives nothing, and there is room for it then."""
    recycle, wanted = state.recycle, policy.recycle
    deferred, vetoed = recycle.status is Status.DEFERRED, _vetoed(state, now_ns)
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
            Withheld(Tier.RECYCLE, f"{_percent(memory)} of max is in use; {why_not}"),
        )
    reason = f"{_percent(memory)} of max is in use; compact: {state.compact.status.value}"
    recycle = tiers.running(recycle, memory, now_ns)
    return replace(_disturbed(state), recycle=recycle), (Deliver(Tier.RECYCLE, reason),)


def _ready(state: State, event: Ready, now_ns: int, policy: Policy) -> Step:
    """The agent is idle and archived: restart it if that is still due, after a warning."""
    memory, recycle, wanted = event.state, state.recycle, policy.recycle
    later = replace(recycle, status=Status.DEFERRED, at_ns=now_ns)
    climbs = state.phase in (Phase.WATCHING, Phase.PROBATION) and not _vetoed(state, now_ns)
    if not climbs or memory is None or memory.unreclaimable_ratio < wanted.release_ratio:
        return replace(state, recycle=replace(later, warned_ns=None)), ()
    if tiers.unfit(wanted, state.resumed_peak_bytes, memory, event.agent_bytes, _fits_under(policy)):
        return replace(state, recycle=replace(later, warned_ns=None)), ()  # the next sample says so
    held_mib = event.agent_bytes >> 20
    reason = (
        f"{_percent(memory)} of max is in use, {held_mib} MiB by an idle agent; compact: {state.compact.status.value}"
    )
    if wanted.warning_ns and recycle.warned_ns is None:
        warned = replace(later, warned_ns=now_ns)
        return replace(state, recycle=warned), (Warn("recycle", wanted.warning_ns, reason),)
    at_bytes = max(recycle.at_bytes, memory.unreclaimable_bytes)
    recycle = replace(recycle, status=Status.RESTARTING, tried_ns=now_ns, delivered_ns=now_ns, at_bytes=at_bytes)
    return replace(state, recycle=replace(recycle, warned_ns=None)), (Restart(reason),)


def _recycled(state: State, event: Answered, now_ns: int) -> State:
    """A recycle was deferred, failed, or has brought an agent, whose peak is looked for from now on."""
    recycle = tiers.answered(state.recycle, event.status, event.state, now_ns)
    if recycle is not state.recycle:  # whoever is busy again is to be warned again
        recycle = replace(recycle, warned_ns=None)
    brought = recycle is not state.recycle and recycle.status is Status.DELIVERED
    return replace(state, recycle=recycle, resumed_peak_bytes=0 if brought else state.resumed_peak_bytes)


def _fits_under(policy: Policy) -> float:
    """The share of max that whoever comes back must not reach."""
    brake_ratio = policy.brake.engage_ratio if policy.brake.enabled else 1.0
    return min(brake_ratio, policy.terminate.engage_ratio)


def _is_asked(tier: TierState) -> bool:
    """Whether it was announced, or its effect is not known yet."""
    return tier.warned_ns is not None or tier.status in _ASKED


def _clear(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    compact, clear = state.compact, state.clear
    ratio = memory.unreclaimable_ratio
    recent = since(compact.at_ns, now_ns) <= policy.clear_after_compact_ns
    helped = compact.status is Status.SETTLED and memory.unreclaimable_bytes <= compact.at_bytes
    recycled = _is_asked(state.recycle) or (state.recycle.status is Status.SETTLED and not state.recycle.useless)
    due = tiers.finished(compact) and recent and not helped and tiers.is_due(clear, policy.clear, ratio, 1.0, now_ns)
    if not due or recycled or _vetoed(state, now_ns):
        return replace(state, clear=replace(clear, warned_ns=None)), ()
    reason = f"{_percent(memory)} of max is in use; compact: {compact.status.value}"
    clear, instructions = tiers.begun(Tier.CLEAR, clear, policy.clear, memory, now_ns, reason)
    if any(isinstance(instruction, Deliver) for instruction in instructions):
        compact = tiers.disturbed(compact)
    return replace(state, compact=compact, clear=clear), instructions


def _disturbed(state: State) -> State:
    restarting = state.recycle.status is Status.RESTARTING  # judged when the next agent has settled
    return replace(
        state,
        compact=tiers.disturbed(state.compact),
        recycle=state.recycle if restarting else tiers.disturbed(state.recycle),
        clear=tiers.disturbed(state.clear),
    )


def _vetoed(state: State, now_ns: int) -> bool:
    return since(state.veto_from_ns, now_ns) < state.veto_for_ns


def _forbidden(state: State, now_ns: int, policy: Policy) -> str:
    """Why nothing may be terminated; empty if it may."""
    if _vetoed(state, now_ns):
        return "governor hold forbids more"
    return "" if policy.terminate.enabled else "the policy has no terminate"


def _percent(memory: MemoryState) -> str:
    return f"{100 * memory.unreclaimable_ratio:.1f} %"
