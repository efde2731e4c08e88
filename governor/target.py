"""One governed memcg: hears what reflex says of it, samples, asks the ladder, has it carried out, journals.

Owns no process but the children that act for it; reflex, the BPF programs and the poller are the loop's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from governor import children, instance, link, model, policy, poll_source, record, status
from governor.actions.commands import Commands
from governor.actions.processes import peak_anonymous_bytes
from governor.agent_process import AgentProcess
from governor.announce import SHOWN
from governor.attribution import Attribution
from governor.brake import BRAKE_NAMES, FREEZE, KnobFile
from governor.cgroup import Memcg, MemoryState, is_inside, memcg_of
from governor.codec import plain
from governor.container import Container
from governor.decisions import Decisions, boottime_ns
from governor.deliveries import Deliveries
from governor.executor import Executor
from governor.guard import Guard
from governor.journal import Journal, printable, say
from governor.limits import Limits
from governor.model import Phase
from governor.oom_kills import OomKills
from governor.person import Person
from governor.policy import MS, SECOND, Policy
from governor.poller import Poller, is_ready
from governor.profile import Profile
from governor.recycle import Recycle
from governor.standing import Standing
from governor.subscribers import TOLD, Subscribers
from governor.tally import Tally
from governor.tiers import since
from governor.veto import Veto

_SAMPLE_NS = {Phase.HELD: 50 * MS, Phase.PROBATION: 100 * MS, Phase.TERMINATING: 50 * MS}
_TURN_NS = SECOND  # deadlines are looked at so often at least
_YOUNG_NS = 10 * SECOND  # so long an agent is looked for every second: it is about to be started
_HELD_BUDGET_NS = 100 * MS  # for finding out whose growth it is, while nothing grows


@dataclass(frozen=True, slots=True)
class Shared:
    """What the targets of one governor have in common."""

    poller: Poller
    knob_file: KnobFile
    commands: Commands
    send: Callable[[bytes], bool]  # to reflex
    reflex_pid: Callable[[], int]  # 0: it does not run
    tally: Tally
    source_name: Callable[[int], str]  # a source in words
    protected: Callable[[], None]  # called when a target's protection has begun
    calm_interval_ns: Callable[[], int]  # a calm target need not be sampled more often: others want their turn
    look_at: Callable[[int], None]  # a slot is to have its turn now


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
        self.source = ""  # where crossings come from; not known before adopt()
        self._memcg = Memcg(guard.cgroup)
        self._limits = Limits(self._memcg)
        try:
            self._journal = Journal(Path(guard.journal_path), guard.cgroup, self._first_line)
        except OSError:
            self._limits.close()
            self._memcg.close()
            raise
        is_within = is_inside(memcg_of("self", self._memcg.v1), guard.cgroup)
        match = profile.match if profile else None
        self._agent = AgentProcess(
            guard.cgroup, guard.agent_pid or 0, is_within, match, guard.only_pid, guard.is_container
        )
        self._attribution = Attribution(guard.cgroup, guard.agent_pid or 0)
        self._veto = Veto(self._memcg.cgroup_id)
        self._children = children.Children(shared.poller)
        self._subscribers = Subscribers(shared.poller, self._hello)
        self._subscribers.on_change = self._reachable
        self._subscribers.on_status = lambda after: status.page(
            {slot: self.standing}, after, shared.reflex_pid(), boottime_ns()
        )
        self._decisions = Decisions(guard.cgroup, wanted, self._agent, self._journal, self.note)
        self._deliveries = Deliveries(
            cgroup=guard.cgroup,
            slot=slot,
            agent=self._agent,
            knob_file=shared.knob_file,
            children=self._children,
            commands=shared.commands,
            subscribers=self._subscribers,
            note=self.note,
            feed=self._decisions.feed,
            limits=self._limits,
            profile=profile,
            channel=guard.channel,
        )
        self._subscribers.on_answer = self._deliveries.delivered
        self._recycle = Recycle(
            agent=self._agent,
            children=self._children,
            limits=self._limits,
            note=self.note,
            feed=self._decisions.feed,
            answered=lambda status, why: self._deliveries.delivered(model.Tier.RECYCLE, status, why),
            agent_bytes=lambda: sum(self._attribution.agent_held_bytes()),
            profile=profile,
            channel=guard.channel,
            program=guard.program,
            resume_path=guard.resume_path,
        )
        archives = Path(guard.archive_directory)
        self._executor = Executor(
            cgroup=guard.cgroup,
            slot=slot,
            archive_directory=archives,
            policy=wanted,
            agent=self._agent,
            knob_file=shared.knob_file,
            children=self._children,
            deliveries=self._deliveries,
            recycle=self._recycle,
            send=shared.send,
            note=self.note,
            limits=self._limits,
            feed=self._decisions.feed,
            remembered=lambda: self._attribution.descendants(),
            profile=profile,
            program=guard.program,
            resume_path=guard.resume_path,
            fallbacks=[path for path in (instance.state_directory() / "archive",) if path != archives],
        )
        self._decisions.carry_out = self._executor.carry_out
        self._decisions.on_step = self._stepped
        self._person = Person(self._children.attempt, lambda kind, text: self._journal.write(kind, text=text))
        self._turned_ns = self._begun_ns = time.monotonic_ns()
        self._sampled_ns = 0
        self._last: MemoryState | None = None
        self._last_ns = 0
        self._sampled_rate: int | None = None  # bytes per second between the last two samples
        self._unreadable = False
        self._level_heard = 0
        self._held_ns = 0  # when the last brake was confirmed
        self._kills = OomKills(guard.cgroup)

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
        self._shared.tally.adopt(self.slot, self.standing().names, time.monotonic_ns())
        self._listen()
        self._find_agent(time.monotonic_ns())
        self._decisions.remember()
        self._reachable()
        self._journal.begin()
        self._after_recycle()

    def adopt(self) -> None:
        """Have reflex watch it: a reflex that has just started knows nothing."""
        self._shared.send(link.encode_levels(link.ADOPT, self.slot, policy.levels(self._policy)))
        self._shared.send(link.encode_slot(link.AGENT, self.slot, self._agent.pid))

    def policy_again(self, wanted: Policy) -> None:
        """Go on by another policy."""
        self._policy = self._executor.policy = self._decisions.policy = wanted
        self._shared.send(link.encode_levels(link.SET_LEVELS, self.slot, policy.levels(wanted)))
        self._executor.levels_again(self._decisions.state.phase)
        if self._decisions.state.phase is Phase.HELD and not wanted.brakes:
            self._executor.usual_levels()
            self._decisions.feed(model.Thawed())
        self.note("policy", f"policy {wanted.name!r} from now on", policy=plain(wanted))

    def finishing(self) -> bool:
        """Whether to go on for the archive of an agent that has ended: who stops us with it must not lose that."""
        if self._agent.pidfd < 0:
            return self._children.has_work()
        return is_ready(self._agent.pidfd)

    def abandon(self) -> None:
        """Start nothing more, and end what was started."""
        if self._agent.pid:
            self._recycle.let_be()
        for what in self._children.abandon():
            self.note("abandoned", f"was still running: {what}")

    def close(self) -> None:
        """Once reflex has let go of it: nobody is told of it any more."""
        self._subscribers.close()
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
        if self._decisions.state.phase is Phase.HELD:  # whoever delivers to a frozen agent has to wait
            self._children.prolong(now_ns - self._turned_ns)
            self._subscribers.prolong(now_ns - self._turned_ns)
            self._recycle.prolong(now_ns - self._turned_ns)
        self._turned_ns = now_ns
        self._children.check_deadlines(now_ns)
        self._subscribers.check_deadlines(now_ns)
        self._recycle.check_deadline(now_ns)
        if now_ns - self._sampled_ns >= self._interval_ns():
            self.sample(now_ns)

    @property
    def is_lively(self) -> bool:
        """Whether it is to have its turn whenever anything happens."""
        return self._decisions.state.phase is not Phase.WATCHING

    @property
    def due_ns(self) -> int:
        """When its next turn is."""
        turn_ns = max(_TURN_NS, self._shared.calm_interval_ns()) if self._has_no_deadlines() else _TURN_NS
        return min(self._sampled_ns + self._interval_ns(), self._turned_ns + turn_ns)

    def _has_no_deadlines(self) -> bool:
        is_young = self._turned_ns - self._begun_ns < _YOUNG_NS
        is_calm = not (is_young or self.is_lively or self._is_raised() or self._recycle.awaits_end)
        return is_calm and self._children.are_none and self._subscribers.are_none

    def _interval_ns(self) -> int:
        signals, state = self._policy.signals, self._decisions.state
        if (
            state.phase is Phase.PROBATION
            and since(state.probation_ns, boottime_ns()) > self._policy.brake.probation_ns
        ):
            return signals.raised_interval_ns  # full, but it has sat still for long
        if state.phase in _SAMPLE_NS:
            return _SAMPLE_NS[state.phase]
        if self._is_raised():
            return signals.raised_interval_ns
        return max(signals.interval_ns, self._shared.calm_interval_ns())

    def _is_raised(self) -> bool:
        return self._last is not None and self._last.unreclaimable_ratio >= self._policy.compact.engage_ratio

    # What reflex says of it

    def lost_reflex(self) -> None:
        """reflex ended, and its brake was undone."""
        if self._decisions.state.phase is Phase.HELD:
            self._decisions.feed(model.Thawed())

    def on_reflex(self, said: link.Braked | link.Thawed | link.Adopted | link.Source) -> None:
        """What was said of this slot."""
        match said:
            case link.Braked():
                self._shared.tally.braked(self.slot, said)
                self._on_braked(said)
            case link.Thawed(reason=reason, at_ns=at_ns):
                self._shared.tally.thawed(self.slot, at_ns, reason)
                self.note("thawed", f"thawed: {link.THAW_REASONS[reason]}", at_ns=at_ns)
                if reason != link.ASKED:
                    self._decisions.feed(model.Thawed())
            case link.Adopted(ok=True, source=source, brake=brake):
                self._protecting(source, brake)
                self._executor.levels_again(self._decisions.state.phase)  # and undo what an earlier run left
            case link.Adopted(ok=False):
                self.note("unprotected", "reflex cannot watch this memcg: only sampling is left")
            case link.Source(source=source, brake=brake):
                self._protecting(source, brake)

    def _protecting(self, source: int, brake: int) -> None:
        self._executor.brake, self.source = brake, poll_source.NAMES[source]
        self._executor.look()  # which limit counts
        limit = self._limits.describe()
        text = f"protecting: {self._shared.source_name(source)}; brake: {BRAKE_NAMES[brake]}; limit: {limit}"
        self.note("protecting", text, source=poll_source.NAMES[source], brake=BRAKE_NAMES[brake], limit=limit)
        self._shared.protected()

    def on_record(self, found: record.Record, called_back_ns: int) -> None:
        """A record of this memcg, or an OOM kill of nobody knows whom."""
        latency_ms = (called_back_ns - found.ktime_ns) / MS
        fields = {"record": found._asdict(), "called_back_ns": called_back_ns}
        if found.kind == record.OOM_KILL:
            whom = f"process {found.pid}" if found.pid else "a process here or in a memcg below"
            self.note("oom_kill", f"the kernel's OOM killer chose {whom}", **fields)
            return
        self._journal.write(record.KIND_NAMES.get(found.kind, "record"), **fields)
        if found.kind == record.STALL:
            self._decisions.feed(model.Stalled())
            self._sampled_ns = 0  # look now
        if found.kind == record.CROSSING and found.level != self._level_heard:
            way = f"{'rising' if found.rising else 'falling'} to level {record.LEVEL_NAMES[found.level]}"
            say(f"{way}: {_megabytes(found)}, heard after {latency_ms:.2f} ms")
            self._level_heard = found.level
            self._sampled_ns = 0
            self._subscribers.tell_level(found)
        if found.kind == record.CROSSING and found.rising and found.level >= record.LEVEL_BRAKE:
            held = self._decisions.state.held if self._decisions.state.phase is Phase.HELD else None
            if held and held.frozen and found.ktime_ns > self._held_ns + 20 * MS:
                self._decisions.feed(model.StillGrowing())

    def _on_braked(self, braked: link.Braked) -> None:
        self._held_ns = braked.frozen_ns
        took = (
            f" {(braked.frozen_ns - braked.crossed_ns) / MS:.2f} ms after the crossing" if braked.crossed_ns else ""
        )
        how = "cannot be held"
        if braked.frozen:
            how = "frozen" if self._executor.brake == FREEZE else "stopped"
        by = f", charged by process {braked.charging_pid}" if braked.charging_pid else ""
        ratio, max_mib = braked.state.unreclaimable_ratio, braked.state.max_bytes >> 20
        text = f"braked: {how}{took} at {100 * ratio:.1f} % of {max_mib} MiB{by}"
        self.note("braked", text, **braked._asdict())
        trend = self._sampled_rate if braked.trend_bytes < 0 else braked.trend_bytes
        growth = self._attribution.growth(time.monotonic_ns(), braked.charging_pid, _HELD_BUDGET_NS)
        rate = None if braked.fill_rate_bytes < 0 else braked.fill_rate_bytes
        self._decisions.feed(model.Braked(braked.state, trend, braked.frozen, growth, rate))

    # The agent

    def _find_agent(self, now_ns: int) -> None:
        calm = self._decisions.state.phase is Phase.WATCHING and not self._is_raised()
        if calm and self._agent.is_stand_in(now_ns):
            self._shared.poller.unregister(self._agent.pidfd)
            self._agent.let_go()
        if self.leaving or not self._agent.find():
            return
        self._shared.poller.register(self._agent.pidfd, lambda _: self._agent_ended())
        self._attribution = Attribution(self._guard.cgroup, self._agent.pid)
        self._shared.send(link.encode_slot(link.AGENT, self.slot, self._agent.pid))
        pid, globs = self._agent.pid, self._policy.archive.globs
        self._agent.patterns(globs)
        self._subscribers.allowed_uids |= self._agent.uids
        self._person.at(pid, self._guard.channel)
        self._reachable()
        self.note("agent", f"the agent is process {pid}", pid=pid, archive=globs)
        if pid == 1:
            say("nobody inside a container may stop or kill its process 1: only its tools can be held and killed")
        self._deliveries.ask_again(self._guard.resume_path)

    def _agent_ended(self) -> None:
        self._shared.poller.unregister(self._agent.pidfd)
        pid, state = self._agent.pid, self._decisions.state
        try:
            self._bring_to_an_end(pid, state)
        finally:  # whatever went wrong: else its pidfd is ready for ever, and its door keeps the container's mounts
            self._agent.forget()
            self._shared.send(link.encode_slot(link.AGENT, self.slot, 0))
            self._shared.look_at(self.slot)
        self._reachable()

    def _bring_to_an_end(self, pid: int, state: model.State) -> None:
        self.note("agent_ended", f"the agent (process {pid}) ended", pid=pid, phase=state.phase.value)
        self._executor.sweep(state)
        self._subscribers.drop_requests()
        self._decisions.feed(model.AgentEnded())
        self._count_oom_kills(time.monotonic_ns())
        self._executor.archive_the_end(state, self._kills.what_killed(time.monotonic_ns()))
        self._recycle.leave()

    def _count_oom_kills(self, now_ns: int) -> None:
        before = self._kills.count
        if text := self._kills.look(now_ns):
            self._shared.tally.oom_killed(self.slot, self._kills.count - before)
            self.note("oom_kills", text)

    # Subscribers

    def _listen(self) -> None:
        path = instance.run_directory() / f"memcg-{self._memcg.cgroup_id}.sock"
        try:
            self._subscribers.listen(path)
        except OSError as error:
            self.note("no_socket", f"nobody can subscribe: {path}: {error.strerror}")

    def _hello(self) -> dict[str, object]:
        self._shared.look_at(self.slot)
        return {"cgroup": self._guard.cgroup, "agent_pid": self._agent.pid}

    def _reachable(self) -> None:
        recycle = {model.Tier.RECYCLE} if self._agent.pid and self._agent.known and self._recycle.possible else set()
        self._decisions.reachable(self._deliveries.can | recycle)

    # The ladder

    def _after_recycle(self) -> None:
        """An agent was recycled, and governor run, which did it, says whether it was compacted."""
        self._recycle.let_be()  # what is ordered now is of a guard that died
        if self._decisions.state.recycle.status is model.Status.RESTARTING:
            why = "nobody took its session up again" if self._guard.recycled is None else self._guard.recycled
            failed = model.Status.EXPIRED if self._guard.recycled is None else model.Status.FAILED
            self._deliveries.delivered(model.Tier.RECYCLE, failed if why else model.Status.DELIVERED, why)

    def sample(self, now_ns: int) -> None:
        """Look at its memory, and ask the ladder."""
        self._sampled_ns = now_ns
        self._count_oom_kills(now_ns)
        state = self._limits.memory_state(now_ns)
        if state is None:
            if not self._memcg.exists() and not self.gone:
                self.note("memcg_gone", "the memcg is gone: leaving")
                self.gone = self.leaving = True
            elif not self._unreadable:
                self.note("unreadable", "the memory of this memcg cannot be read: nothing is decided until it can")
            self._unreadable = True
            self._decisions.feed(model.Sampled(None, boottime_ns()))
            return
        self._unreadable = False
        if self._last is not None:
            grown_bytes = max(0, state.unreclaimable_bytes - self._last.unreclaimable_bytes)
            held = self._decisions.state.phase is Phase.HELD  # and says nothing of how it grows
            self._sampled_rate = None if held else grown_bytes * SECOND // max(1, now_ns - self._last_ns)
        self._last, self._last_ns = state, now_ns
        if self._decisions.state.phase in (Phase.WATCHING, Phase.PROBATION):
            self._attribution.look(now_ns)
        if (for_ns := self._veto.changed()) is not None:
            self.note("veto", f"nothing but the brake for {for_ns / SECOND:g} s" if for_ns else "the veto is over")
            self._decisions.feed(model.Vetoed(for_ns))
        own_bytes, below_bytes = self._attribution.agent_held_bytes()
        settles = self._decisions.state.recycle.status is model.Status.DELIVERED
        peak_bytes = below_bytes + peak_anonymous_bytes(self._agent.pid) if settles and self._agent.pid else 0
        self._decisions.feed(model.Sampled(state, boottime_ns(), own_bytes + below_bytes, peak_bytes))

    def _stepped(
        self,
        event: model.Event,
        before: model.State,
        after: model.State,
        instructions: Sequence[model.Instruction],
        at_ns: int,
    ) -> None:
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
            source=self.source,
            brake=BRAKE_NAMES[self._executor.brake],
            memory=None if self._unreadable else self._last,
            fill_rate_bytes=self._sampled_rate,
            level=self._level_heard,
            state=self._decisions.state,
            frozen_for_ns=tally.frozen_for_ns(self.slot, time.monotonic_ns()),
            decided=tally.decided(self.slot),
        )

    def known_as(self, container: Container) -> None:
        """More is known of the container than before, or the same."""
        self._container = container
        self._shared.tally.adopt(self.slot, self.standing().names, time.monotonic_ns())

    def late_ns(self, now_ns: int) -> int:
        """How long the next look at its memory is overdue; less than 0: it is not."""
        return now_ns - (self._sampled_ns or self._turned_ns) - self._interval_ns()

    def _first_line(self) -> dict[str, object]:
        return {"policy": plain(self._policy), "state": plain(self._decisions.state), "guard": asdict(self._guard)}

    def note(self, kind: str, text: str, **fields: object) -> None:
        """Say it to whoever reads standard error, the journal, subscribers and the person, each what is theirs."""
        say(text)
        self._journal.write(kind, text=text, **fields)
        if kind in SHOWN:
            self._person.show(kind, text, time.monotonic_ns())
        if kind in TOLD:
            self._subscribers.tell("event", kind=kind, text=printable(text))


def _megabytes(found: record.Record) -> str:
    held_mib = found.bound_pages * record.PAGE_BYTES / (1 << 20)
    return f"{held_mib:.1f} MiB of {found.max_pages * record.PAGE_BYTES >> 20} MiB ({100 * found.bound_ratio:.1f} %)"
