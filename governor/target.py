"""One governed memcg: hears what reflex says of it, samples, asks the ladder, has it carried out, journals.

Owns no process but the children that act for it; reflex, the BPF programs and the poller are the loop's.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from governor import facts, link, model, policy, status
from governor.actuators import Actuators
from governor.agent_look import AgentLook
from governor.agent_process import AgentProcess
from governor.announce import SHOWN
from governor.brake import BRAKE_NAMES
from governor.cgroup import Memcg, is_inside, memcg_of
from governor.container import Container
from governor.decisions import Decisions, boottime_ns
from governor.guard import Guard
from governor.inside_guard import RENEW_NS
from governor.journal import Journal, printable, say
from governor.led import HANDED_ON, Led
from governor.limits import Limits
from governor.model import Phase
from governor.person import Person
from governor.policy import SECOND, Policy
from governor.poller import is_ready
from governor.profile import Profile
from governor.reflex_reports import ReflexReports
from governor.sampling import Sampling
from governor.shared import Shared
from governor.standing import Standing, names_of
from governor.subscribers import TOLD

_TURN_NS = SECOND  # deadlines are looked at so often at least
_YOUNG_NS = 10 * SECOND  # so long an agent is about to be started, and is looked for more often, by
_YOUNG_MORE = 4


class Target:
    """One governed memcg, in one slot of the knob file."""

    def __init__(
        self,
        guard: Guard,
        slot: int,
        wanted: Policy,
        profile: Profile | None,
        shared: Shared,
        container: Container | None = None,
    ) -> None:
        """Raises OSError when the memcg or the journal cannot be opened."""
        self.slot = slot
        self.leaving = False  # no new agent is looked for
        self.gone = False  # the memcg is
        self._guard, self._shared, self._policy, self._container = guard, shared, wanted, container
        self._memcg = Memcg(guard.cgroup)
        self._limits = Limits(self._memcg)
        try:
            journal = Journal.or_none if container else Journal  # a full disk of the node's must unprotect nobody
            self._journal = journal(Path(guard.journal_path), guard.cgroup, self._first_line)
        except OSError:
            self._limits.close()
            self._memcg.close()
            raise
        is_within = is_inside(memcg_of("self", self._memcg.v1), guard.cgroup)
        match = profile.match if profile else None
        self._agent = AgentProcess(
            self._memcg.own_path,  # the path may be another memcg's before it is seen that ours is gone
            guard.agent_pid or 0,
            is_within,
            match,
            guard.only_pid,
            guard.is_container,
            guard.has_own_mounts,
            AgentLook(shared.poller, lambda: shared.look_at(slot)),
        )
        self._decisions = Decisions(guard.cgroup, wanted, self._agent, self._journal, self.note)
        self._decisions.on_step = self._stepped
        self._sampling = Sampling(
            self._limits, slot, self._agent, guard.agent_pid or 0, self._decisions, shared, self.note
        )
        self._actuators = Actuators(
            guard,
            slot,
            profile,
            self._limits,
            self._agent,
            self._decisions,
            self._sampling,
            shared,
            self.note,
            self._say,
        )
        subscribers, executor = self._actuators.subscribers, self._actuators.executor
        subscribers.on_status = lambda after: status.page(
            {slot: self.standing}, after, shared.reflex_pid(), boottime_ns()
        )
        self.reports = ReflexReports(
            slot=slot,
            shared=shared,
            limits=self._limits,
            sampling=self._sampling,
            decisions=self._decisions,
            executor=executor,
            subscribers=subscribers,
            journal=self._journal,
            note=self.note,
            say=self._say,
        )
        self._led = Led(subscribers, self._actuators.deliveries, self._decisions, self.note)
        self._led.policy_changed = lambda: self._go_by(self._policy, "as led from outside")
        self._led.on_event, self._led.on_tell = self._heard_outside, self._actuators.deliveries.tell
        self._led.on_ending = executor.order_resume
        attempt = self._actuators.children.attempt
        self._person = Person(attempt, lambda kind, text: self._journal.write(kind, text=text))
        self._turned_ns = self._begun_ns = time.monotonic_ns()

    @property
    def cgroup_id(self) -> int:
        """Of its memcg."""
        return self._memcg.cgroup_id

    @property
    def policy(self) -> Policy:
        """By which it is governed now."""
        return self._policy

    # Its begin and end

    def begin(self) -> None:
        """Remember what an earlier governor knew, listen, look for the agent. Samples only, until adopt()."""
        left_over = self._shared.knob_file.knobs(self.slot)
        if left_over is None:
            self._shared.knob_file.adopt(self.slot, self._guard.cgroup, self._memcg.cgroup_id)
        else:  # a brake that a killed governor left is held until reflex watches
            left_over.close()
        self._shared.tally.adopt(self.slot, self._names, time.monotonic_ns())
        self._actuators.listen()
        self._find_agent(time.monotonic_ns())
        self._decisions.remember()
        self._actuators.reachable()
        self._journal.begin()
        self._after_recycle()

    def adopt(self) -> None:
        """Have reflex watch it: a reflex that has just started knows nothing."""
        self._shared.send(link.encode_levels(link.ADOPT, self.slot, policy.levels(self._decisions.policy)))
        if self._agent.pid:
            self._shared.send(link.encode_slot(link.AGENT, self.slot, self._agent.pid))

    def policy_again(self, wanted: Policy) -> None:
        """Go on by another policy."""
        self._policy = wanted
        self._go_by(wanted, "from now on")

    def _go_by(self, own: Policy, how: str) -> None:
        """By this policy, or what is left of it while somebody outside leads."""
        executor = self._actuators.executor
        wanted = executor.policy = self._decisions.policy = self._led.policy(own)
        self._shared.send(link.encode_levels(link.SET_LEVELS, self.slot, policy.levels(wanted)))
        executor.levels_again(self._decisions.state.phase)
        if self._decisions.state.phase is Phase.HELD and not wanted.brakes:
            executor.usual_levels()
            self._decisions.feed(model.Thawed())
        self.note("policy", f"policy {wanted.name!r} {how}", policy=wanted)

    def finishing(self) -> bool:
        """Whether to go on for the archive of an agent that has ended: who stops us with it must not lose that."""
        if self._agent.pidfd < 0:
            return self._actuators.children.has_work()
        return is_ready(self._agent.pidfd)

    def abandon(self) -> None:
        """Start nothing more, and end what was started."""
        self._actuators.abandon()

    def close(self) -> None:
        """Once reflex has let go of it: nobody is told of it any more."""
        self._actuators.close()
        self._shared.tally.release(self.slot, time.monotonic_ns())
        if self._agent.pidfd >= 0:
            self._shared.poller.unregister(self._agent.pidfd)
        self._agent.let_go()
        self._limits.close()
        self._memcg.close()
        self._journal.close()

    # Its turns

    def turn(self, now_ns: int) -> None:
        """Whatever is due by now: deadlines, a sample."""
        self._find_agent(now_ns)
        if self._decisions.state.phase is Phase.HELD:
            self._actuators.prolong(now_ns - self._turned_ns)
        self._turned_ns = now_ns
        self._agent.check_deadlines(now_ns)
        self._actuators.check_deadlines(now_ns)
        self._led.turn(now_ns)
        if inside := self._actuators.inside:  # a guard in there is to stand back only for who brakes
            inside.turn(now_ns, self._agent, leads=self._policy.brakes and bool(self.reports.source))
        if now_ns - self._sampling.looked_ns >= self._sampling.interval_ns:
            self.sample(now_ns)

    def sample(self, now_ns: int) -> None:
        """Look at its memory, and ask the ladder."""
        self._sampling.look(now_ns)
        if self._sampling.gone:
            self.gone = self.leaving = True

    @property
    def is_lively(self) -> bool:
        """Whether something is under way with it."""
        return self._decisions.state.phase is not Phase.WATCHING

    @property
    def due_ns(self) -> int:
        """When its next turn is."""
        turn_ns = _TURN_NS
        inside = self._actuators.inside
        if self._actuators.are_idle and not (self.is_lively or self._sampling.is_raised):
            is_young = self._turned_ns - self._begun_ns < _YOUNG_NS and not self._shared.is_pressed()
            turn_ns = max(_TURN_NS, self._shared.calm_interval_ns() // (_YOUNG_MORE if is_young else 1))
            if inside and inside.pid:  # it does not stand back for long unless it hears of us
                turn_ns = min(turn_ns, RENEW_NS)
        return min(self._sampling.looked_ns + self._sampling.interval_ns, self._turned_ns + turn_ns)

    def late_ns(self, now_ns: int) -> int:
        """How long the next look at its memory is overdue; less than 0: it is not."""
        return now_ns - (self._sampling.looked_ns or self._turned_ns) - self._sampling.interval_ns

    # The agent

    def _find_agent(self, now_ns: int) -> None:
        calm = self._decisions.state.phase is Phase.WATCHING and not self._sampling.is_raised
        if calm and self._agent.is_stand_in(now_ns):
            self._shared.poller.unregister(self._agent.pidfd)
            self._agent.let_go()
        if calm:
            self._agent.follow(now_ns)
        if self.leaving or not self._agent.find():
            return
        self._shared.poller.register(self._agent.pidfd, lambda _: self._agent_ended())
        self._sampling.found_agent()
        self._shared.send(link.encode_slot(link.AGENT, self.slot, self._agent.pid))
        pid, globs = self._agent.pid, self._policy.archive.globs
        self._agent.patterns(globs)
        self._actuators.subscribers.allowed_uids |= self._agent.uids
        if not self._guard.is_container:  # nobody sits before one
            self._person.at(pid, self._guard.channel)
        self._actuators.reachable()
        self.note("agent", f"the agent is process {pid}", pid=pid, archive=globs)
        if pid == 1:
            self._say(
                "nobody inside a container may stop or kill its process 1: only its tools can be held and killed"
            )
        self._actuators.deliveries.ask_again(self._guard.resume_path)

    def _agent_ended(self) -> None:
        self._shared.poller.unregister(self._agent.pidfd)
        pid, state = self._agent.pid, self._decisions.state
        try:
            self._bring_to_an_end(pid, state)
        finally:  # whatever went wrong: else its pidfd is ready for ever, and its door keeps the container's mounts
            self._agent.forget()
            self._shared.send(link.encode_slot(link.AGENT, self.slot, 0))
            self._shared.look_at(self.slot)
        self._actuators.reachable()

    def _bring_to_an_end(self, pid: int, state: model.State) -> None:
        self._led.hear()  # who leads may have ended it, and said so before
        self.note("agent_ended", f"the agent (process {pid}) ended", pid=pid, phase=state.phase.value)
        self._actuators.executor.sweep(state)
        self._actuators.drop_requests()
        self._decisions.feed(model.AgentEnded())
        self._actuators.executor.archive_the_end(state, self._sampling.what_killed(time.monotonic_ns()))
        self._actuators.recycle.leave()

    def _after_recycle(self) -> None:
        """An agent was recycled, and governor run, which did it, says whether it was compacted."""
        self._actuators.recycle.let_be()  # what is ordered now is of a guard that died
        if self._decisions.state.recycle.status is model.Status.RESTARTING:
            why = "nobody took its session up again" if self._guard.recycled is None else self._guard.recycled
            failed = model.Status.EXPIRED if self._guard.recycled is None else model.Status.FAILED
            delivered = self._actuators.deliveries.delivered
            delivered(model.Tier.RECYCLE, failed if why else model.Status.DELIVERED, why)

    # What is seen and said of it

    def _stepped(
        self,
        event: model.Event,
        before: model.State,
        after: model.State,
        instructions: Sequence[model.Instruction],
        at_ns: int,
    ) -> None:
        if before.phase is not after.phase:
            self._shared.look_at(self.slot)
        self._shared.tally.stepped(self.slot, event, before, after, instructions, at_ns, self._policy.dry_run)

    def standing(self) -> Standing:
        """How it stands, by its last sample."""
        tally = self._shared.tally
        return Standing(
            cgroup=self._guard.cgroup,
            cgroup_id=self.cgroup_id,
            container=self._container,
            policy=self._policy.name,
            dry_run=self._policy.dry_run,
            agent_pid=self._agent.pid,
            source=self.reports.source,
            brake=BRAKE_NAMES[self._actuators.executor.brake],
            memory=self._sampling.memory,
            fill_rate_bytes=self._sampling.rate_bytes,
            level=self.reports.level,
            state=self._decisions.state,
            frozen_for_ns=tally.frozen_for_ns(self.slot, time.monotonic_ns()),
            decided=tally.decided(self.slot),
            levels=policy.levels(self._policy),
            freed_bytes=tally.freed_bytes_of(self.slot),
            inside_guard_pid=self._actuators.inside.pid if self._actuators.inside else 0,
            led_from_outside=self._led.is_led,
        )

    def known_as(self, container: Container) -> None:
        """More is known of the container than before, or the same."""
        self._container = container
        self._shared.tally.adopt(self.slot, self._names, time.monotonic_ns())

    @property
    def _names(self) -> tuple[str, str, str]:
        return names_of(self._container, self._guard.cgroup)

    def _first_line(self) -> dict[str, object]:
        known = {"policy": self._policy, "state": self._decisions.state, "guard": self._guard}
        return known | {"facts": facts.of_the_place(self._memcg)}

    def note(self, kind: str, text: str, **fields: object) -> None:
        """Say it to whoever reads standard error, the journal, subscribers and the person, each what is theirs."""
        self._say(text)
        self._journal.write(kind, text=text, **fields)
        if kind in SHOWN:
            self._person.show(kind, text, time.monotonic_ns())
        if kind in TOLD:
            self._actuators.subscribers.tell("event", kind=kind, text=printable(text))
        if kind in HANDED_ON and self._actuators.inside:
            self._actuators.inside.tell("event", kind=kind, text=printable(text))

    def _say(self, text: str) -> None:
        """For people; a node's log says of whom."""
        names = filter(None, self._names) if self._container else ()
        say(": ".join(filter(None, ("/".join(names), text))))

    def _heard_outside(self, kind: str, text: str) -> None:
        """What a governor outside has done or is about to do, for whoever would hear it of us."""
        if kind == "told":
            self._actuators.executor.note_told(text, from_outside=True)
        elif kind in HANDED_ON:
            self.note(kind, text, from_outside=True)
