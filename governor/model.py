"""What the ladder hears, remembers and asks for: events, state, instructions. Pure values; no behaviour.

All times are CLOCK_BOOTTIME in nanoseconds; None is never. Times are stamps of what happened, not of what is due: a
clock that jumps then makes something early or late, but nothing waits for ever.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from governor.cgroup import MemoryState


class Phase(Enum):
    """Where the ladder stands."""

    WATCHING = "watching"
    HELD = "held"
    PROBATION = "probation"
    TERMINATING = "terminating"


class Tier(Enum):
    """The steps that ask something of the agent."""

    COMPACT = "compact"
    RECYCLE = "recycle"  # end it while it is idle, compact its stopped session, take that up again
    CLEAR = "clear"


class Status(Enum):
    """What became of a tier in this episode."""

    NONE = "none"
    QUEUED = "queued"  # by a brake: delivered as soon as the target runs again
    RUNNING = "running"
    RESTARTING = "restarting"  # recycle: the agent was asked to end, and is to come back
    DEFERRED = "deferred"  # the agent could not be asked just now: tried again until the deadline
    DELIVERED = "delivered"  # the settle time runs
    SETTLED = "settled"  # its effect has been looked at
    FAILED = "failed"
    EXPIRED = "expired"  # deferred until its deadline
    UNAVAILABLE = "unavailable"  # no way to deliver is known
    USELESS = "useless"  # known to free nothing here
    UNFIT = "unfit"  # recycle: the agent that comes back would not fit, or give nothing back


UNDER_WAY = frozenset({Status.QUEUED, Status.RUNNING, Status.RESTARTING, Status.DEFERRED})


@dataclass(frozen=True, slots=True)
class Growth:
    """Under which process the memory of a memcg grew.

    `culprit_pid` is the root of the tree that grew most; where that has ended, the tree's largest process. It is 0
    when the growth is the agent's own or nobody can be named. `members` are the tree's living processes, by pid and
    start in clock ticks. Where nobody was seen to grow it is the tree that was charged last: a hint, no more.
    """

    culprit_pid: int
    culprit_start_ticks: int
    culprit_comm: str
    grown_bytes: int
    held_bytes: int
    agent_grown_bytes: int
    others_grown_bytes: int  # of all trees together
    window_ns: int  # since the oldest look that was compared with; 0: there is none yet
    known_ratio: float  # share of the processes that the last look reached
    members: tuple[tuple[int, int], ...] = ()


# Events


@dataclass(frozen=True, slots=True)
class Sampled:
    """A look at the memcg, and when it was taken; `state` None: it could not be read.

    `agent_bytes` is what the agent and what descends from it hold of it (anonymous memory), `agent_peak_bytes` the
    most that it has held; 0 is unknown.
    """

    state: MemoryState | None
    at_ns: int
    agent_bytes: int = 0
    agent_peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Stalled:
    """Tasks of the memcg waited for memory (PSI) more than the level."""


@dataclass(frozen=True, slots=True)
class Braked:
    """The memcg is held, and memory.stat confirmed that it had to be."""

    state: MemoryState
    trend_bytes: int | None  # growth per second, over about a third of a second or since the last thaw
    frozen: bool
    growth: Growth | None = None
    fill_rate_bytes: int | None = None  # growth per second, over a few milliseconds
    since_first: Growth | None = None  # of who lives, since before the first of a run of brakes; None: this one


@dataclass(frozen=True, slots=True)
class StillGrowing:
    """The kernel reports a crossing of the brake level or above although the memcg is frozen (one long syscall)."""


@dataclass(frozen=True, slots=True)
class Thawed:
    """The memcg runs again without our asking: the loan was over, or it had been a false alarm."""


@dataclass(frozen=True, slots=True)
class Archived:
    """The archive that was asked for is done, well or badly; with a fresh look, None where there is none."""

    ok: bool
    state: MemoryState | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A delivery ended: DELIVERED, DEFERRED or FAILED; with a fresh look, None where there is none.

    EXPIRED: a recycle that nobody finished, as its agent's new start was interrupted.
    """

    tier: Tier
    status: Status
    state: MemoryState | None = None


@dataclass(frozen=True, slots=True)
class Ready:
    """Recycle: the agent is idle and its session archived; with a fresh look, as `Sampled` has it."""

    state: MemoryState | None = None
    agent_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Reachable:
    """Somebody who can do it has subscribed, or nobody who can is left."""

    tier: Tier
    reachable: bool


@dataclass(frozen=True, slots=True)
class Shedded:
    """The bursting tree was killed, or was not there any more (0); how those who are left had grown."""

    killed: int
    left: Growth | None = None  # since before the first of a run of brakes


@dataclass(frozen=True, slots=True)
class Signalled:
    """SIGTERM is on its way to the agent; with a fresh look, None where there is none."""

    state: MemoryState | None = None


@dataclass(frozen=True, slots=True)
class AgentEnded:
    """The agent's process is gone."""


@dataclass(frozen=True, slots=True)
class Vetoed:
    """A person asked to do nothing but brake for so long; 0 ends it."""

    for_ns: int


Event = (
    Sampled
    | Stalled
    | Braked
    | StillGrowing
    | Thawed
    | Archived
    | Answered
    | Ready
    | Reachable
    | Shedded
    | Signalled
    | AgentEnded
    | Vetoed
)


# Instructions


@dataclass(frozen=True, slots=True)
class Warn:
    """Tell the user what comes, and in how long unless they veto it."""

    what: str
    in_ns: int
    reason: str


@dataclass(frozen=True, slots=True)
class Deliver:
    """Ask the agent to compact or clear, or find out whether it can be recycled; memory.high is lifted first."""

    tier: Tier
    reason: str


@dataclass(frozen=True, slots=True)
class Restart:
    """SIGTERM to the agent, whose session is then compacted and taken up again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Withheld:
    """Say why a tier that is due is not done."""

    tier: Tier
    reason: str


@dataclass(frozen=True, slots=True)
class Settled:
    """The effect of a delivery, as seen after its settle time."""

    tier: Tier
    freed_bytes: int
    useless: bool


@dataclass(frozen=True, slots=True)
class HoldNow:
    """Brake: the kernel's crossing was missed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Archive:
    """Archive the session files."""

    reason: str


@dataclass(frozen=True, slots=True)
class Prolong:
    """Something was decided that needs the memcg frozen for at most so long."""

    for_ns: int


@dataclass(frozen=True, slots=True)
class Squeeze:
    """Throttle what grows although it is frozen: `high_bytes` lies under the usage."""

    high_bytes: int


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
class Shed:
    """SIGKILL the tree that bursts, while it is frozen."""

    culprit_pid: int
    culprit_start_ticks: int
    members: tuple[tuple[int, int], ...]  # of the tree that another process has adopted meanwhile
    reason: str
    grown_bytes: int = 0
    window_ns: int = 0  # in this time; 0: unknown


@dataclass(frozen=True, slots=True)
class Terminate:
    """SIGKILL what bursts beside the agent, SIGTERM to the agent."""

    reason: str


@dataclass(frozen=True, slots=True)
class Kill:
    """SIGKILL everything that is governed."""

    reason: str


@dataclass(frozen=True, slots=True)
class UsualLevels:
    """Undo throttle and raised levels."""


@dataclass(frozen=True, slots=True)
class NothingLeft:
    """Say loudly that nothing more will be done, and why."""

    reason: str


Instruction = (
    Warn
    | Deliver
    | Restart
    | Withheld
    | Settled
    | HoldNow
    | Archive
    | Prolong
    | Squeeze
    | Thaw
    | Shed
    | Terminate
    | Kill
    | UsualLevels
    | NothingLeft
)


# State


@dataclass(frozen=True, slots=True)
class TierState:
    """One tier: this episode's attempt, and what outlasts an episode."""

    status: Status = Status.NONE
    began_ns: int | None = None  # first try: the deadline counts from here
    tried_ns: int | None = None  # last try
    at_ns: int | None = None  # when it came to a status that is not under way
    at_bytes: int = 0  # unreclaimable then
    isolated: bool = True  # nothing else was done since
    useless: bool = False  # SETTLED: it has freed nothing
    engaged_ns: int | None = None  # above the level since; None below the release level
    warned_ns: int | None = None
    reachable: bool = False  # by a subscriber
    delivered_ns: int | None = None
    useless_trials: int = 0  # isolated deliveries in a row that freed nothing
    judged_ns: int | None = None


@dataclass(frozen=True, slots=True)
class State:
    """What the ladder remembers of one target."""

    phase: Phase = Phase.WATCHING
    in_episode: bool = False
    calm_since_ns: int | None = None
    compact: TierState = TierState()
    recycle: TierState = TierState()
    resumed_peak_bytes: int = 0  # the most that the agent held which the last recycle has brought; 0: unknown
    clear: TierState = TierState()
    terminate_engaged_ns: int | None = None
    stalled_ns: int | None = None
    held: Braked | None = None  # the last brake
    held_ns: int | None = None
    archived: bool = False  # since the last brake
    must_terminate: bool = False
    shed_ns: int | None = None
    probation_ns: int | None = None  # its begin
    terminated_ns: int | None = None  # SIGTERM: the grace counts from here
    signalled: bool = False  # SIGTERM was sent
    killed: bool = False
    veto_from_ns: int | None = None
    veto_for_ns: int = 0
    told_ns: int | None = None  # that nothing is left
