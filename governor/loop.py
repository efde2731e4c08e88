"""The governor process of one memcg: hears reflex, samples, asks the ladder, has it carried out, journals.

`governor guard` becomes this process by exec, so that the command line's imports do not stay resident. Everything
that may take long runs in a child; everything real-time runs in reflex. Nothing that goes wrong with one action
ends the loop.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import orjson

from governor import background, children, instance, link, model, pins, policy, poll_source, record
from governor.actions.commands import Commands
from governor.actions.processes import peak_anonymous_bytes
from governor.agent_process import AgentProcess
from governor.announce import SHOWN
from governor.attribution import Attribution
from governor.brake import BRAKE_NAMES, FREEZE, SLOT, KnobFile
from governor.cgroup import Memcg, MemoryState, is_inside, memcg_of
from governor.codec import plain
from governor.decisions import Decisions, boottime_ns
from governor.deliveries import Deliveries
from governor.executor import Executor
from governor.guard import Guard, read_policy, read_profile
from governor.journal import Journal, printable, say
from governor.limits import Limits
from governor.model import Phase
from governor.oom_kills import OomKills
from governor.person import Person
from governor.policy import MS, SECOND, Source
from governor.programs import Programs
from governor.recycle import Recycle
from governor.reflex_process import ReflexProcess
from governor.subscribers import TOLD, Subscribers
from governor.tiers import since
from governor.toml_file import FileError
from governor.veto import Veto

_SAMPLE_NS = {Phase.HELD: 50 * MS, Phase.PROBATION: 100 * MS, Phase.TERMINATING: 50 * MS}
_AFTER_FAULT_S = 0.1
_HELD_BUDGET_NS = 100 * MS  # for finding out whose growth it is, while nothing grows
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Loop:
    """One governed memcg."""

    def __init__(self, guard: Guard) -> None:
        """Raises OSError when the memcg or the journal cannot be opened, PolicyError for a bad policy."""
        self._guard = guard
        self._profile = read_profile(guard)
        self._policy = read_policy(guard, self._profile)
        self._memcg = Memcg(guard.cgroup)
        self._limits = Limits(self._memcg)
        self._journal = Journal(Path(guard.journal_path), guard.cgroup, self._first_line)
        self._knob_file = KnobFile(guard.knob_path)
        source = self._policy.signals.source
        pinned = pins.current(guard.instance) if source in (Source.AUTO, Source.BPF) else None
        self._reflex = ReflexProcess(pinned, Path(guard.knob_path), source.value)
        self._programs = Programs(guard.instance, source, guard.bpf_refused, self._reflex, self._note)
        self._poller = select.poll()
        is_within = is_inside(memcg_of("self", self._memcg.v1), guard.cgroup)
        match = self._profile.match if self._profile else None
        self._agent = AgentProcess(guard.cgroup, guard.agent_pid or 0, is_within, match, guard.only_pid)
        self._attribution = Attribution(guard.cgroup, guard.agent_pid or 0)
        self._veto = Veto(self._memcg.cgroup_id)
        self._children = children.Children(self._poller)
        self._commands = Commands()
        self._subscribers = Subscribers(self._poller, self._hello)
        self._subscribers.on_change = self._reachable
        self._decisions = Decisions(guard.cgroup, self._policy, self._agent, self._journal, self._note)
        self._deliveries = Deliveries(
            cgroup=guard.cgroup,
            agent=self._agent,
            knob_file=self._knob_file,
            children=self._children,
            commands=self._commands,
            subscribers=self._subscribers,
            note=self._note,
            feed=self._decisions.feed,
            limits=self._limits,
            profile=self._profile,
            channel=guard.channel,
        )
        self._subscribers.on_answer = self._deliveries.delivered
        self._recycle = Recycle(
            agent=self._agent,
            children=self._children,
            limits=self._limits,
            note=self._note,
            feed=self._decisions.feed,
            answered=lambda status, why: self._deliveries.delivered(model.Tier.RECYCLE, status, why),
            agent_bytes=lambda: sum(self._attribution.agent_held_bytes()),
            profile=self._profile,
            channel=guard.channel,
            program=guard.program,
            resume_path=guard.resume_path,
        )
        archives = Path(guard.archive_directory)
        self._executor = Executor(
            cgroup=guard.cgroup,
            archive_directory=archives,
            policy=self._policy,
            agent=self._agent,
            knob_file=self._knob_file,
            children=self._children,
            deliveries=self._deliveries,
            recycle=self._recycle,
            send=self._reflex.send,
            note=self._note,
            limits=self._limits,
            feed=self._decisions.feed,
            remembered=lambda: self._attribution.descendants(),
            profile=self._profile,
            program=guard.program,
            resume_path=guard.resume_path,
            fallbacks=[path for path in (instance.state_directory() / "archive",) if path != archives],
        )
        self._decisions.carry_out = self._executor.carry_out
        self._person = Person(self._children.attempt, lambda kind, text: self._journal.write(kind, text=text))
        self._turned_ns = time.monotonic_ns()  # the last turn of the loop
        self._sampled_ns = 0
        self._last: MemoryState | None = None
        self._last_ns = 0
        self._sampled_rate: int | None = None  # bytes per second between the last two samples
        self._unreadable = False
        self._level_heard = 0
        self._held_ns = 0  # when the last brake was confirmed
        self._dropped = 0
        self._kills = OomKills(guard.cgroup)
        self._ready_fd = guard.ready_fd
        self._stopping = self._in_a_hurry = False
        self.status = 0  # to exit with

    # The loop

    def run(self) -> None:
        """Until SIGTERM or until the memcg is gone; every knob is restored then."""
        wake_fd = self._catch_signals()
        left_over = self._knob_file.knobs(SLOT)
        if left_over is None:
            self._knob_file.adopt(SLOT, self._guard.cgroup, self._memcg.cgroup_id)
        else:  # a brake that a killed governor left is held until reflex watches
            left_over.close()
        self._commands.sweep()
        self._listen()
        self._find_agent(time.monotonic_ns())
        self._decisions.remember()
        self._reachable()
        self._journal.begin()
        self._after_recycle()
        try:
            self._keep_reflex(time.monotonic_ns())  # polls at once; compiling takes a while
            self._programs.load(self._children)
            while not self._stopping or self._finishing():
                try:
                    self._once(wake_fd)
                except Exception as error:  # noqa: BLE001  a fault of ours must not end the protection
                    where = traceback.extract_tb(error.__traceback__)[-1]
                    self._note("fault", f"{error!r} at {where.name}, line {where.lineno}: going on")
                    time.sleep(_AFTER_FAULT_S)
        finally:
            self._end()

    def _once(self, wake_fd: int) -> None:
        now_ns = time.monotonic_ns()
        self._keep_reflex(now_ns)
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
            self._sample(now_ns)
        wait_ns = self._sampled_ns + self._interval_ns() - time.monotonic_ns()
        for fd, _ in self._poller.poll(min(1000, max(0, wait_ns // MS + 1))):
            self._on_ready(fd, wake_fd)

    def _finishing(self) -> bool:
        """Whether to go on for the archive of an agent that has ended: who stops us with it must not lose that."""
        if self._in_a_hurry:
            return False
        if self._agent.pidfd < 0:
            return self._children.has_work()
        return bool(select.select([self._agent.pidfd], [], [], 0)[0])

    def _interval_ns(self) -> int:
        signals, state = self._policy.signals, self._decisions.state
        if (
            state.phase is Phase.PROBATION
            and since(state.probation_ns, boottime_ns()) > self._policy.brake.probation_ns
        ):
            return signals.raised_interval_ns  # full, but it has sat still for long
        usual_ns = signals.raised_interval_ns if self._is_raised() else signals.interval_ns
        return _SAMPLE_NS.get(state.phase, usual_ns)

    def _is_raised(self) -> bool:
        return self._last is not None and self._last.unreclaimable_ratio >= self._policy.compact.engage_ratio

    def _catch_signals(self) -> int:
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (*_STOP_SIGNALS, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self._poller.register(read_fd, select.POLLIN)
        return read_fd

    def _on_ready(self, fd: int, wake_fd: int) -> None:
        if fd == wake_fd:
            caught = os.read(fd, 64)
            if signal.SIGHUP in caught:
                self._read_policy_again()
            for number in set(caught) & set(_STOP_SIGNALS):
                self._note("stopping", f"{signal.Signals(number).name}: restoring and leaving")
                self._stopping, self._in_a_hurry = True, self._stopping
        elif fd == self._reflex.fd:
            self._hear_reflex()
        elif fd == self._agent.pidfd:
            self._agent_ended()
        elif not self._subscribers.on_ready(fd):
            self._children.on_ready(fd)

    def _read_policy_again(self) -> None:
        try:
            self._policy = self._executor.policy = self._decisions.policy = read_policy(self._guard, self._profile)
        except (FileError, OSError) as error:
            self._note("policy_refused", f"the policy stays as it was: {error}")
            return
        self._reflex.send(link.encode_levels(link.SET_LEVELS, SLOT, policy.levels(self._policy)))
        self._executor.levels_again(self._decisions.state.phase)
        if self._decisions.state.phase is Phase.HELD and not self._policy.brakes:
            self._executor.usual_levels()
            self._decisions.feed(model.Thawed())
        text = f"policy {self._policy.name!r} was read again from {self._guard.policy}"
        self._note("policy", text, path=self._guard.policy, policy=plain(self._policy))

    def _end(self) -> None:
        if self._agent.pid:
            self._recycle.let_be()
        for what in self._children.abandon():
            self._note("abandoned", f"was still running: {what}")
        self._reflex.stop()
        self._subscribers.close()
        for told in self._knob_file.restore_all():
            self._note("restored", told)
        with suppress(OSError):
            Path(self._guard.knob_path).unlink()
        if self._guard.unload_at_end:
            with suppress(OSError):
                pins.unload(self._guard.instance)

    # reflex

    def _keep_reflex(self, now_ns: int) -> None:
        if self._reflex.silent(now_ns):
            self._hear_reflex()  # it may be us who were slow
        if self._reflex.silent(now_ns):
            self._note("reflex_silent", "reflex says nothing any more: ending it")
            self._reflex_gone()
        if self._reflex.start(now_ns):
            self._poller.register(self._reflex.fd, select.POLLIN)
            self._reflex.send(link.encode_levels(link.ADOPT, SLOT, policy.levels(self._policy)))
            self._reflex.send(link.encode_slot(link.AGENT, SLOT, self._agent.pid))
            self._note("reflex_started", f"reflex runs as process {self._reflex.pid}", pid=self._reflex.pid)

    def _reflex_gone(self) -> None:
        self._poller.unregister(self._reflex.fd)
        status = self._reflex.reap()
        restored = self._knob_file.restore_all()
        undone = "; ".join(restored) or "nothing was braked"
        self._note("reflex_gone", f"reflex ended with status {status}: {undone}; starting it again", status=status)
        if self._decisions.state.phase is Phase.HELD:
            self._decisions.feed(model.Thawed())

    def _hear_reflex(self) -> None:
        try:
            while (said := self._reflex.receive()) is not None:
                self._on_reflex(said)
        except EOFError:
            self._reflex_gone()
        except ValueError as error:
            self._note("reflex_garbled", str(error))

    def _on_reflex(self, said: link.FromReflex) -> None:
        match said:
            case link.Heard(record=found, called_back_ns=called_back_ns):
                self._on_record(found, called_back_ns)
            case link.Braked():
                self._on_braked(said)
            case link.Thawed(reason=reason, at_ns=at_ns):
                self._note("thawed", f"thawed: {link.THAW_REASONS[reason]}", at_ns=at_ns)
                if reason != link.ASKED:
                    self._decisions.feed(model.Thawed())
            case link.Adopted(ok=True, source=source, brake=brake):
                self._protecting(source, brake)
                self._executor.levels_again(self._decisions.state.phase)  # and undo what an earlier run left
            case link.Adopted(ok=False):
                self._note("unprotected", "reflex cannot watch this memcg: only sampling is left")
            case link.Source(source=source, brake=brake):
                self._protecting(source, brake)
            case link.Refused(reason=reason):
                self._programs.refused(reason)
            case link.Alive() if self._policy.signals.source is Source.BPF and self._programs.lost:
                self._note("stopping", "source bpf allows nothing else: leaving")
                self._stopping, self.status = True, 1
            case link.Alive(dropped=dropped) if dropped > self._dropped:
                self._note("dropped", f"the kernel lost {dropped - self._dropped} records: looking again")
                self._dropped = dropped
                self._sample(time.monotonic_ns())

    def _protecting(self, source: int, brake: int) -> None:
        self._executor.brake = brake
        self._executor.look()  # which limit counts
        limit = self._limits.describe()
        text = f"protecting: {self._programs.source_name(source)}; brake: {BRAKE_NAMES[brake]}; limit: {limit}"
        self._note("protecting", text, source=poll_source.NAMES[source], brake=BRAKE_NAMES[brake], limit=limit)
        self._ready_fd = background.ready(self._ready_fd)

    def _on_record(self, found: record.Record, called_back_ns: int) -> None:
        latency_ms = (called_back_ns - found.ktime_ns) / MS
        fields = {"record": found._asdict(), "called_back_ns": called_back_ns}
        if found.kind == record.OOM_KILL:
            if found.cgroup_id in (0, self._memcg.cgroup_id):
                whom = f"process {found.pid}" if found.pid else "a process here or in a memcg below"
                self._note("oom_kill", f"the kernel's OOM killer chose {whom}", **fields)
            return
        if found.cgroup_id != self._memcg.cgroup_id:
            return
        self._journal.write(record.KIND_NAMES.get(found.kind, "record"), **fields)
        if found.kind == record.STALL:
            self._decisions.feed(model.Stalled())
            self._sampled_ns = 0  # look now
        if found.kind == record.CROSSING and found.level != self._level_heard:
            way = f"{'rising' if found.rising else 'falling'} to level {record.LEVEL_NAMES[found.level]}"
            say(f"{way}: {_megabytes(found)}, heard after {latency_ms:.2f} ms")
            self._level_heard = found.level
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
        self._note("braked", text, **braked._asdict())
        trend = self._sampled_rate if braked.trend_bytes < 0 else braked.trend_bytes
        growth = self._attribution.growth(time.monotonic_ns(), braked.charging_pid, _HELD_BUDGET_NS)
        rate = None if braked.fill_rate_bytes < 0 else braked.fill_rate_bytes
        self._decisions.feed(model.Braked(braked.state, trend, braked.frozen, growth, rate))

    # The agent

    def _find_agent(self, now_ns: int) -> None:
        calm = self._decisions.state.phase is Phase.WATCHING and not self._is_raised()
        if calm and self._agent.is_stand_in(now_ns):
            self._poller.unregister(self._agent.pidfd)
            self._agent.let_go()
        if self._stopping or not self._agent.find():
            return
        self._poller.register(self._agent.pidfd, select.POLLIN)
        self._attribution = Attribution(self._guard.cgroup, self._agent.pid)
        self._reflex.send(link.encode_slot(link.AGENT, SLOT, self._agent.pid))
        pid, globs = self._agent.pid, self._policy.archive.globs
        self._agent.patterns(globs)
        self._subscribers.allowed_uids |= self._agent.uids
        self._person.at(pid, self._guard.channel)
        self._reachable()
        self._note("agent", f"the agent is process {pid}", pid=pid, archive=globs)
        if pid == 1:
            say("nobody inside a container may stop or kill its process 1: only its tools can be held and killed")
        self._deliveries.ask_again(self._guard.resume_path)

    def _agent_ended(self) -> None:
        self._poller.unregister(self._agent.pidfd)
        pid, state = self._agent.pid, self._decisions.state
        self._note("agent_ended", f"the agent (process {pid}) ended", pid=pid, phase=state.phase.value)
        self._executor.sweep(state)
        self._subscribers.drop_requests()
        self._decisions.feed(model.AgentEnded())
        self._count_oom_kills(time.monotonic_ns())
        self._executor.archive_the_end(state, self._kills.what_killed(time.monotonic_ns()))
        self._recycle.leave()
        self._agent.forget()
        self._reachable()
        self._reflex.send(link.encode_slot(link.AGENT, SLOT, 0))

    def _count_oom_kills(self, now_ns: int) -> None:
        if text := self._kills.look(now_ns):
            self._note("oom_kills", text)

    # Subscribers

    def _listen(self) -> None:
        path = instance.run_directory() / f"memcg-{self._memcg.cgroup_id}.sock"
        try:
            self._subscribers.listen(path)
        except OSError as error:
            self._note("no_socket", f"nobody can subscribe: {path}: {error.strerror}")

    def _hello(self) -> dict[str, object]:
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
            self._deliveries.delivered(
                model.Tier.RECYCLE, model.Status.FAILED if why else model.Status.DELIVERED, why
            )

    def _sample(self, now_ns: int) -> None:
        self._sampled_ns = now_ns
        self._count_oom_kills(now_ns)
        state = self._limits.memory_state(now_ns)
        if state is None:
            if not self._memcg.exists():
                self._note("memcg_gone", "the memcg is gone: leaving")
                self._stopping = True
            elif not self._unreadable:
                self._note("unreadable", "the memory of this memcg cannot be read: nothing is decided until it can")
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
            self._note("veto", f"nothing but the brake for {for_ns / SECOND:g} s" if for_ns else "the veto is over")
            self._decisions.feed(model.Vetoed(for_ns))
        own_bytes, below_bytes = self._attribution.agent_held_bytes()
        settles = self._decisions.state.recycle.status is model.Status.DELIVERED
        peak_bytes = below_bytes + peak_anonymous_bytes(self._agent.pid) if settles and self._agent.pid else 0
        self._decisions.feed(model.Sampled(state, boottime_ns(), own_bytes + below_bytes, peak_bytes))

    def _first_line(self) -> dict[str, object]:
        return {"policy": plain(self._policy), "state": plain(self._decisions.state), "guard": asdict(self._guard)}

    def _note(self, kind: str, text: str, **fields: object) -> None:
        say(text)
        self._journal.write(kind, text=text, **fields)
        if kind in SHOWN:
            self._person.show(kind, text, time.monotonic_ns())
        if kind in TOLD:
            self._subscribers.tell("event", kind=kind, text=printable(text))


def _megabytes(found: record.Record) -> str:
    held_mib = found.bound_pages * record.PAGE_BYTES / (1 << 20)
    return f"{held_mib:.1f} MiB of {found.max_pages * record.PAGE_BYTES >> 20} MiB ({100 * found.bound_ratio:.1f} %)"


def main() -> int:
    """Entry point: a JSON object with the fields of Guard as the only argument."""
    guard = Guard(**orjson.loads(sys.argv[1]))
    if guard.ready_fd >= 0:
        os.set_inheritable(guard.ready_fd, False)
    try:
        loop = Loop(guard)
    except (OSError, FileError) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        say(f"cannot guard {guard.cgroup}: {why}")
        if guard.unload_at_end:
            pins.unload(guard.instance)
        return 1
    loop.run()
    return loop.status


if __name__ == "__main__":
    sys.exit(main())
