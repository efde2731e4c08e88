"""The governor process: one reflex, its BPF programs, and the memcgs that they protect, each a Target.

Of one guard (`guard_process`), or of a node's daemon (`node`). Everything that may take long runs in a child;
everything real-time runs in reflex. Nothing that goes wrong with one memcg or one action ends the loop.
"""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from governor import children, link, pins, poll_source, record
from governor.actions.commands import Commands
from governor.brake import KnobFile
from governor.container import Container
from governor.guard import Guard
from governor.health import Vitals
from governor.journal import Note, say
from governor.policy import SECOND, Policy, Source
from governor.poller import Poller
from governor.profile import Profile
from governor.programs import Programs
from governor.reflex_process import ReflexProcess
from governor.schedule import Schedule
from governor.shared import Shared
from governor.tally import Tally
from governor.target import Target
from governor.turns import Turns

_AFTER_FAULT_S = 0.1
_CALM_NS = 10_000_000  # between the turns of two targets that are calm, and
_CALM_RATIO = 10  # so many times what such a turn takes: however many there are, they take a tenth of a CPU at most
_LIVELY_RATIO = 3  # and those that are braked a third of one: what they decide, and their archives, need the rest
_AVERAGED = 32
_TURNS_NS = 50_000_000  # of turns, until whoever waits to be heard is
_HEARD_AT_ONCE = 1000  # of what reflex says
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Loop:
    """Everything that one governor protects; ends with its last target unless `is_lasting`."""

    def __init__(
        self, instance: str, knob_path: str, source: Source, bpf_refused: str = "", reflex_memcg: str = ""
    ) -> None:
        """`bpf_refused`: why the programs are not to be loaded, "" where they are to be tried. Raises OSError.

        `reflex_memcg`: the one that reflex lives in, "" for governor's own.
        """
        self._instance, self._source = instance, source
        self.is_lasting = False
        self.unload_at_end = False
        self.note: Note = lambda kind, text, **_: say(text)  # of what is no single target's
        self.reload: Callable[[], None] = lambda: None  # upon SIGHUP
        # Once a second at least; True: to be called again at once, after whoever waits to be heard.
        self.on_turn: Callable[[int], bool] = lambda now_ns: False
        self.protected: Callable[[], None] = lambda: None  # the protection of a target has begun
        self.status = 0  # to exit with
        self.poller = Poller()
        self.targets: dict[int, Target] = {}  # by slot
        self.tally = Tally()
        self._by_cgroup_id: dict[int, Target] = {}
        self._on_drop: dict[int, Callable[[], None]] = {}
        self._released: set[int] = set()  # slots that reflex has not let go of yet
        self._schedule: Schedule[int] = Schedule()  # of the slots
        self.knob_file = KnobFile(knob_path)
        pinned = pins.current(instance) if source in (Source.AUTO, Source.BPF) else None
        self._reflex = ReflexProcess(pinned, Path(knob_path), source.value, reflex_memcg)
        self._programs = Programs(instance, source, bpf_refused, self._reflex, lambda *a, **f: self.note(*a, **f))
        self.children = children.Children(self.poller)  # that act for no single target
        self._shared = Shared(
            self.poller,
            self.knob_file,
            Commands(),
            self._reflex.send,
            lambda: self.reflex_pid,
            self.tally,
            self._programs.source_name,
            lambda: self.protected(),
            lambda: len(self.targets) * max(_CALM_NS, _CALM_RATIO * self._turn_took_ns),
            lambda: _LIVELY_RATIO * sum(target.is_lively for target in self.targets.values()) * self._turn_took_ns,
            lambda: self._is_pressed,
            self.look_at,
            Turns(),
        )
        self._dropped = 0
        self._turn_took_ns = 0  # CPU time, the average of late
        self._had_bpf = False
        self._stopping = self._in_a_hurry = False
        self._is_pressed = False  # some wait to become targets

    # Targets

    def add(
        self,
        guard: Guard,
        slot: int,
        wanted: Policy,
        profile: Profile | None,
        on_drop: Callable[[], None] = lambda: None,
        container: Container | None = None,
    ) -> Target:
        """One more target; `on_drop` is called once it is one no more, before the end of the loop.

        Raises OSError where its memcg or its journal cannot be opened.
        """
        target = Target(guard, slot, wanted, profile, self._shared, container)
        self.targets[slot] = self._by_cgroup_id[target.cgroup_id] = target
        self._on_drop[slot] = on_drop
        self._schedule.set(slot, 0)
        try:
            target.begin()
        except BaseException:
            self._on_drop[slot] = lambda: None  # who asked hears of it by the exception
            self.drop(target)
            raise
        if self._reflex.pid is not None:
            target.adopt()
        return target

    def look_at(self, slot: int) -> None:
        """Something has happened to a target: look now."""
        self._schedule.set(slot, 0)

    def drop(self, target: Target) -> None:
        """Let go of it: its memcg is gone and what was to be done about that is done, or nobody wants it governed."""
        target.abandon()
        self._released.add(target.slot)  # until then what it holds stays written down, and nobody has the slot
        if not self._shared.send(link.encode_slot(link.RELEASE, target.slot)):
            self._free(target.slot)
        target.close()
        del self.targets[target.slot], self._by_cgroup_id[target.cgroup_id]
        self._schedule.drop(target.slot)
        self._on_drop.pop(target.slot)()

    def _free(self, slot: int) -> None:
        if slot in self._released:
            self._released.remove(slot)
            if slot not in self.targets:  # one that failed before it was written down left its slot free
                self.knob_file.release(slot)

    # What can be seen of it

    @property
    def reflex_pid(self) -> int:
        """Of the running reflex; 0: it does not run."""
        return self._reflex.pid or 0

    @property
    def is_stopping(self) -> bool:
        """Whether it only brings to its end what was begun."""
        return self._stopping

    def vitals(self, scanned: bool = True) -> Vitals:
        """How it is now; `scanned` as Vitals has it."""
        now_ns = time.monotonic_ns()
        return Vitals(
            reflex_runs=self._reflex.pid is not None,
            reflex_silent=self._reflex.silent(now_ns),
            had_bpf=self._had_bpf,
            has_bpf=not self._programs.lost,
            scanned=scanned,
            late_ns=max((target.late_ns(now_ns) for target in self.targets.values()), default=0),
            waiting=sum(not target.reports.is_answered for target in self.targets.values()),
        )

    # The loop

    def run(self) -> None:
        """Until SIGTERM or, with targets only, until the last one is gone; every knob is restored then."""
        self._catch_signals()
        self._shared.commands.sweep()
        try:
            self._keep_reflex(time.monotonic_ns())  # polls at once; compiling takes a while
            self._programs.load(self.children)
            while not self._is_over():
                try:
                    self._once()
                except Exception as error:  # noqa: BLE001  a fault of ours must not end the protection
                    self._fault(error, self.note)
                    time.sleep(_AFTER_FAULT_S)
        finally:
            self._end()

    def _is_over(self) -> bool:
        if self._stopping and (self._in_a_hurry or not any(t.finishing() for t in self.targets.values())):
            return True
        return not self.targets and not self.is_lasting

    def _once(self) -> None:
        now_ns = time.monotonic_ns()
        self._keep_reflex(now_ns)
        self.children.check_deadlines(now_ns)
        self._shared.archives.admit(now_ns)
        self._is_pressed = False
        try:
            self._is_pressed = self.on_turn(now_ns)
        except Exception as error:  # noqa: BLE001  what looks for further targets is not those that are there
            self._fault(error, self.note)
        # From here: whoever is held does not pay for those that are new.
        turns_until_ns = time.monotonic_ns() + _TURNS_NS
        for slot in self._schedule.due(now_ns):
            self._turn(self.targets[slot], now_ns)
            if time.monotonic_ns() > turns_until_ns:
                break
        next_ns = self._schedule.next_ns()
        until_ns = now_ns + SECOND if next_ns is None else min(next_ns, now_ns + SECOND)
        self.tally.turns.observe(time.monotonic_ns() - self.poller.woken_ns)
        self.poller.wait(0 if self._is_pressed else until_ns - time.monotonic_ns())

    def _turn(self, target: Target, now_ns: int) -> None:
        self._schedule.set(target.slot, now_ns + SECOND)  # whatever goes wrong
        begun_ns, least_ns = time.thread_time_ns(), 1
        try:
            target.turn(now_ns)
            self._turn_took_ns += (time.thread_time_ns() - begun_ns - self._turn_took_ns) // _AVERAGED
        except Exception as error:  # noqa: BLE001  one target's fault is no other's
            self._fault(error, target.note)
            least_ns = int(_AFTER_FAULT_S * SECOND)
        if target.gone and not target.finishing():
            self.drop(target)
        else:
            self._schedule.set(target.slot, max(target.due_ns, now_ns + least_ns))

    def _fault(self, error: Exception, note: Note) -> None:
        self.tally.faults += 1
        where = traceback.extract_tb(error.__traceback__)[-1]
        note("fault", f"{error!r} at {where.name}, line {where.lineno}: going on")

    def _catch_signals(self) -> None:
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (*_STOP_SIGNALS, signal.SIGHUP):
            signal.signal(number, lambda *_: None)
        self.poller.register(read_fd, self._on_signal)

    def _on_signal(self, fd: int) -> None:
        caught = os.read(fd, 64)
        if signal.SIGHUP in caught:
            self.reload()
        for number in set(caught) & set(_STOP_SIGNALS):
            self.note("stopping", f"{signal.Signals(number).name}: restoring and leaving")
            self._stop(in_a_hurry=self._stopping)

    def _stop(self, in_a_hurry: bool = False) -> None:
        self._stopping, self._in_a_hurry = True, in_a_hurry
        for target in self.targets.values():
            target.leaving = True

    def _end(self) -> None:
        for target in self.targets.values():
            target.abandon()
        self.children.abandon()
        self._reflex.stop()
        for told in self.knob_file.restore_all():
            self.note("restored", told)
        for target in self.targets.values():
            target.close()
        with suppress(OSError):
            Path(self.knob_file.path).unlink()
        if self.unload_at_end:
            with suppress(OSError):
                pins.unload(self._instance)

    # reflex

    def _keep_reflex(self, now_ns: int) -> None:
        if self._reflex.silent(now_ns):
            self._hear_reflex()  # it may be us who were slow
        if self._reflex.silent(now_ns):
            self.note("reflex_silent", "reflex says nothing any more: ending it")
            self._reflex_gone()
        if self._reflex.start(now_ns):
            self.tally.reflex_starts += 1
            self.poller.register(self._reflex.fd, lambda _: self._hear_reflex())
            for target in self.targets.values():
                target.adopt()
            self.note("reflex_started", f"reflex runs as process {self._reflex.pid}", pid=self._reflex.pid)

    def _reflex_gone(self) -> None:
        self.poller.unregister(self._reflex.fd)
        status = self._reflex.reap()
        restored = self.knob_file.restore_all()
        for slot in list(self._released):
            self._free(slot)
        undone = "; ".join(restored) or "nothing was braked"
        self.note("reflex_gone", f"reflex ended with status {status}: {undone}; starting it again", status=status)
        self.tally.released_all(time.monotonic_ns())
        for target in self.targets.values():
            target.reports.lost_reflex()

    def _hear_reflex(self) -> None:
        heard: list[link.FromReflex] = []
        then: Callable[[], None] = lambda: None  # noqa: E731
        try:
            while len(heard) < _HEARD_AT_ONCE and (said := self._reflex.receive()) is not None:
                heard.append(said)
        except EOFError:
            then = self._reflex_gone
        except ValueError as error:
            self.note("reflex_garbled", str(error))
        last = {said.slot: said for said in heard if isinstance(said, link.Braked)}
        for said in heard:
            target = self.targets.get(said.slot) if isinstance(said, link.Braked) else None
            try:
                if target and isinstance(said, link.Braked) and said is not last[said.slot]:
                    target.reports.braked_before(said)
                else:
                    self._on_reflex(said)
            except Exception as error:  # noqa: BLE001  of one target: the others are told of theirs
                self._fault(error, self.note)
        then()

    def _on_reflex(self, said: link.FromReflex) -> None:
        is_of_no_use = self._source is Source.BPF and self._programs.lost
        match said:
            case link.Heard(record=found, called_back_ns=called_back_ns):
                self.tally.heard(found, called_back_ns)
                if target := self._by_cgroup_id.get(found.cgroup_id):
                    target.reports.on_record(found, called_back_ns)
                    self._schedule.set(target.slot, target.due_ns)
                elif found.kind == record.OOM_KILL and not found.cgroup_id:
                    self.note("oom_kill", f"out of memory, the machine: the kernel chose process {found.pid}")
            case link.Adopted() | link.Source() if is_of_no_use:
                pass  # nobody is protected by who leaves
            case link.Braked(slot=slot) | link.Thawed(slot=slot) | link.Adopted(slot=slot) | link.Source(slot=slot):
                if (target := self.targets.get(slot)) is not None:
                    target.reports.on_said(said)
                    self._had_bpf |= target.reports.source == poll_source.NAMES[poll_source.BPF]
                    self._schedule.set(slot, target.due_ns)
            case link.Released(slot=slot):
                self._free(slot)
            case link.Refused(reason=reason):
                self._programs.refused(reason)
            case link.Alive() if is_of_no_use and not self._stopping:
                self.note("stopping", "source bpf allows nothing else: leaving")
                self.status = 1
                self._stop()
            case link.Alive(dropped=dropped) if dropped > self._dropped:
                self.note("dropped", f"the kernel lost {dropped - self._dropped} records: looking again")
                self.tally.dropped_records += dropped - self._dropped
                self._dropped = dropped
                for target in self.targets.values():
                    target.sample(time.monotonic_ns())
