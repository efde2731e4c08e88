"""The episodes of a target's history: from the first crossing until memory has been calm for a while. Pure.

The ladder's own rule for an episode, by what the journal shows of it: engaged at the compact level of the policy of
that time, over ten seconds below its release level. Whatever governor did beside that begins one as well.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from governor.model import Settled, UsualLevels
from governor.policy import SECOND, Policy
from governor.report_read import Begun, Crossed, History, Hold, Look, Said, Saved, Step

_CALM_NS = 10 * SECOND  # as ladder._CALM_NS
_AWAY_NS = 60 * SECOND  # a governor that comes back sooner goes on with the episode
_LATE_ARCHIVE_NS = 60 * SECOND  # after its end
_LEAD_NS = 30 * SECOND  # shown before an episode at least, where there is as much
_RISES_RATIO = 0.005  # from one look to the next
_OPENING = frozenset({"braked", "killed", "shed", "nothing_left", "oom_kill", "oom_kills", "oom_killed", "recycling"})
_QUIET = (UsualLevels, Settled)
_Timed = TypeVar("_Timed", Crossed, Step, Said, Saved)


@dataclass(frozen=True, slots=True)
class Episode:
    """What happened from `from_ns` to `to_ns`; `looks` begin before that, where memory began to grow."""

    target: str
    from_ns: int
    to_ns: int
    begun: Begun | None  # the policy and the place
    looks: tuple[Look, ...]
    crossings: tuple[Crossed, ...]
    holds: tuple[Hold, ...]
    steps: tuple[Step, ...]
    said: tuple[Said, ...]
    saved: tuple[Saved, ...]
    rise: Look | None  # the last look before memory grew

    @property
    def policy(self) -> Policy:
        """By which it was decided; the built-in one where the journal does not say."""
        return self.begun.policy if self.begun else Policy()

    def until_ns(self, hold: Hold) -> int:
        """When it ended; where no thaw was heard of, the latest that it can have."""
        return hold.to_ns if hold.to_ns and hold.is_heard else min(hold.to_ns or self.to_ns, self.to_ns)

    @property
    def peak(self) -> Look | None:
        """The look with the highest ratio, brakes' included."""
        looks = [look for look in self.looks if look.at_ns >= self.from_ns] or list(self.looks)
        return max(looks, key=lambda look: look.memory.unreclaimable_ratio, default=None)


def episodes(history: History) -> list[Episode]:
    """Oldest first."""
    spans = list(_spans(history))
    begins = [hold.from_ns for hold in history.holds]
    found = []
    for (from_ns, to_ns), (next_ns, _) in pairwise([*spans, (history.last_ns + 1, 0)]):
        late_ns = min(next_ns - 1, to_ns + _LATE_ARCHIVE_NS)
        rise = _rise(history.looks, from_ns)
        lead_ns = max(_LEAD_NS, to_ns - from_ns)
        shown_ns = max(rise.at_ns if rise else from_ns, from_ns - lead_ns)
        before = bisect_left(history.looks, shown_ns, key=_at)
        found.append(
            Episode(
                target=history.target,
                from_ns=from_ns,
                to_ns=to_ns,
                begun=_last(history.begun, to_ns),
                looks=tuple(history.looks[max(0, before - 1) : bisect_right(history.looks, to_ns, key=_at)]),
                crossings=_within(history.crossings, from_ns, to_ns),
                holds=tuple(history.holds[bisect_left(begins, from_ns) : bisect_right(begins, to_ns)]),
                steps=_within(history.steps, from_ns, to_ns),
                said=_within(history.said, from_ns, to_ns),
                saved=_within(history.saved, from_ns, late_ns),
                rise=rise,
            )
        )
    return found


def policy_at(begun: list[Begun], at_ns: int) -> Policy:
    """The policy of that time, the built-in one where the journal does not say."""
    last = _last(begun, at_ns)
    return last.policy if last else Policy()


def _spans(history: History) -> Iterator[tuple[int, int]]:
    """Begin and end of each episode."""
    opened_ns: int | None = None
    calm_ns: int | None = None  # since then
    last_ns = 0
    for at_ns, opens, engaged, comes in sorted(_signs(history), key=lambda sign: sign[0]):
        if opened_ns is not None:
            if calm_ns is not None and at_ns - calm_ns > _CALM_NS:
                yield opened_ns, calm_ns + _CALM_NS
                opened_ns = None
            elif comes and at_ns - last_ns > _AWAY_NS:
                yield opened_ns, last_ns
                opened_ns = None
        if opened_ns is None and opens:
            opened_ns, calm_ns = at_ns, None
        if engaged is not None:
            calm_ns = None if engaged else (at_ns if calm_ns is None else calm_ns)
        last_ns = at_ns
    if opened_ns is not None:
        end_ns = history.last_ns if calm_ns is None else min(history.last_ns, calm_ns + _CALM_NS)
        yield opened_ns, max(opened_ns, end_ns)


def _signs(history: History) -> Iterator[tuple[int, bool, bool | None, bool]]:
    """When, whether it opens an episode, whether memory is engaged then (None: says nothing), a governor's begin."""
    for look in history.looks:
        compact, ratio = policy_at(history.begun, look.at_ns).compact, look.memory.unreclaimable_ratio
        yield look.at_ns, ratio >= compact.engage_ratio, ratio >= compact.release_ratio, False
    for crossed in history.crossings:
        yield crossed.at_ns, crossed.rising and crossed.level > 0, crossed.level > 0, False
    for hold in history.holds:
        yield hold.from_ns, True, True, False
    for step in history.steps:
        does = any(not isinstance(each, _QUIET) for each in step.instructions)
        yield step.at_ns, does, None, False
    for said in history.said:
        yield said.at_ns, said.kind in _OPENING, False if said.kind in ("memcg_gone", "stopping") else None, False
    for begun in history.begun:
        yield begun.at_ns, False, None, True


def _rise(looks: list[Look], from_ns: int) -> Look | None:
    """The look from which memory rose without a pause to where the episode begins."""
    at = bisect_right(looks, from_ns, key=_at) - 1
    while at > 0 and _ratio(looks[at]) - _ratio(looks[at - 1]) > _RISES_RATIO:
        at -= 1
    return looks[at] if at >= 0 else None


def _ratio(look: Look) -> float:
    return look.memory.unreclaimable_ratio


def _at(one: Look | Crossed | Step | Said | Saved) -> int:
    return one.at_ns


def _within(times: list[_Timed], from_ns: int, to_ns: int) -> tuple[_Timed, ...]:
    return tuple(times[bisect_left(times, from_ns, key=_at) : bisect_right(times, to_ns, key=_at)])


def _last(begun: list[Begun], at_ns: int) -> Begun | None:
    return next((one for one in reversed(begun) if one.at_ns <= at_ns), begun[0] if begun else None)
