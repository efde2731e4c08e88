"""What the tiers that ask something of the agent have in common, and what a recycle needs. Pure.

When one is due, what counts as attempted, whether it helped; whether there is room for the agent that comes back.
"""

from __future__ import annotations

from dataclasses import replace

from governor.cgroup import MemoryState
from governor.model import UNDER_WAY, Deliver, Settled, Status, Tier, TierState, Warn
from governor.policy import SECOND, Asking, Efficacy, Recycle

FOREVER_NS = 1 << 62
USELESS_AFTER_TRIALS = 3
TRY_AGAIN_NS = 7 * 24 * 3600 * SECOND
_LOST_NS = 30 * SECOND  # after its deadline: nobody will say any more what became of a delivery


def since(stamp_ns: int | None, now_ns: int) -> int:
    """Nanoseconds since a stamp; for ever where there is none, or where the clock was set back behind it."""
    return FOREVER_NS if stamp_ns is None or stamp_ns > now_ns else now_ns - stamp_ns


def engaged_since(was_ns: int | None, ratio: float, engage: float, release: float, now_ns: int) -> int | None:
    """Since when a level is engaged: from reaching `engage` until falling below `release`."""
    if ratio < release:
        return None
    return now_ns if was_ns is None and ratio >= engage else was_ns


def attempted(tier: TierState) -> bool:
    """Whether something was tried in this episode, or could not be; what is under way counts."""
    return tier.status is not Status.NONE


def finished(tier: TierState) -> bool:
    """Whether it was attempted and there is nothing more to wait for."""
    return attempted(tier) and tier.status not in UNDER_WAY and tier.status is not Status.DELIVERED


def queued(tier: TierState, delivery: Asking, memory: MemoryState, now_ns: int) -> TierState:
    """As a brake leaves it: to be delivered when the target runs again, or found to be impossible."""
    if attempted(tier):
        return tier
    status = impossible(tier, delivery, now_ns) or Status.QUEUED
    at_bytes = memory.unreclaimable_bytes
    return replace(tier, status=status, began_ns=now_ns, at_ns=now_ns, at_bytes=at_bytes)


def advanced(tier: TierState, delivery: Asking, now_ns: int, grace_ns: int = 0) -> TierState:
    """What time alone changes: a deferred delivery expires, one that nobody answers for has failed.

    `grace_ns`: what an agent that was asked to end has for that.
    """
    age_ns = since(tier.began_ns, now_ns)
    if tier.status is Status.DEFERRED and age_ns >= delivery.deadline_ns:
        return replace(tier, status=Status.EXPIRED, at_ns=now_ns)
    within_ns = max(delivery.deadline_ns, grace_ns if tier.status is Status.RESTARTING else 0) + _LOST_NS
    if tier.status in (Status.RUNNING, Status.RESTARTING) and since(tier.tried_ns, now_ns) >= within_ns:
        return replace(tier, status=Status.FAILED, at_ns=now_ns)
    return tier


def is_due(tier: TierState, delivery: Asking, ratio: float, end_ratio: float, now_ns: int) -> bool:
    """Whether to deliver now, as far as this tier's own history goes.

    At `end_ratio` nothing waits for a dwell or a cooldown: what is terminated there has to be asked before.
    """
    if tier.engaged_ns is None:
        return False
    if tier.status is Status.QUEUED:
        return True
    if tier.status is Status.DEFERRED:
        return since(tier.tried_ns, now_ns) >= delivery.retry_ns
    if since(tier.engaged_ns, now_ns) < delivery.dwell_ns and ratio < end_ratio:
        return False
    cooled = since(tier.delivered_ns, now_ns) >= delivery.cooldown_ns
    if tier.status in (Status.NONE, Status.UNFIT):
        return cooled or ratio >= min(delivery.cooldown_waived_ratio, end_ratio)
    if tier.status in (Status.FAILED, Status.EXPIRED):
        return since(tier.at_ns, now_ns) >= delivery.settle_ns
    if tier.status in (Status.UNAVAILABLE, Status.USELESS):
        return since(tier.at_ns, now_ns) >= delivery.cooldown_ns
    return tier.status is Status.SETTLED and cooled


def begun(
    name: Tier, tier: TierState, delivery: Asking, memory: MemoryState, now_ns: int, reason: str
) -> tuple[TierState, tuple[Deliver | Warn, ...]]:
    """Warn, deliver when the warning is over, or find that it is impossible: that is an attempt as well."""
    if status := impossible(tier, delivery, now_ns):
        return replace(tier, status=status, at_ns=now_ns, at_bytes=memory.unreclaimable_bytes), ()
    if delivery.warning_ns and tier.status is not Status.DEFERRED:
        if tier.warned_ns is None:
            return replace(tier, warned_ns=now_ns), (Warn(name.value, delivery.warning_ns, reason),)
        if since(tier.warned_ns, now_ns) < delivery.warning_ns:
            return tier, ()
    return replace(running(tier, memory, now_ns), warned_ns=None), (Deliver(name, reason),)


def running(tier: TierState, memory: MemoryState, now_ns: int) -> TierState:
    """A try begins: the first, or one more after it was deferred."""
    return replace(
        tier,
        status=Status.RUNNING,
        began_ns=tier.began_ns if tier.status is Status.DEFERRED else now_ns,
        tried_ns=now_ns,
        at_bytes=memory.unreclaimable_bytes,
        isolated=True,
        useless=False,
    )


def answered(tier: TierState, status: Status, memory: MemoryState | None, now_ns: int) -> TierState:
    """A delivery ended; an answer that nobody waits for changes nothing.

    A restart that FAILED was one for nothing; one that EXPIRED was interrupted, which says nothing of its use.
    """
    if tier.status not in (Status.RUNNING, Status.RESTARTING):
        return tier
    if tier.status is Status.RESTARTING and status is Status.FAILED:
        return replace(tier, status=status, at_ns=now_ns, useless_trials=tier.useless_trials + 1, judged_ns=now_ns)
    if status is Status.DELIVERED:
        # From when it was asked: by the time it answers it may have freed all that it will.
        held_bytes = max(tier.at_bytes, memory.unreclaimable_bytes if memory else 0)
        return replace(tier, status=status, at_ns=now_ns, delivered_ns=now_ns, at_bytes=held_bytes)
    return replace(tier, status=status, at_ns=now_ns)


def interrupted(tier: TierState, now_ns: int) -> TierState:
    """Governor died while it delivered: nobody knows whether it was, so it counts as delivered."""
    if tier.status is not Status.RUNNING:
        return tier
    return replace(tier, status=Status.DELIVERED, at_ns=now_ns, delivered_ns=now_ns, isolated=False)


def lost(tier: TierState) -> TierState:
    """What was under way does not come to its end any more."""
    return replace(tier, status=Status.FAILED) if tier.status in UNDER_WAY else tier


def judged(
    name: Tier, tier: TierState, delivery: Asking, memory: MemoryState, now_ns: int
) -> tuple[TierState, tuple[Settled, ...]]:
    """After the settle time: what was freed, and whether that was anything; learned if nothing else was done."""
    if tier.status is not Status.DELIVERED or since(tier.at_ns, now_ns) < delivery.settle_ns:
        return tier, ()
    freed_bytes = tier.at_bytes - memory.unreclaimable_bytes
    useless = freed_bytes < delivery.freed_ratio * memory.max_bytes
    trials = tier.useless_trials + 1 if useless else 0
    tier = replace(tier, status=Status.SETTLED, useless=useless)
    if tier.isolated:
        tier = replace(tier, useless_trials=trials, judged_ns=now_ns)
    return tier, (Settled(name, freed_bytes, useless),)


def gave_nothing(tier: TierState) -> bool:
    """Whether it is out of the question, or has freed nothing in this episode."""
    known = tier.status in (Status.USELESS, Status.UNAVAILABLE)
    return known or (tier.status is Status.SETTLED and tier.useless)


def unfit(
    recycle: Recycle, seen_peak_bytes: int, memory: MemoryState, agent_bytes: int, fits_under_ratio: float
) -> str:
    """Why the agent should not be recycled, by what it holds and what its successor is predicted to; "" if it may.

    `seen_peak_bytes`: the most that the agent of the last recycle held, 0 if there was none. `agent_bytes`: what
    comes free; all else is taken to stay.
    """
    peak_bytes = max(seen_peak_bytes, recycle.peak_bytes)  # seen is only its first half minute
    if not peak_bytes or not agent_bytes:
        of_whom = "the agent that comes back would take" if not peak_bytes else "the agent holds"
        return f"it is not known what {of_whom}"
    others_bytes = max(0, memory.unreclaimable_bytes - agent_bytes)
    peak_mib, agent_mib, others_mib = peak_bytes >> 20, agent_bytes >> 20, others_bytes >> 20
    if peak_bytes + others_bytes >= fits_under_ratio * memory.max_bytes:
        fits_mib = int(fits_under_ratio * memory.max_bytes) >> 20
        return f"it would come back with up to {peak_mib} MiB beside {others_mib} MiB of others, over {fits_mib} MiB"
    if agent_bytes - peak_bytes < recycle.freed_ratio * memory.max_bytes:
        return f"it would come back with up to {peak_mib} MiB and holds {agent_mib} MiB now"
    return ""


def disturbed(tier: TierState) -> TierState:
    """Something else was done: what memory does now says nothing about this tier."""
    return replace(tier, isolated=False)


def shifted(tier: TierState, by_ns: int, now_ns: int) -> TierState:
    """The target was frozen for so long: deadlines and settle time stood still. No stamp gets ahead of `now_ns`."""
    if tier.status not in UNDER_WAY and tier.status is not Status.DELIVERED:
        return tier
    stamps = (tier.began_ns, tier.tried_ns, tier.at_ns)
    began_ns, tried_ns, at_ns = (
        None if stamp is None else min(stamp + by_ns, max(stamp, now_ns)) for stamp in stamps
    )
    return replace(tier, began_ns=began_ns, tried_ns=tried_ns, at_ns=at_ns)


def over(tier: TierState) -> TierState:
    """The episode is over; what is known of the tier stays."""
    return TierState(
        engaged_ns=tier.engaged_ns,
        reachable=tier.reachable,
        delivered_ns=tier.delivered_ns,
        useless_trials=tier.useless_trials,
        judged_ns=tier.judged_ns,
    )


def impossible(tier: TierState, delivery: Asking, now_ns: int) -> Status | None:
    """UNAVAILABLE or USELESS, by what is known; None where it can be tried."""
    if not (delivery.knows_how or tier.reachable):
        return Status.UNAVAILABLE
    learned = tier.useless_trials >= USELESS_AFTER_TRIALS and since(tier.judged_ns, now_ns) < TRY_AGAIN_NS
    if delivery.efficacy is Efficacy.USELESS or (delivery.efficacy is Efficacy.UNKNOWN and learned):
        return Status.USELESS
    return None
