"""How one governed memcg stands at one moment: what `governor status` shows and `/metrics` exports. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from governor import model
from governor.cgroup import MemoryState
from governor.codec import plain
from governor.container import Container
from governor.journal import printable
from governor.record import LEVEL_NAMES, PPM, Levels

_MS = 1_000_000
_TEXT_LIMIT = 400  # characters of any one text


@dataclass(frozen=True, slots=True)
class Decided:
    """The last thing that the ladder asked for, and why; on the boottime clock."""

    what: str
    reason: str
    at_ns: int


@dataclass(frozen=True, slots=True)
class Standing:
    """One target; read from what it remembers of its last sample: no file is opened for it."""

    cgroup: str
    cgroup_id: int
    container: Container | None  # None: governed by its path
    policy: str
    dry_run: bool
    agent_pid: int  # 0: not found
    source: str  # bpf, psi or poll; "": not known yet
    brake: str  # how it can be held
    memory: MemoryState | None  # of the memcg whose limit counts; None: could not be read
    fill_rate_bytes: int | None  # per second, between the last two samples
    level: int  # the last that was heard of, as in record.LEVEL_NAMES
    state: model.State
    frozen_for_ns: int | None = None  # None: it is not held
    decided: Decided | None = None
    levels: Levels | None = None  # of its policy
    freed_bytes: Mapping[str, int] = field(default_factory=dict)  # by tier, since this governor governs it
    inside_guard_pid: int = 0  # of the guard in the container that delivers for this one; 0: there is none
    led_from_outside: bool = False  # the same from its side: somebody outside brakes, archives and terminates

    @property
    def names(self) -> tuple[str, str, str]:
        """Namespace, pod and container: escaped, and never all empty."""
        return names_of(self.container, self.cgroup)


def names_of(known: Container | None, cgroup: str) -> tuple[str, str, str]:
    """Namespace, pod and container: escaped, and never all empty."""
    if known is None:
        return ("", "", shown(cgroup.rsplit("/", 1)[-1]))
    return shown(known.namespace), shown(known.pod or known.pod_uid), shown(known.name or known.container_id[:12])


def shown(text: str) -> str:
    """A text from outside, escaped, in a bounded length: 253 is the longest name that Kubernetes allows a pod."""
    return printable(text[:253])[:253]


def as_json(standing: Standing, boottime_ns: int) -> dict[str, object]:
    """The fields of a line of type "target"; texts from outside are escaped."""
    memory, state, decided = standing.memory, standing.state, standing.decided
    namespace, pod, container = standing.names
    return {
        "cgroup": printable(standing.cgroup)[: 4 * _TEXT_LIMIT],
        "cgroup_id": standing.cgroup_id,
        "namespace": namespace,
        "pod": pod,
        "container": container,
        "container_id": shown(standing.container.container_id) if standing.container else "",
        "policy": shown(standing.policy),
        "dry_run": standing.dry_run,
        "agent_pid": standing.agent_pid,
        "source": standing.source,
        "brake": standing.brake,
        "memory": memory
        and {
            **memory._asdict(),
            "unreclaimable_bytes": memory.unreclaimable_bytes,
            "unreclaimable_ratio": round(memory.unreclaimable_ratio, 4),
        },
        "fill_rate_bytes": standing.fill_rate_bytes,
        "level": LEVEL_NAMES[standing.level],
        "phase": state.phase.value,
        "in_episode": state.in_episode,
        "frozen_for_ms": None if standing.frozen_for_ns is None else standing.frozen_for_ns // _MS,
        "tiers": {tier.value: plain(getattr(state, tier.value).status) for tier in model.Tier},
        "decided": decided
        and {
            "what": decided.what,
            "reason": printable(decided.reason)[:_TEXT_LIMIT],
            "ago_s": max(0, boottime_ns - decided.at_ns) // 1_000_000_000,
        },
        "levels": levels_by_name(standing.levels) if standing.levels else {},
        "freed_bytes": dict(standing.freed_bytes),
        "inside_guard_pid": standing.inside_guard_pid,
        "led_from_outside": standing.led_from_outside,
    }


def levels_by_name(levels: Levels) -> dict[str, float]:
    """Where each level engages, as a share of max; those that a policy never reaches are left out."""
    engaged = zip(LEVEL_NAMES[1:], levels.engage_ppm, strict=True)
    return {name: ppm / PPM for name, ppm in engaged if ppm <= PPM}
