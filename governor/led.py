"""What a guard in a container leaves to a governor outside: it stands back, and delivers for that one.

A node's daemon connects to this guard's subscribers' socket (`inside_guard` says how) and speaks JSON lines:

    outside  {"type": "lead", "for_s": SECONDS}     brake, archive and tier 3 are its own from now on, for so long;
                                                    said again before that is over
             {"type": "deliver", "id": N, "what": "compact", "reason": TEXT, "deadline_s": SECONDS}   or clear
             {"type": "tell", "text": TEXT}         of a tool that was shed: typed to the agent, if it may be
             {"type": "ending", "reason": TEXT}     the agent gets SIGTERM now: its session is to come back
             {"type": "event", "kind": KIND, "text": TEXT}   what people and subscribers here are to hear
    inside   {"type": "led", "can": ["compact"]}    it stands back, and can deliver this; again when that changes
             {"type": "ack", "id": N, "status": "delivered", "reason": TEXT}   or deferred, failed

Only who is outside our PID namespace may say so (its peer pid is 0): nobody whom the guard protects can make it stand
back. Standing back it samples on, and decides nothing but a recycle, which only it can do, where compact is known to
free nothing. When the other side hangs up or its time is over, everything is its own again, at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from governor import tiers
from governor.decisions import Decisions, boottime_ns
from governor.deliveries import Deliveries
from governor.journal import Note, printable
from governor.model import UNDER_WAY, Phase, Status, Tier
from governor.policy import SECOND, Efficacy, Policy
from governor.subscribers import ASKED_FOR, Subscribers

_LONGEST_S = 60  # a leader that hangs is not waited for any longer
_NEVER_RATIO = 2.0
_TEXT_LIMIT = 600
HANDED_ON = frozenset(  # of the journal's kinds: what only the one outside does
    {
        *("warning", "warning_over", "braked", "thawed", "archived", "archive_failed", "shed", "told"),
        *("terminating", "killed", "nothing_left"),
    }
)


def standing_back(policy: Policy, recycles: bool) -> Policy:
    """A policy by which nothing is decided but, if `recycles`, a recycle."""
    compact, recycle, clear = policy.compact, policy.recycle, policy.clear
    return replace(
        policy,
        compact=replace(compact, exec=(), signal="", efficacy=Efficacy.USELESS),
        recycle=recycle if recycles else replace(recycle, engage_ratio=_NEVER_RATIO, release_ratio=_NEVER_RATIO),
        clear=replace(clear, exec=(), signal="", efficacy=Efficacy.USELESS),
        terminate=replace(policy.terminate, dwell_ns=tiers.FOREVER_NS),
        brake=replace(policy.brake, enabled=False),
        shed=replace(policy.shed, enabled=False),
    )


class Led:
    """Who leads, and for how long; nobody at first."""

    def __init__(self, subscribers: Subscribers, deliveries: Deliveries, decisions: Decisions, note: Note) -> None:
        self.policy_changed: Callable[[], None] = lambda: None  # what policy() answers is another
        self.on_event: Callable[[str, str], None] = lambda kind, text: None  # a kind and a text from outside
        self.on_tell: Callable[[str], None] = lambda text: None  # for the agent's own input
        self.on_ending: Callable[[str], None] = lambda reason: None
        self._subscribers, self._deliveries, self._decisions, self._note = subscribers, deliveries, decisions, note
        self._own: Policy = decisions.policy
        self._fd = -1  # of whoever leads, or wants to
        self._until_ns = 0
        self._can: frozenset[Tier] | None = None  # as it was told; None: nobody leads
        self._recycles = False
        self._asked: dict[Tier, int] = {}
        subscribers.on_leader, subscribers.on_left = self._heard, self._left
        deliveries.on_delivered = self._delivered

    @property
    def is_led(self) -> bool:
        """Whether it stands back."""
        return self._can is not None

    def policy(self, own: Policy) -> Policy:
        """By which to go, where `own` would be gone by without a leader."""
        self._own = own
        return own if self._can is None else standing_back(own, self._recycles)

    def hear(self) -> None:
        """Take what the leader has said by now."""
        self._subscribers.hear(self._fd)

    def turn(self, now_ns: int) -> None:
        """Stand back when that is possible, tell what has changed, and lead oneself when its time is over."""
        if self._fd < 0:
            return
        if now_ns >= self._until_ns:
            self.hear()  # the container may have been frozen: what was said meanwhile is still to be heard
        if self._fd >= 0 and now_ns >= self._until_ns:
            self._subscribers.drop(self._fd)
        elif self._fd >= 0:
            self._stand_back()

    def _stand_back(self) -> None:
        state = self._decisions.state
        if self._can is None:
            if state.phase is not Phase.WATCHING or {state.compact.status, state.clear.status} & UNDER_WAY:
                return  # what was begun is brought to its end; whoever wants to lead waits
            self._recycles = tiers.impossible(state.compact, self._own.compact, boottime_ns()) is not None
        can = frozenset(tier for tier in ASKED_FOR.values() if self._is_possible(tier))
        if can == self._can:
            return
        was_led, self._can = self._can is not None, can
        self._subscribers.leader_fd = self._fd
        self._subscribers.say_to(self._fd, "led", can=sorted(tier.value for tier in can))
        if not was_led:
            self._note("led", "a governor outside this container brakes, archives and terminates; here is delivered")
            self.policy_changed()

    def _is_possible(self, tier: Tier) -> bool:
        state = self._decisions.state
        tier_state, wanted = (
            (state.compact, self._own.compact) if tier is Tier.COMPACT else (state.clear, self._own.clear)
        )
        return tiers.impossible(tier_state, wanted, boottime_ns()) is None

    def _heard(self, fd: int, said: Mapping[str, object]) -> bool:
        """Raises KeyError, TypeError or ValueError for what is no such line."""
        now_ns = time.monotonic_ns()
        if said["type"] == "lead":
            if self._fd in (-1, fd):  # a second one has to wait
                self._fd = fd
                self._until_ns = now_ns + round(min(max(_number(said["for_s"]), 0), _LONGEST_S) * SECOND)
                self._stand_back()
            return True
        if fd != self._fd or self._can is None:
            return False
        match said["type"]:
            case "deliver":
                self._deliver(ASKED_FOR[_text(said["what"])], round(_number(said["id"])), said)
            case "tell":
                text = _text(said["text"])
                if self._own.shed.tell:
                    self.on_tell(text)
            case "ending":
                self.on_ending(_text(said["reason"]))
            case "event":
                self.on_event(_text(said["kind"]), _text(said["text"]))
            case _:
                return False
        return True

    def _deliver(self, tier: Tier, number: int, said: Mapping[str, object]) -> None:
        state = self._decisions.state
        if tier in self._asked:
            self._answer(number, Status.DEFERRED, "it is under way")
        elif not self._is_possible(tier):
            self._answer(number, Status.FAILED, "nobody here can")
        elif tiers.since(state.veto_from_ns, boottime_ns()) < state.veto_for_ns:
            self._answer(number, Status.FAILED, "governor hold forbids it here")
        else:
            wanted = self._own.compact if tier is Tier.COMPACT else self._own.clear
            within_ns = round(max(_number(said["deadline_s"]), 0) * SECOND)
            self._asked[tier] = number
            wanted = replace(wanted, deadline_ns=min(wanted.deadline_ns, within_ns))
            self._deliveries.deliver(tier, f"asked for from outside: {_text(said['reason'])}", wanted)

    def _delivered(self, tier: Tier, status: Status, why: str) -> None:
        if (number := self._asked.pop(tier, None)) is not None:
            self._answer(number, status, why)

    def _answer(self, number: int, status: Status, why: str) -> None:
        said = status if status in (Status.DELIVERED, Status.DEFERRED) else Status.FAILED
        self._subscribers.say_to(self._fd, "ack", id=number, status=said.value, reason=printable(why)[:_TEXT_LIMIT])

    def _left(self, fd: int) -> None:
        if fd != self._fd:
            return
        was_led = self._can is not None
        self._fd = self._subscribers.leader_fd = -1
        self._can = None
        self._asked.clear()
        if was_led:
            self._note("led_no_more", "the governor outside is gone, or says nothing: everything is done here again")
            self.policy_changed()


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return printable(value)[:_TEXT_LIMIT]


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return value
