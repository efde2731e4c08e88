"""The governor process of one memcg: samples, asks the ladder, carries out what it says, journals.

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
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import orjson

from governor import archive, children, ladder, link, pins, poll_source, probe, record, subtree
from governor.actions import processes
from governor.brake import BRAKE_NAMES, FREEZE, NONE, KnobFile
from governor.cgroup import Memcg, MemoryState, is_inside, memcg_of
from governor.journal import Journal, say
from governor.ladder import Phase
from governor.limits import Limits
from governor.policy import MS, SECOND, Policy
from governor.reflex_process import ReflexProcess
from governor.session_files import home_of, parse_pattern

_SAMPLE_NS = {
    Phase.WATCHING: 1000 * MS,
    Phase.HELD: 50 * MS,
    Phase.PROBATION: 100 * MS,
    Phase.TERMINATING: 50 * MS,
}
_SLOT = 0
_AFTER_FAULT_S = 0.1
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Guard:
    """What `governor guard` was asked to do."""

    cgroup: str
    instance: str
    knob_path: str
    archive_directory: str
    journal_path: str
    agent_pid: int | None = None
    unload_at_end: bool = True
    source: str = "auto"
    bpf_refused: str = ""  # why the programs are not to be loaded
    archive_globs: list[str] = field(default_factory=list)
    compact_argv: list[str] = field(default_factory=list)


class Loop:
    """One governed memcg."""

    def __init__(self, guard: Guard) -> None:
        """Raises OSError when the memcg or the journal cannot be opened."""
        self._guard = guard
        self._policy = replace(Policy(), compact_argv=tuple(guard.compact_argv))
        if guard.archive_globs:
            self._policy = replace(self._policy, archive_globs=tuple(guard.archive_globs))
        self._memcg = Memcg(guard.cgroup)
        self._limits = Limits(self._memcg)
        self._inside = is_inside(memcg_of("self", self._memcg.v1), guard.cgroup)
        self._brake = NONE
        self._journal = Journal(Path(guard.journal_path), guard.cgroup)
        self._knob_file = KnobFile(guard.knob_path)
        self._reflex = ReflexProcess(pins.current(guard.instance), Path(guard.knob_path), guard.source)
        self._state = ladder.State()
        self._poller = select.poll()
        self._children = children.Children(self._poller)
        self._agent_pidfd = -1
        self._agent_pid = 0
        self._patterns = [parse_pattern(glob, "/") for glob in self._policy.archive_globs if glob[0] != "~"]
        self._sampled_ns = 0
        self._last: MemoryState | None = None
        self._last_ns = 0
        self._sampled_rate: int | None = None  # bytes per second between the last two samples
        self._level_heard = 0
        self._held_ns = 0  # when the last brake was confirmed
        self._dropped = 0
        self._stopping = False
        self.status = 0  # to exit with

    # The loop

    def run(self) -> None:
        """Until SIGTERM or until the memcg is gone; every knob is restored then."""
        wake_fd = self._catch_signals()
        left_over = self._knob_file.knobs(_SLOT)
        if left_over is None:
            self._knob_file.adopt(_SLOT, self._guard.cgroup, self._memcg.cgroup_id)
        else:  # a brake that a killed governor left is held until reflex watches
            left_over.close()
        try:
            self._keep_reflex(time.monotonic_ns())  # polls at once; compiling takes a while
            self._load_programs()
            while not self._stopping:
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
        self._find_agent()
        self._children.check_deadlines(now_ns)
        if now_ns - self._sampled_ns >= _SAMPLE_NS[self._state.phase]:
            self._sample(now_ns)
        wait_ns = self._sampled_ns + _SAMPLE_NS[self._state.phase] - time.monotonic_ns()
        for fd, _ in self._poller.poll(max(0, wait_ns // MS + 1)):
            self._on_ready(fd, wake_fd)

    def _catch_signals(self) -> int:
        read_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in _STOP_SIGNALS:
            signal.signal(number, lambda *_: None)
        self._poller.register(read_fd, select.POLLIN)
        return read_fd

    def _on_ready(self, fd: int, wake_fd: int) -> None:
        if fd == wake_fd:
            caught = [number for number in os.read(fd, 64) if number in _STOP_SIGNALS]
            if caught:
                self._note("stopping", f"{signal.Signals(caught[0]).name}: restoring and leaving")
                self._stopping = True
        elif fd == self._reflex.fd:
            self._hear_reflex()
        elif fd == self._agent_pidfd:
            self._agent_ended()
        else:
            self._children.on_ready(fd)

    def _end(self) -> None:
        for what in self._children.abandon():
            self._note("abandoned", f"was still running: {what}")
        self._reflex.stop()
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
            self._reflex.send(link.encode_levels(link.ADOPT, _SLOT, self._policy.levels))
            self._tell_agent()
            self._note("reflex_started", f"reflex runs as process {self._reflex.pid}", pid=self._reflex.pid)

    def _tell_agent(self) -> None:
        pid = self._agent_pid if self._agent_pidfd >= 0 else 0
        self._reflex.send(link.encode_slot(link.AGENT, _SLOT, pid))

    def _load_programs(self) -> None:
        """Compile and attach in a child, beside the polling."""
        guard = self._guard
        if guard.source in ("psi", "poll") or pins.current(guard.instance):
            return
        if guard.bpf_refused:
            self._bpf_refused(guard.bpf_refused)
            return
        deadline_ns = time.monotonic_ns() + probe.LOAD_TIMEOUT_S * SECOND
        argv = tuple(probe.loader_command(guard.instance))
        self._start(lambda: children.spawn(argv, {}, deadline_ns, "loading the BPF programs"), self._loaded)

    def _loaded(self, ended: children.Ended) -> None:
        error = probe.parse_loaded(ended.output, ended.status).get("error")
        directory = pins.current(self._guard.instance)
        if error or not directory:
            self._bpf_refused("the loader was over its deadline" if ended.over_deadline else error or "no pins")
        else:
            self._reflex.open_pins(directory)

    def _bpf_refused(self, reason: str) -> None:
        self._note("bpf_refused", f"no BPF: {reason}")
        self._reflex.open_pins(None)
        if self._guard.source == "bpf":
            self._note("stopping", "--source bpf allows nothing else: leaving")
            self._stopping = True
            self.status = 1

    def _protecting(self, source: int, brake: int) -> None:
        self._brake = brake
        how = ""
        if source == poll_source.BPF and (directory := pins.current(self._guard.instance)):
            how = f" ({pins.attached(directory).get(pins.REQUIRED_MODULE, 'detached')})"
        name = {poll_source.BPF: "BPF", poll_source.PSI: "psi and polling"}.get(source, "polling")
        self._memcg_state()  # which limit counts
        limit = self._limits.describe()
        text = f"protecting: {name}{how}; brake: {BRAKE_NAMES[brake]}; limit: {limit}"
        self._note("protecting", text, source=poll_source.NAMES[source], brake=BRAKE_NAMES[brake], limit=limit)

    def _memcg_state(self) -> MemoryState | None:
        return self._limits.memory_state(time.monotonic_ns())

    def _kill_all(self) -> None:
        """SIGKILL to the whole memcg; where governor may not freeze that, to the agent's own processes."""
        if self._brake == FREEZE:
            processes.kill_memcg(self._guard.cgroup)
            return
        for stat in subtree.members(self._agent_pid, self._guard.cgroup, os.getpid()):
            subtree.send(stat.pid, stat.start_ticks, signal.SIGKILL)

    def _kill_bursting(self, max_bytes: int) -> Iterator[processes.Process]:
        if self._brake == FREEZE:
            yield from processes.kill_bursting(self._guard.cgroup, self._agent_pid, max_bytes)
            return
        for stat in subtree.members(self._agent_pid, self._guard.cgroup, os.getpid()):
            process = processes.read_process(stat.pid)
            if not process or stat.pid == self._agent_pid:
                continue
            bursting = process.rss_bytes > processes.BURSTING_RATIO * max_bytes
            if bursting and subtree.send(stat.pid, stat.start_ticks, signal.SIGKILL):
                yield process

    def _reflex_gone(self) -> None:
        self._poller.unregister(self._reflex.fd)
        status = self._reflex.reap()
        restored = self._knob_file.restore_all()
        undone = "; ".join(restored) or "nothing was braked"
        self._note("reflex_gone", f"reflex ended with status {status}: {undone}; starting it again", status=status)
        if self._state.phase is Phase.HELD:
            self._feed(ladder.Thawed())

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
                    self._feed(ladder.Thawed())
            case link.Adopted(ok=True, source=source, brake=brake):
                self._protecting(source, brake)
                self._carry_out(ladder.UsualLevels())  # and undo what an earlier run left
            case link.Adopted(ok=False):
                self._note("unprotected", "reflex cannot watch this memcg: only sampling is left")
            case link.Source(source=source, brake=brake):
                self._protecting(source, brake)
            case link.Refused(reason=reason):
                self._bpf_refused(reason)
            case link.Alive(dropped=dropped) if dropped > self._dropped:
                self._note("dropped", f"the kernel lost {dropped - self._dropped} records: looking again")
                self._dropped = dropped
                self._sample(time.monotonic_ns())

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
        if found.kind == record.CROSSING and found.level != self._level_heard:
            way = f"{'rising' if found.rising else 'falling'} to level {record.LEVEL_NAMES[found.level]}"
            say(f"{way}: {_megabytes(found)}, heard after {latency_ms:.2f} ms")
            self._level_heard = found.level
        if found.kind == record.CROSSING and found.rising and found.level >= record.LEVEL_BRAKE:
            held = self._state.held if self._state.phase is Phase.HELD else None
            if held and held.frozen and found.ktime_ns > self._held_ns + 20 * MS:
                self._feed(ladder.StillGrowing())

    def _on_braked(self, braked: link.Braked) -> None:
        self._held_ns = braked.frozen_ns
        took = (
            f" {(braked.frozen_ns - braked.crossed_ns) / MS:.2f} ms after the crossing" if braked.crossed_ns else ""
        )
        how = "cannot be held"
        if braked.frozen:
            how = "frozen" if self._brake == FREEZE else "stopped"
        self._note(
            "braked",
            f"braked: {how}{took} at {100 * braked.state.unreclaimable_ratio:.1f} % of "
            f"{braked.state.max_bytes >> 20} MiB"
            + (f", charged by process {braked.charging_pid}" if braked.charging_pid else ""),
            **braked._asdict(),
        )
        rate = self._sampled_rate if braked.fill_rate_bytes < 0 else braked.fill_rate_bytes
        self._feed(ladder.Braked(braked.state, rate, braked.frozen))

    # The agent

    def _find_agent(self) -> None:
        if self._agent_pidfd >= 0:
            return
        if self._inside:
            found: object = subtree.oldest_other(self._guard.cgroup, os.getpid())
        else:
            found = processes.leader(self._guard.cgroup)
        pid = self._guard.agent_pid or getattr(found, "pid", 0)
        if not pid:
            return
        try:
            self._agent_pidfd = os.pidfd_open(pid)
        except OSError:
            self._guard = replace(self._guard, agent_pid=None)  # it ended: whoever leads the memcg now
            return
        self._agent_pid = pid
        self._poller.register(self._agent_pidfd, select.POLLIN)
        self._tell_agent()
        home = home_of(pid)
        globs = self._policy.archive_globs
        self._patterns = [parse_pattern(glob, home) for glob in globs]
        self._note("agent", f"the agent is process {pid}", pid=pid, archive=globs)

    def _agent_ended(self) -> None:
        self._poller.unregister(self._agent_pidfd)
        os.close(self._agent_pidfd)
        self._agent_pidfd = -1
        self._tell_agent()
        was = self._state.phase
        self._note(
            "agent_ended",
            f"the agent (process {self._agent_pid}) ended",
            pid=self._agent_pid,
            phase=was.value,
        )
        if was is Phase.TERMINATING:
            self._kill_all()  # what is left of it
        self._feed(ladder.AgentEnded())

    # The ladder

    def _sample(self, now_ns: int) -> None:
        self._sampled_ns = now_ns
        state = self._limits.memory_state(now_ns)
        if state is None:
            if not self._memcg.exists():
                self._note("memcg_gone", "the memcg is gone: leaving")
                self._stopping = True
            return
        if self._last is not None:
            grown_bytes = max(0, state.unreclaimable_bytes - self._last.unreclaimable_bytes)
            self._sampled_rate = grown_bytes * SECOND // max(1, now_ns - self._last_ns)
        self._last, self._last_ns = state, now_ns
        self._feed(ladder.Sampled(state))

    def _feed(self, event: ladder.Event) -> None:
        before = self._state
        self._state, instructions = ladder.step(before, event, time.monotonic_ns(), self._policy)
        if self._state.phase is not before.phase:
            self._journal.write("phase", before=before.phase.value, now=self._state.phase.value)
        for instruction in instructions:
            self._carry_out(instruction)

    def _carry_out(self, instruction: ladder.Instruction) -> None:
        name = type(instruction).__name__.lower()
        self._journal.write("instruction", instruction=name, **asdict(instruction))
        match instruction:
            case ladder.Archive(reason=reason):
                self._start_archive(reason)
            case ladder.Compact(reason=reason):
                self._start_compact(reason)
            case ladder.Brake():
                self._reflex.send(link.encode_slot(link.BRAKE, _SLOT))
            case ladder.Hold(for_ns=for_ns):
                self._reflex.send(link.encode_slot(link.PROLONG, _SLOT, time.monotonic_ns() + for_ns))
            case ladder.Thaw(brake_ppm=ppm, high_bytes=high_bytes, last_word=last_word, reason=reason):
                say(f"thaw: {reason}")
                if last_word and high_bytes and (knobs := self._knob_file.knobs(_SLOT)):
                    knobs.squeeze(
                        self._limits.own_high_bytes(high_bytes)
                    )  # here: it may take long, and reflex has no time
                    knobs.close()
                    high_bytes = 0
                high_bytes = -1 if high_bytes is None else high_bytes
                self._reflex.send(link.Thaw(_SLOT, ppm, high_bytes, False, last_word).encode())
            case ladder.UsualLevels():
                ppm = self._policy.levels.engage_ppm[record.LEVEL_BRAKE - 1]
                self._reflex.send(link.Thaw(_SLOT, ppm, -1, True, False).encode())
            case ladder.Terminate(reason=reason):
                self._terminate(reason)
            case ladder.Kill(reason=reason):
                self._note("killed", f"SIGKILL: {reason}")
                self._kill_all()

    def _terminate(self, reason: str) -> None:
        max_bytes = self._state.held.state.max_bytes if self._state.held else 0
        for process in self._kill_bursting(max_bytes):
            held_mib = process.rss_bytes >> 20
            self._note("killed", f"SIGKILL to process {process.pid} ({process.comm}), {held_mib} MiB")
        sent = self._agent_pidfd >= 0 and processes.ask_to_end(self._agent_pidfd, self._agent_pid)
        told = f"SIGTERM to the agent (process {self._agent_pid})" if sent else "the agent is not known"
        self._note("terminating", f"{told}: {reason}", sent=sent)
        self._feed(ladder.Signalled())

    # Children

    def _start_archive(self, reason: str) -> None:
        guard, policy, patterns = self._guard, self._policy, self._patterns
        facts = {
            "agent_pid": self._agent_pid,
            "ladder": self._state,
        }

        def work() -> bytes:
            manifest = archive.write(
                Path(guard.archive_directory),
                patterns,
                reason,
                guard.cgroup,
                facts,
                policy.archive_limit_bytes,
            )
            return orjson.dumps(
                {"name": manifest.name, "files": len(manifest.files), "skipped": len(manifest.skipped)}
            )

        deadline_ns = time.monotonic_ns() + policy.archive_deadline_ns
        self._start(lambda: children.fork(work, deadline_ns, f"archive: {reason}"), self._archive_ended)

    def _archive_ended(self, ended: children.Ended) -> None:
        if ended.ok:
            made = orjson.loads(ended.output)
            self._note("archived", f"archived {made['files']} session files as {made['name']}", **made)
            if not made["files"]:
                say(f"no session file was found for {self._policy.archive_globs}: name them with --archive")
        else:
            self._failed("archive", ended)
        self._feed(ladder.Archived(ended.ok))

    def _start_compact(self, reason: str) -> None:
        environment = {"GOVERNOR_CGROUP": self._guard.cgroup, "GOVERNOR_AGENT_PID": str(self._agent_pid)}
        deadline_ns = time.monotonic_ns() + self._policy.compact_deadline_ns
        self._note("compact", f"compact: {reason}", argv=self._policy.compact_argv)
        argv = self._policy.compact_argv
        self._start(lambda: children.spawn(argv, environment, deadline_ns, f"compact: {reason}"), self._compact_ended)

    def _compact_ended(self, ended: children.Ended) -> None:
        if ended.ok:
            self._note("compacted", "the compact command was delivered", output=ended.output.decode(errors="replace"))
        else:
            self._failed("compact", ended)
        self._feed(ladder.Compacted(ended.ok))

    def _start(self, make: Callable[[], children.Child], on_end: Callable[[children.Ended], None]) -> None:
        try:
            child = make()
        except OSError as error:  # no memory or no pid for a child: failed, like any other way to fail
            on_end(children.Ended(1, str(error).encode(), False))
        else:
            self._children.start(child, on_end)

    def _failed(self, name: str, ended: children.Ended) -> None:
        why = "was over its deadline" if ended.over_deadline else f"failed with status {ended.status}"
        output = ended.output.decode(errors="replace")
        fields = {"status": ended.status, "over_deadline": ended.over_deadline, "output": output}
        self._note(f"{name}_failed", f"{name} {why}: {output.strip()[-300:]}", **fields)

    def _note(self, kind: str, text: str, **fields: object) -> None:
        say(text)
        self._journal.write(kind, text=text, **fields)


def _megabytes(found: record.Record) -> str:
    held_mib = found.bound_pages * record.PAGE_BYTES / (1 << 20)
    return f"{held_mib:.1f} MiB of {found.max_pages * record.PAGE_BYTES >> 20} MiB ({100 * found.bound_ratio:.1f} %)"


def main() -> int:
    """Entry point: a JSON object with the fields of Guard as the only argument."""
    guard = Guard(**orjson.loads(sys.argv[1]))
    try:
        loop = Loop(guard)
    except OSError as error:
        say(f"cannot guard {guard.cgroup}: {error}")
        if guard.unload_at_end:
            pins.unload(guard.instance)
        return 1
    loop.run()
    return loop.status


if __name__ == "__main__":
    sys.exit(main())
