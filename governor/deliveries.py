"""Brings tiers 1 and 2 to the agent: by the policy's command or signal, by a subscriber, or typed into its terminal.

Decides nothing; what became of a delivery goes to the ladder as `model.Answered`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from governor import cut_turn, delivery, model
from governor.actions.commands import Commands, signal_agent
from governor.agent_process import AgentProcess
from governor.brake import KnobFile
from governor.children import Child, Children, Ended
from governor.inside_guard import InsideGuard
from governor.journal import Note, printable
from governor.limits import Limits
from governor.model import Status, Tier
from governor.policy import Delivery
from governor.profile import Profile
from governor.subscribers import Subscribers
from governor.telling import Telling


@dataclass(slots=True)
class Deliveries:
    """To the agent of one governed memcg; `feed` hands an event to the ladder."""

    cgroup: str
    slot: int  # in the knob file
    agent: AgentProcess
    knob_file: KnobFile
    children: Children
    commands: Commands
    subscribers: Subscribers
    note: Note
    feed: Callable[[model.Event], None]
    limits: Limits
    profile: Profile | None  # of the agent, and its terminal: what is typed there where nobody subscribed
    channel: str
    inside: InsideGuard | None = None  # in the agent's container
    on_delivered: Callable[[Tier, Status, str], None] = lambda *_: None  # as delivered() was called
    _telling: Telling | None = None

    @property
    def can(self) -> frozenset[Tier]:
        """What the agent can be asked for by a subscriber, or by what its profile says to type."""
        typed = frozenset(tier for tier in Tier if self._types(tier)) if self.agent.pid else frozenset()
        return self.subscribers.can | typed | (self.inside.can if self.inside else frozenset())

    def deliver(self, tier: Tier, reason: str, wanted: Delivery) -> None:
        """Begin it by the way that the policy wants."""
        self.lift_high()
        self.note("deliver", f"{tier.value}: {reason}", tier=tier.value, how=self._how(tier, wanted))
        if wanted.signal:
            self._ended(tier, signal_agent(self.agent.pidfd, self.agent.pid, wanted.signal))
            return
        now_ns = time.monotonic_ns()
        deadline_ns = now_ns + wanted.deadline_ns
        if not wanted.exec:
            is_inside = self.inside is not None and self.inside.ask(tier, reason, deadline_ns, now_ns)
            if not is_inside and not self.subscribers.ask(tier, reason, deadline_ns, now_ns):
                self._type(tier, deadline_ns)
            return
        environment = {
            "GOVERNOR_CGROUP": self.cgroup,
            "GOVERNOR_AGENT_PID": str(self.agent.pid),
            "GOVERNOR_TIER": tier.value,
        }

        def run() -> Child:
            door = self.agent.way_in()
            if self.agent.lives_elsewhere and not door:
                raise OSError("there is no way to where the agent lives")
            what = f"{tier.value}: {reason}"
            child, why_not = self.commands.run(wanted.exec, environment, deadline_ns, what, door)
            if why_not:
                self.note("no_own_memcg", f"{tier.value} runs without a memcg of its own: {why_not}")
            return child

        self.children.attempt(run, lambda ended: self._ended(tier, ended))

    def lift_high(self) -> None:
        """A throttled agent could not do it."""
        if knobs := self.knob_file.knobs(self.slot):
            knobs.lift_high()
            knobs.close()

    def delivered(self, tier: Tier, status: Status, why: str) -> None:
        """What became of a delivery, and what whoever was asked has to say of it."""
        text = f"{tier.value} was {status.value}" + (f": {why}" if status is not Status.DELIVERED and why else "")
        self.note("delivered" if status is Status.DELIVERED else f"{tier.value}_{status.value}", text, output=why)
        self.feed(model.Answered(tier, status, self.limits.memory_state(time.monotonic_ns())))
        self.on_delivered(tier, status, why)

    def _how(self, tier: Tier, wanted: Delivery) -> tuple[str, ...]:
        """The command's words, the signal's name, or who does it."""
        if wanted.exec or wanted.signal:
            return wanted.exec or (wanted.signal,)
        if self.inside and tier in self.inside.can:
            return ("governor run",)
        if tier in self.subscribers.can:
            return ("subscriber",)
        return ("typed", self.channel) if self._types(tier) else ("nobody",)

    def tell(self, text: str) -> None:
        """Say something to the agent in its own terminal, where its profile says that it takes words."""
        if self.inside and self.inside.tell("tell", text=text):
            return
        if not (self.profile and self.profile.type.tell and self.channel and self.agent.pid):
            return
        if self._telling is None:
            self._telling = Telling(self.children.attempt, self.note)
        self._telling.tell(self.profile, self.agent.pid, self.channel, text, time.monotonic_ns())

    def ask_again(self, resume_path: str) -> None:
        """An agent was found: if it is one that was resumed, and its last turn was cut off, ask for that again."""
        profile, agent = self.profile, self.agent.known
        if not (resume_path and profile and agent and profile.session.resubmit and self.channel):
            return
        session = cut_turn.pending(resume_path, agent)
        if not session:
            return

        def ended(ended: Ended) -> None:
            cut_turn.claim(resume_path)  # it is not for a later agent, or a later hour
            kind = "turn_resubmitted" if ended.ok else "turn_not_resubmitted"
            why = printable(ended.output.decode(errors="replace")) if ended.ok else ended.why
            self.note(kind, f"the turn that was cut off: {why}")

        self.children.attempt(
            lambda: cut_turn.start(resume_path, profile, agent.pid, self.channel, session),
            ended,
        )

    def _types(self, tier: Tier) -> bool:
        """Whether it is known what to type, and where."""
        return bool(self.channel and self.profile and self.profile.text(tier))

    def _type(self, tier: Tier, deadline_ns: int) -> None:
        profile = self.profile
        if not profile or not self._types(tier):
            self.delivered(tier, Status.FAILED, "nobody who can is subscribed any more")
            return
        self.children.attempt(
            lambda: delivery.start(profile, tier, self.agent.pid, self.channel, deadline_ns),
            lambda ended: self._ended(tier, ended),
        )

    def _ended(self, tier: Tier, ended: Ended) -> None:
        status = Status.DELIVERED if ended.ok else Status.DEFERRED if ended.deferred else Status.FAILED
        self.delivered(tier, status, ended.why)
