"""What governor does when: every value it goes by, with the built-in defaults. Pure; reads no file and no clock.

`policy_file.py` reads TOML into these classes: the tables and keys of a file are the fields here, without the unit
at their end. Ratios are shares of max, 0 to 1, of unreclaimable memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from governor.record import PPM, Levels

MS = 1_000_000
SECOND = 1_000_000_000
MINUTE = 60 * SECOND

# Relative to the home of the agent's user: where the agents that we know keep their sessions.
SESSION_GLOBS = (
    "~/.claude/projects/**/*.jsonl",
    "~/.claude/history.jsonl",
    "~/.codex/sessions/**/*.jsonl",
    "~/.gemini/tmp/*/chats/*.json*",
    "~/.local/share/opencode/opencode.db*",
)


class Efficacy(Enum):
    """What is known beforehand of a tier's effect on this agent."""

    UNKNOWN = "unknown"  # learned
    USEFUL = "useful"
    USELESS = "useless"  # never tried: counts as attempted


class Source(Enum):
    """Where crossings come from."""

    AUTO = "auto"
    BPF = "bpf"
    PSI = "psi"
    POLL = "poll"


@dataclass(frozen=True, slots=True)
class Asking:
    """A tier that asks something of the agent: when, how often, and what is made of its effect."""

    engage_ratio: float
    release_ratio: float
    dwell_ns: int = 0  # above engage for so long
    cooldown_ns: int = 240 * SECOND  # from one delivery to the next
    cooldown_waived_ratio: float = 0.85  # from here on the cooldown does not count
    deadline_ns: int = 60 * SECOND  # for a delivery, its retries included; stands still while frozen
    retry_ns: int = 2 * SECOND  # after a deferred delivery (exit status 75: the agent could not be asked just now)
    settle_ns: int = 30 * SECOND  # from a delivery to its verdict
    freed_ratio: float = 0.02  # of max: what has freed less by then was useless
    warning_ns: int = 0  # between telling the user and doing it
    efficacy: Efficacy = Efficacy.UNKNOWN

    @property
    def knows_how(self) -> bool:
        """Whether it can be done without anybody who subscribed, or a profile that knows how."""
        return False


@dataclass(frozen=True, slots=True)
class Delivery(Asking):
    """Compact or clear."""

    exec: tuple[str, ...] = ()  # the command that delivers; empty with no signal either: unavailable
    signal: str = ""  # or the signal that does, by name

    @property
    def knows_how(self) -> bool:
        """A command or a signal."""
        return bool(self.exec or self.signal)


@dataclass(frozen=True, slots=True)
class Recycle(Asking):
    """End the idle agent, compact its stopped session, take that up again."""

    peak_bytes: int = 0  # what the agent that comes back takes at most, until one was seen; 0: as its profile says
    compacting_ns: int = 300 * SECOND  # for the compaction of the stopped session


@dataclass(frozen=True, slots=True)
class Terminate:
    """The last tier: archive, SIGTERM, SIGKILL."""

    enabled: bool = True
    engage_ratio: float = 0.90  # of samples, where no brake comes first
    release_ratio: float = 0.85
    dwell_ns: int = 500 * MS
    last_ratio: float = 0.97  # SIGKILL from here on
    grace_ns: int = 10 * SECOND  # for the agent's SIGTERM handler
    # While a terminated agent saves, memory.high is this share of the usage: 9 % over, each thread sleeps half a
    # second for every 64 pages it charges (calculate_high_delay in the kernel), so a burst leaves the handler time,
    # and a handler that needs a few batches still ends within the grace.
    throttle_ratio: float = 0.92
    sweep: bool = True  # SIGKILL what the agent leaves behind


@dataclass(frozen=True, slots=True)
class Brake:
    """The reflex: freeze first, ask then."""

    enabled: bool = True
    engage_ratio: float = 0.90
    release_ratio: float = 0.85
    early_ratio: float = 0.70  # from here on it brakes if max is within the horizon
    horizon_ns: int = 100 * MS
    # Under this a probation is always worth trying; above it only when SIGKILL's level is probation_room_ns away.
    probation_below_ratio: float = 0.85
    probation_room_ns: int = 250 * MS
    probation_ns: int = 10 * SECOND
    unknown_rate_ratio: float = 0.93  # under this a probation is tried where no rate is known yet
    throttle: bool = True  # memory.high, where nobody else has set it


@dataclass(frozen=True, slots=True)
class Shed:
    """Kill the tool that bursts, spare the agent."""

    enabled: bool = True
    grown_ratio: float = 0.05  # of max: what has grown less is not shed
    tell: bool = True  # type it to the agent, where its profile says that it takes words (type.tell)


@dataclass(frozen=True, slots=True)
class Signals:
    """Where governor looks, and how often."""

    source: Source = Source.AUTO
    interval_ns: int = SECOND  # of samples while all is calm
    raised_interval_ns: int = SECOND  # of samples above the first level
    stale_ns: int = 5 * SECOND  # a sample older than this decides nothing
    stall_engage_ns: int = 100 * MS  # stalled within 200 ms
    stalled_compact_ratio: float = 0.60  # a stall brings compact forward to here


@dataclass(frozen=True, slots=True)
class Archive:
    """What is saved, and how much of it is kept."""

    globs: tuple[str, ...] = SESSION_GLOBS
    exclude: tuple[str, ...] = ()  # beside the credentials that are always left out
    limit_bytes: int = 4 << 30
    deadline_ns: int = 30 * SECOND
    keep_count: int = 20  # per target
    keep_bytes: int = 16 << 30


@dataclass(frozen=True, slots=True)
class Select:
    """Which targets a policy is for: each key that is given must match, by any one of its globs.

    With none given, the daemon takes it for nobody's, but for who may choose it; `governor guard` looks at `cgroup`.
    """

    cgroup: tuple[str, ...] = ()  # globs over the path below /sys/fs/cgroup, such as "kubepods*"; "*" is any
    namespace: tuple[str, ...] = ()  # globs over the pod's namespace
    pod: tuple[str, ...] = ()  # globs over the pod's name
    container: tuple[str, ...] = ()  # globs over the container's name in its pod
    label: tuple[str, ...] = ()  # "key=glob", over the pod's labels
    annotation: tuple[str, ...] = ()  # "key=glob", over the pod's annotations
    selectable: bool = False  # a pod may choose it: annotation governor.dev/policy, or GOVERNOR_POLICY
    opt_out: bool = False  # a pod that it is for may choose "none" in the same way, and is not governed


@dataclass(frozen=True, slots=True)
class Policy:
    """The built-in policy protects a bare command; every value can stand as it is."""

    name: str = "default"
    dry_run: bool = False  # decide and journal, touch nothing
    profile: str = ""  # what kind of agent it is: a profile's name or an absolute path, where no option says it
    compact: Delivery = Delivery(0.70, 0.65)
    recycle: Recycle = Recycle(
        0.75,
        0.70,
        cooldown_ns=600 * SECOND,
        cooldown_waived_ratio=1.0,
        retry_ns=5 * SECOND,
        warning_ns=5 * SECOND,
    )
    clear: Delivery = Delivery(0.85, 0.80, cooldown_waived_ratio=1.0, warning_ns=5 * SECOND)
    clear_after_compact_ns: int = 300 * SECOND  # clear only if compact was attempted within this time
    terminate: Terminate = field(default_factory=Terminate)
    brake: Brake = field(default_factory=Brake)
    shed: Shed = field(default_factory=Shed)
    signals: Signals = field(default_factory=Signals)
    archive: Archive = field(default_factory=Archive)
    select: Select = field(default_factory=Select)

    @property
    def brakes(self) -> bool:
        """Whether anything is ever held."""
        return self.brake.enabled and not self.dry_run


_NEVER_RATIO = 2.0


def levels(policy: Policy) -> Levels:
    """The levels at which reflex is to hear of crossings."""
    brakes = policy.brake.enabled
    last = (policy.brake.engage_ratio, policy.terminate.last_ratio) if brakes else (_NEVER_RATIO, _NEVER_RATIO)
    last_release_ratio = (policy.brake.engage_ratio + policy.terminate.last_ratio) / 2
    return Levels(
        engage_ppm=_ppm(policy.compact.engage_ratio, policy.clear.engage_ratio, *last),
        release_ppm=_ppm(
            policy.compact.release_ratio,
            policy.clear.release_ratio,
            policy.brake.release_ratio,
            last_release_ratio,
        ),
        horizon_ns=policy.brake.horizon_ns if brakes else 0,
        horizon_floor_ppm=round(policy.brake.early_ratio * PPM),
        stall_engage_ns=policy.signals.stall_engage_ns,
        holds=not policy.dry_run,
    )


def _ppm(first: float, second: float, third: float, fourth: float) -> tuple[int, int, int, int]:
    return round(first * PPM), round(second * PPM), round(third * PPM), round(fourth * PPM)
