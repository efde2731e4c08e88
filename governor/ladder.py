"""Which remedy comes next. Everything that decides stands here, and nothing here acts or reads a clock.

Theory. An event comes in, `step` returns the next state and the instructions to carry out; what becomes of an
instruction comes back as a further event. One destructive instruction a step at most.

    phase        event                                      next         instructions
    WATCHING     sample >= compact level, not in cooldown   WATCHING     compact (an episode begins)
    WATCHING     samples >= brake level, no crossing heard  WATCHING     brake
    WATCHING     braked                                     HELD         archive (compact counts as attempted)
    HELD         archived, room for a probation             PROBATION    thaw under memory.high
    HELD         archived, no room or braked again          TERMINATING  terminate
    HELD         thawed (the loan was over)                 PROBATION
    PROBATION    sample, compact is due                     PROBATION    compact
    PROBATION    samples >= last level, none heard either   PROBATION    brake
    PROBATION    braked                                     HELD         archive (again: the session moved on)
    PROBATION    over, and calm                             WATCHING     usual levels
    TERMINATING  signalled                                  TERMINATING  thaw, brake again at the last level
    TERMINATING  braked at the last level, or grace over    TERMINATING  kill
    any          the agent ended                            WATCHING     usual levels; an episode ends

Compact counts as attempted when it was delivered, failed, or cannot be delivered at all; never silently skipped.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

from governor.cgroup import MemoryState
from governor.policy import Policy
from governor.record import PPM


class Phase(Enum):
    """Where the ladder stands."""

    WATCHING = "watching"
    HELD = "held"
    PROBATION = "probation"
    TERMINATING = "terminating"


class Attempt(Enum):
    """What became of compact in this episode."""

    NONE = "none"
    DUE = "due"
    RUNNING = "running"
    DELIVERED = "delivered"
    FAILED = "failed"
    UNAVAILABLE = "unavailable"


# Events


@dataclass(frozen=True, slots=True)
class Sampled:
    """A fresh look at the memcg."""

    state: MemoryState


@dataclass(frozen=True, slots=True)
class Braked:
    """The memcg is held, and memory.stat confirmed that it had to be."""

    state: MemoryState
    fill_rate_bytes: int | None  # per second
    frozen: bool


@dataclass(frozen=True, slots=True)
class StillGrowing:
    """The kernel reports a crossing of the brake level or above although the memcg is frozen (one long syscall)."""


@dataclass(frozen=True, slots=True)
class Thawed:
    """The memcg runs again without our asking: the loan was over, or it had been a false alarm."""


@dataclass(frozen=True, slots=True)
class Archived:
    """The archive that was asked for is done, well or badly."""

    ok: bool


@dataclass(frozen=True, slots=True)
class Compacted:
    """The compact command ended."""

    ok: bool


@dataclass(frozen=True, slots=True)
class Signalled:
    """SIGTERM is on its way to the agent."""


@dataclass(frozen=True, slots=True)
class AgentEnded:
    """The agent's process is gone."""


Event = Sampled | Braked | StillGrowing | Thawed | Archived | Compacted | Signalled | AgentEnded


# Instructions


@dataclass(frozen=True, slots=True)
class Compact:
    """Deliver the compact command; memory.high is lifted first."""

    reason: str


@dataclass(frozen=True, slots=True)
class Brake:
    """Hold the memcg: the kernel's crossing was missed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Archive:
    """Archive the session files while the memcg is held."""

    reason: str


@dataclass(frozen=True, slots=True)
class Hold:
    """Something was decided that needs the memcg frozen for at most so long."""

    for_ns: int


@dataclass(frozen=True, slots=True)
class Thaw:
    """Let it run; brake again at `brake_ppm`, throttle above `high_bytes` (None: no throttle).

    With `last_word` the agent has its SIGTERM, and `high_bytes` lies under the usage.
    """

    brake_ppm: int
    high_bytes: int | None
    last_word: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGKILL what bursts beside the agent, SIGTERM to the agent."""

    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL everything in the memcg."""

    reason: str


@dataclass(frozen=True, slots=True)
class UsualLevels:
    """Undo throttle and raised levels."""


Instruction = Compact | Brake | Archive | Hold | Thaw | Terminate | Kill | UsualLevels


@dataclass(frozen=True, slots=True)
class State:
    """What the ladder remembers of one memcg; times on the monotonic clock, in nanoseconds."""

    phase: Phase = Phase.WATCHING
    in_episode: bool = False
    compact: Attempt = Attempt.NONE
    compact_ns: int | None = None
    brakes: int = 0  # confirmed ones in this episode
    held: Braked | None = None
    probation_until_ns: int = 0
    must_terminate: bool = False
    killed: bool = False
    grace_until_ns: int = 0
    unheard_since_ns: int | None = None  # over a level without a crossing of the kernel's


Step = tuple[State, tuple[Instruction, ...]]


def step(state: State, event: Event, now_ns: int, policy: Policy) -> Step:
    """The next state and what to do; see the table at the top."""
    match event:
        case AgentEnded():
            return State(compact_ns=state.compact_ns), (UsualLevels(),)
        case Compacted(ok=ok):
            return replace(state, compact=Attempt.DELIVERED if ok else Attempt.FAILED), ()
        case Braked():
            return _braked(state, event, policy)
        case StillGrowing() if state.phase is Phase.HELD:
            return replace(state, must_terminate=True), ()
        case Archived() if state.phase is Phase.HELD:
            return _archived(state, now_ns, policy)
        case Thawed() if state.phase is Phase.HELD:
            return replace(state, phase=Phase.PROBATION, probation_until_ns=now_ns + policy.probation_ns), ()
        case Signalled() if state.phase is Phase.TERMINATING:
            return _signalled(state, now_ns, policy)
        case Sampled(state=memory):
            return _sampled(state, memory, now_ns, policy)
    return state, ()


def _braked(state: State, event: Braked, policy: Policy) -> Step:
    if state.phase is Phase.TERMINATING:
        if state.killed:
            return state, ()
        reason = f"again at {_percent(event.state)} of max before the agent had ended"
        return replace(state, killed=True, held=event), (Kill(reason),)
    again = state.phase is Phase.PROBATION
    state = replace(
        state,
        phase=Phase.HELD,
        in_episode=True,
        brakes=state.brakes + 1,
        held=event,
        compact=_attempted(state.compact, policy),
        must_terminate=again,
    )
    archive = Archive(f"braked at {_percent(event.state)} of max" + (", in probation" if again else ""))
    if again or not _has_room(event, policy):
        return state, (archive, Hold(policy.archive_deadline_ns + policy.archive_deadline_ns // 2))
    return state, (archive,)


def _attempted(compact: Attempt, policy: Policy) -> Attempt:
    if compact is not Attempt.NONE:
        return compact
    return Attempt.DUE if policy.compact_argv else Attempt.UNAVAILABLE


def _archived(state: State, now_ns: int, policy: Policy) -> Step:
    held = state.held
    assert held
    if state.must_terminate or not _has_room(held, policy):
        why = "braked again in probation" if state.brakes > 1 else "no room to let it run on"
        why = "it grows although frozen" if state.must_terminate and state.brakes == 1 else why
        state = replace(state, phase=Phase.TERMINATING, grace_until_ns=now_ns + policy.grace_ns)
        compact = state.compact.value
        return state, (Terminate(f"{why}; at {_percent(held.state)} of max; compact: {compact}"),)
    memory = held.state
    brake_ratio = policy.brake_ratio
    if memory.unreclaimable_ratio >= policy.probation_ratio:
        brake_ratio = memory.unreclaimable_ratio + (policy.last_ratio - memory.unreclaimable_ratio) / 3
    high_bytes = None if state.compact is Attempt.DUE else int(brake_ratio * memory.max_bytes)
    state = replace(state, phase=Phase.PROBATION, probation_until_ns=now_ns + policy.probation_ns)
    return state, (Thaw(int(brake_ratio * PPM), high_bytes, False, "probation: archived, and there is room"),)


def _has_room(held: Braked, policy: Policy) -> bool:
    """Whether the memcg may run on for a while: it is not full yet, or fills slowly enough to be caught again."""
    memory = held.state
    if memory.unreclaimable_ratio < policy.probation_ratio:
        return True
    if memory.unreclaimable_ratio >= policy.last_ratio:
        return False
    if held.fill_rate_bytes is None:  # seen for the first time, as when governor starts beside a full agent
        return memory.unreclaimable_ratio < policy.unknown_rate_ratio
    headroom_bytes = memory.max_bytes - memory.unreclaimable_bytes
    return headroom_bytes * 1_000_000_000 >= policy.probation_room_ns * max(1, held.fill_rate_bytes)


def _signalled(state: State, now_ns: int, policy: Policy) -> Step:
    held = state.held
    assert held
    if not held.frozen or held.state.unreclaimable_ratio >= policy.last_ratio:
        return replace(state, killed=True), (Kill("no room for the agent to end by itself"),)
    state = replace(state, grace_until_ns=now_ns + policy.grace_ns)
    high_bytes = int(policy.throttle_ratio * held.state.usage_bytes)
    return state, (Thaw(int(policy.last_ratio * PPM), high_bytes, True, "so that it can end by itself"),)


def _sampled(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    ratio = memory.unreclaimable_ratio
    calm = ratio < policy.compact_ratio - policy.release_margin_ratio
    if state.phase is Phase.TERMINATING:
        if now_ns >= state.grace_until_ns and not state.killed:
            grace_s = policy.grace_ns // 1_000_000_000
            return replace(state, killed=True), (Kill(f"the agent had not ended {grace_s} s after SIGTERM"),)
        return state, ()
    if state.phase is Phase.HELD:
        return state, ()
    if state.phase is Phase.PROBATION and now_ns >= state.probation_until_ns:
        released = ratio < policy.brake_ratio - policy.release_margin_ratio
        if released:
            return replace(state, phase=Phase.WATCHING, held=None), (UsualLevels(),)
    if state.in_episode and calm and state.phase is Phase.WATCHING:
        return replace(state, in_episode=False, compact=Attempt.NONE, brakes=0), ()
    if ratio >= policy.compact_ratio or state.compact is Attempt.DUE:
        return _climb(state, memory, now_ns, policy)
    return state, ()


def _climb(state: State, memory: MemoryState, now_ns: int, policy: Policy) -> Step:
    cooling = state.compact_ns is not None and now_ns - state.compact_ns < policy.compact_cooldown_ns
    compact = _attempted(state.compact, policy)
    state = replace(state, in_episode=True, compact=compact)
    if compact is Attempt.DUE and not cooling:
        reason = f"{_percent(memory)} of max is in use"
        return replace(state, compact=Attempt.RUNNING, compact_ns=now_ns), (Compact(reason),)
    unheard_ratio = policy.brake_ratio if state.phase is Phase.WATCHING else policy.last_ratio
    if memory.unreclaimable_ratio < unheard_ratio:
        return replace(state, unheard_since_ns=None), ()
    if state.unheard_since_ns is None:
        return replace(state, unheard_since_ns=now_ns), ()
    if now_ns - state.unheard_since_ns >= policy.unheard_dwell_ns:
        return state, (Brake(f"{_percent(memory)} of max, and the kernel's crossing was not heard"),)
    return state, ()


def _percent(memory: MemoryState) -> str:
    return f"{100 * memory.unreclaimable_ratio:.1f} %"
