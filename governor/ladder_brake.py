"""What follows a brake: the tool is shed, the memcg runs on for a probation, or the agent is ended. Pure."""

from __future__ import annotations

from dataclasses import replace

from governor import tiers
from governor.cgroup import MemoryState
from governor.ladder_state import Step, agent_ended, disturbed, is_vetoed, percent, why_forbidden
from governor.model import (
    Archive,
    Braked,
    Growth,
    Kill,
    NothingLeft,
    Phase,
    Prolong,
    Shed,
    Shedded,
    Squeeze,
    State,
    Status,
    Terminate,
    Thaw,
    UsualLevels,
    Warn,
)
from governor.policy import MINUTE, MS, SECOND, Policy
from governor.record import PPM
from governor.tiers import since

_SHED_SHOWS_NS = SECOND  # by then the memory of a killed tree is given back
_SHEDS_NS = 3 * SECOND  # the last one of a hold begins before that
_OWN_SHARE = 4  # a burst is a tool's if the agent's own growth is at most a quarter of it
_HIGHEST_RATIO = 0.99  # a brake is never set above
_TREND_NS = 250 * MS  # what a trend is of at least: charge.bpf.c's and the polling's
_SAME_LIMIT = 0.01  # without one, what the machine has left is read twice
_REACTION_NS = 10 * MS  # at its speed of this moment it must not get to the last level so soon
_HANDLER_RATIO = 0.015  # of max, below the last level: what an agent's SIGTERM handler is left with


def braked(state: State, event: Braked, now_ns: int, policy: Policy) -> Step:
    """Archive, and shed where it is clear whom; who was told to end, and is braked again, is killed."""
    if state.phase is Phase.TERMINATING:
        return _kill(state, f"again at {percent(event.state)} of max before the agent had ended")
    again = state.phase is Phase.PROBATION and _is_late(state.held, policy)
    # A loan that ended before its archive did decided nothing: then the second brake is the last.
    room = _has_room(event, policy, again) and (not again or state.archived)
    forbidden = why_forbidden(state, now_ns, policy)
    memory = event.state
    state = replace(
        disturbed(state),
        phase=Phase.HELD,
        in_episode=True,
        held=event,
        held_ns=now_ns,
        archived=False,
        shed_ns=None,
        must_terminate=again and (not room or bool(forbidden)),
        compact=tiers.queued(tiers.disturbed(state.compact), policy.compact, memory, now_ns),
    )
    where = f"braked at {percent(memory)} of max" + (", again" if again else "")
    if room and not again:
        return state, (Archive(where),)
    if (shed := _shed(event, policy)) and not is_vetoed(state, now_ns):
        return _shedding(state, now_ns), (Archive(where), shed)
    if forbidden or room:
        return state, (Archive(where),)
    hold = Prolong(policy.archive.deadline_ns + policy.archive.deadline_ns // 2)
    return state, (Archive(where), hold, Warn("terminate", 0, where))


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


def _by_now(held: Braked, memory: MemoryState, policy: Policy) -> Braked:
    """As it is by now: not every growth stops where its process is frozen, though what was under way is no matter.

    And khugepaged charges 2 MiB before it frees what they replace: given back, that was no growth.
    """
    before = held.state
    rose = memory.unreclaimable_ratio >= before.unreclaimable_ratio
    if rose and memory.unreclaimable_ratio < policy.brake.engage_ratio:
        return held
    fell_bytes = before.unreclaimable_bytes - memory.unreclaimable_bytes
    other_limit = abs(memory.max_bytes - before.max_bytes) > _SAME_LIMIT * before.max_bytes
    held = replace(held, state=memory)
    if fell_bytes <= 0 or other_limit or held.trend_bytes is None:
        return held
    if fell_bytes * SECOND < held.trend_bytes * _TREND_NS:
        return held
    return replace(held, trend_bytes=0, fill_rate_bytes=0)


def _shed(held: Braked, policy: Policy) -> Shed | None:
    """The tree to shed: it grew enough to matter, and the agent's own share did not.

    Since the last brake, or where that does not say it, since before the first: in between little could grow.
    """
    for growth in (held.growth, held.since_first):
        if growth and growth.culprit_pid and policy.shed.enabled:
            by_tools_bytes = growth.others_grown_bytes  # of eight that burst together, one is shed at a time
            is_enough = growth.grown_bytes and by_tools_bytes >= policy.shed.grown_ratio * held.state.max_bytes
            if is_enough and growth.agent_grown_bytes * _OWN_SHARE <= by_tools_bytes:
                return _of(growth)
    return None


def _of(growth: Growth) -> Shed:
    name, pid, ticks = growth.culprit_comm, growth.culprit_pid, growth.culprit_start_ticks
    reason = f"{name} (process {pid}) grew by {growth.grown_bytes >> 20} MiB, the agent did not"
    return Shed(pid, ticks, growth.members, reason, growth.grown_bytes, growth.window_ns)


def _shedding(state: State, now_ns: int | None) -> State:
    """From `now_ns` on; until it is known how those who are left had grown, nobody else is shed."""
    assert state.held
    return replace(state, shed_ns=now_ns, held=replace(state.held, growth=None, since_first=None))


def shedded(state: State, event: Shedded, now_ns: int) -> State:
    """What is left may grow as well; where nobody was killed, the next look shows what follows."""
    assert state.held
    shed_ns = state.shed_ns if event.killed else now_ns - _SHED_SHOWS_NS
    return replace(state, shed_ns=shed_ns, held=replace(state.held, since_first=event.left))


def _shed_another(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    """One was not enough: the next, if there is one and it is not held too long, else what follows a brake."""
    assert state.held
    is_in_time = since(state.held_ns, now_ns) < _SHEDS_NS and not is_vetoed(state, now_ns)
    if is_in_time and (shed := _shed(state.held, policy)):
        return _shedding(state, now_ns), (Prolong(2 * _SHED_SHOWS_NS), shed)
    state = replace(_shedding(state, None), must_terminate=True)
    return decide(state, memory, now_ns, policy) if state.archived else (state, ())


def while_held(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    """A shed shows its effect, or nobody answers any more."""
    if state.shed_ns is not None:
        waited = since(state.shed_ns, now_ns) >= _SHED_SHOWS_NS
        wanted_ratio = policy.brake.engage_ratio if waited else policy.brake.release_ratio
        if memory.unreclaimable_ratio < wanted_ratio:
            return _probation(state, memory, now_ns, policy, "the tool that burst is gone")
        if not waited:
            return state, ()
        return _shed_another(state, memory, now_ns, policy)
    if not state.archived and since(state.held_ns, now_ns) >= 2 * policy.archive.deadline_ns:
        return decide(replace(state, archived=True), memory, now_ns, policy)
    return state, ()


def still_growing(state: State, policy: Policy) -> Step:
    """What no freeze stops fills the rest in a moment; by a lower memory.high it waits half a second for 256 KiB."""
    state = replace(state, must_terminate=True)
    return state, ((Squeeze(high),) if (high := _under_its_usage(state, policy)) else ())


def _under_its_usage(state: State, policy: Policy) -> int | None:
    assert state.held
    return int(policy.terminate.throttle_ratio * state.held.state.usage_bytes) if policy.brake.throttle else None


def decide(state: State, fresh: MemoryState | None, now_ns: int, policy: Policy) -> Step:
    """Archived and held: let it run on, or end it."""
    held = state.held
    assert held
    memory = fresh or held.state
    fell = memory.unreclaimable_ratio < held.state.unreclaimable_ratio
    recovered = fell and memory.unreclaimable_ratio < policy.brake.release_ratio
    room = _has_room(_by_now(held, memory, policy), policy, again=state.must_terminate)
    # Where nobody is held, memory falls and rises by itself.
    if recovered or (room and (not state.must_terminate or (fell and policy.brakes))):
        return _probation(state, memory, now_ns, policy, "archived, and there is room")
    if not is_vetoed(state, now_ns) and (shed := _shed(held, policy)):
        return _shedding(state, now_ns), (shed,)
    why = "it did not end by itself" if state.must_terminate else "no room to let it run on"
    if forbidden := why_forbidden(state, now_ns, policy):
        state, thaw = _probation(state, memory, now_ns, policy, forbidden)
        if since(state.told_ns, now_ns) < MINUTE:
            return state, thaw
        told = NothingLeft(f"{why}, at {percent(memory)} of max; {forbidden}")
        return replace(state, told_ns=now_ns), (*thaw, told)
    state = replace(state, phase=Phase.TERMINATING, terminated_ns=now_ns, signalled=False, killed=False)
    return state, (Terminate(f"{why}; at {percent(memory)} of max; compact: {state.compact.status.value}"),)


def _probation(state: State, memory: MemoryState, now_ns: int, policy: Policy, reason: str) -> Step:
    ratio, last_ratio = memory.unreclaimable_ratio, policy.terminate.last_ratio
    brake_ratio = policy.brake.engage_ratio
    if ratio >= min(policy.brake.probation_below_ratio, brake_ratio):
        brake_ratio = max(brake_ratio, min(_HIGHEST_RATIO, ratio + (max(last_ratio, ratio + 0.01) - ratio) / 3))
    queued = state.compact.status is Status.QUEUED  # a throttled agent could not compact
    high_bytes = None if queued or not policy.brake.throttle else int(brake_ratio * memory.max_bytes)
    # Where nothing may follow, a brake at every step would only be noise: once more, just before max.
    brake_at = _HIGHEST_RATIO if why_forbidden(state, now_ns, policy) and state.must_terminate else brake_ratio
    thaw = Thaw(int(brake_at * PPM), high_bytes, False, f"probation: {reason}")
    return running(state, now_ns), (thaw,)


def running(state: State, now_ns: int) -> State:
    """It runs again: deadlines stood still while it was frozen."""
    if state.held and state.held.frozen and (span_ns := since(state.held_ns, now_ns)) < tiers.FOREVER_NS:
        state = replace(
            state,
            compact=tiers.shifted(state.compact, span_ns, now_ns),
            recycle=tiers.shifted(state.recycle, span_ns, now_ns),
            clear=tiers.shifted(state.clear, span_ns, now_ns),
        )
    return replace(state, phase=Phase.PROBATION, probation_ns=now_ns, shed_ns=None)


def signalled(state: State, fresh: MemoryState | None, policy: Policy) -> Step:
    """SIGTERM was sent: let its handler run, if there is room for that."""
    held = state.held
    assert held
    if (fresh or held.state).unreclaimable_ratio >= policy.terminate.last_ratio:
        return _kill(state, "no room for the agent to end by itself")
    if not held.frozen:
        return state, ()
    last_ppm = int(policy.terminate.last_ratio * PPM)
    return state, (Thaw(last_ppm, _under_its_usage(state, policy), True, "so that it can end by itself"),)


def _kill(state: State, reason: str) -> Step:
    return (state, ()) if state.killed else (replace(state, killed=True), (Kill(reason),))


def while_terminating(state: State, memory: MemoryState | None, now_ns: int, policy: Policy) -> Step:
    """A sample of an agent that was told to end: its grace may be over, or its room."""
    age_ns = since(state.terminated_ns, now_ns)
    frozen = state.held is not None and state.held.frozen
    if state.killed and age_ns >= 2 * policy.terminate.grace_ns:
        return agent_ended(state), (UsualLevels(),)
    if age_ns >= policy.terminate.grace_ns:
        return _kill(state, f"the agent had not ended {policy.terminate.grace_ns / SECOND:g} s after SIGTERM")
    if memory and not frozen and memory.unreclaimable_ratio >= policy.terminate.last_ratio:
        return _kill(state, f"at {percent(memory)} of max before the agent had ended")
    return state, ()
