"""Carries out what the ladder asks for, and reports what became of it as further events. Decides nothing.

Whatever may take long runs in a child with a deadline. Nothing that goes wrong with one action is raised.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import orjson

from governor import announce, cut_turn, link, model, record, resume, subtree, told
from governor.actions import processes, termination_log
from governor.agent_process import AgentProcess
from governor.archiving import Archiving
from governor.brake import FREEZE, NONE, KnobFile
from governor.cgroup import MemoryState
from governor.children import Children, Ended, fork
from governor.codec import plain
from governor.deliveries import Deliveries
from governor.journal import Note
from governor.limits import Limits
from governor.model import Status, Tier
from governor.policy import SECOND, Efficacy, Policy, levels
from governor.profile import Profile
from governor.recycle import Recycle
from governor.subtree import memcg_pids

_TERMINATION_LOG_NS = 5 * SECOND
_KILL_NS = 10 * SECOND
_KILLED_HERE = 500  # of so many processes at most: some 20 ms
_NAMED = 8  # of those killed


class _Killed(NamedTuple):
    """How many were killed, and of the first ones pid, name and bytes resident."""

    number: int
    first: list[tuple[int, str, int]]

    @classmethod
    def of(cls, found: Iterable[processes.Process]) -> _Killed:
        everybody = list(found)
        return cls(len(everybody), [(one.pid, one.comm, one.rss_bytes) for one in everybody[:_NAMED]])

    @property
    def more(self) -> int:
        """Beside the first ones."""
        return self.number - len(self.first)

    def __str__(self) -> str:
        names = ", ".join(f"{comm} ({pid}, {held_bytes >> 20} MiB)" for pid, comm, held_bytes in self.first)
        return names + (f" and {self.more} more" if self.more else "")


@dataclass(slots=True)
class Executor:
    """The hands of one governed memcg; `feed` hands an event to the ladder."""

    cgroup: str
    slot: int
    policy: Policy
    agent: AgentProcess
    knob_file: KnobFile
    children: Children
    send: Callable[[bytes], bool]  # to reflex
    note: Note
    say: Callable[[str], None]
    limits: Limits
    feed: Callable[[model.Event], None]
    remembered: Callable[[], Collection[tuple[int, int]]]  # what ever descended from the agent, adopted or not
    left_of: Callable[[Collection[tuple[int, int]]], model.Growth]  # how others grew, once these are shed
    deliveries: Deliveries
    archiving: Archiving
    recycle: Recycle
    profile: Profile | None  # of the agent
    resume_path: str
    program: str  # the agent's, as governor run was given it
    brake: int = NONE  # what reflex can do to it, and with it who may be killed
    _raised: link.Thaw | None = None  # the levels that reflex was last given beside the usual ones

    def carry_out(self, instruction: model.Instruction, state: model.State) -> None:
        """Begin it; what takes time reports later. In a dry run only say what would be done."""
        if self.policy.dry_run:
            self._pretend(instruction)
            return
        match instruction:
            case model.Archive(reason=reason):
                self._archive(reason, state)
            case model.Deliver(tier=Tier.RECYCLE, reason=reason):
                self._prepare(reason, state)
            case model.Restart(reason=reason):
                self.recycle.restart(reason, self.policy)
            case model.Withheld(tier=tier, reason=reason):
                self.note("withheld", f"no {tier.value}: {reason}", tier=tier.value)
            case model.Deliver(tier=tier, reason=reason):
                wanted = self.policy.compact if tier is Tier.COMPACT else self.policy.clear
                self.deliveries.deliver(tier, reason, wanted)
            case model.HoldNow():
                self.send(link.encode_slot(link.BRAKE, self.slot))
            case model.Prolong(for_ns=for_ns):
                self.send(link.encode_slot(link.PROLONG, self.slot, time.monotonic_ns() + for_ns))
            case model.Squeeze(high_bytes=high_bytes):
                own_bytes = self.limits.own_share_bytes(high_bytes)
                if self._squeeze(own_bytes):
                    self.say(f"throttled above {own_bytes >> 20} MiB: it grows although it is frozen")
            case model.Thaw():
                self._thaw(instruction)
            case model.UsualLevels():
                self.usual_levels()
            case model.Shed():
                self._shed(instruction, state)
            case model.Terminate(reason=reason):
                self._terminate(reason, state)
            case model.Kill(reason=reason):
                self.note("killed", f"SIGKILL: {reason}")
                self._kill_all()
            case model.Warn(what=what, in_ns=in_ns):
                inside = self.deliveries.inside
                on_node = inside is not None and what not in {tier.value for tier in inside.can}
                self.note("warning", announce.of_a_warning(instruction, on_node), what=what, in_ns=in_ns)
            case model.Settled(tier=tier, freed_bytes=freed_bytes, useless=useless):
                verdict = "no use" if useless else "of use"
                self.note("settled", f"{tier.value} freed {freed_bytes / (1 << 20):.1f} MiB: {verdict}")
            case model.NothingLeft(reason=reason):
                self.note("nothing_left", f"NOTHING LEFT TO DO: {reason}")

    def look(self) -> MemoryState | None:
        """A fresh look at its memory, by the limit that counts; None when it is gone."""
        return self.limits.memory_state(time.monotonic_ns())

    def usual_levels(self) -> None:
        """Undo throttle and raised levels; whatever the policy says now, it may have said something else before."""
        self._raised = None
        ppm = levels(self.policy).engage_ppm[record.LEVEL_BRAKE - 1]
        self.send(link.Thaw(self.slot, ppm, -1, True, False).encode())

    def levels_again(self, phase: model.Phase) -> None:
        """After reflex was given the usual levels: those of a probation or a termination, which only reflex knew."""
        if phase is model.Phase.WATCHING or not self.policy.brakes:
            self.usual_levels()
        elif phase is not model.Phase.HELD:
            last_ppm = round(self.policy.terminate.last_ratio * record.PPM)
            ends = phase is model.Phase.TERMINATING
            raised = self._raised or link.Thaw(self.slot, last_ppm, 0, False, ends)
            self.send(raised._replace(high_bytes=0).encode())

    def _pretend(self, instruction: model.Instruction) -> None:
        name = type(instruction).__name__.lower()
        self.note("dry_run", f"dry run: would {name}", **plain(instruction))
        match instruction:
            case model.Deliver(tier=tier):
                self.feed(model.Answered(tier, Status.UNAVAILABLE))
            case model.Archive():
                self.feed(model.Archived(True, self.look()))
            case model.Terminate():
                self.feed(model.AgentEnded())
            case model.Thaw() | model.UsualLevels():  # held before the policy became a dry run
                self.usual_levels()

    def _thaw(self, thaw: model.Thaw) -> None:
        if not self.policy.brakes:  # held before the policy said so
            self.usual_levels()
            return
        self.say(f"thaw: {thaw.reason}")
        high_bytes = -1 if thaw.high_bytes is None else thaw.high_bytes
        if high_bytes > 0:
            as_own = self.limits.own_share_bytes if thaw.last_word else self.limits.own_high_bytes
            own_bytes = as_own(high_bytes)
            if own_bytes < self.limits.own_usage_bytes() and self._squeeze(own_bytes):
                high_bytes = 0
        self._raised = link.Thaw(self.slot, thaw.brake_ppm, high_bytes, False, thaw.last_word)
        self.send(self._raised.encode())

    def _squeeze(self, own_bytes: int) -> bool:
        """memory.high under the usage; here: it may take long, and reflex has no time."""
        if own_bytes <= 0 or (knobs := self.knob_file.knobs(self.slot)) is None:
            return False
        was_set = knobs.squeeze(own_bytes)
        knobs.close()
        return was_set

    # Tier 3

    def _prepare(self, reason: str, state: model.State) -> None:
        self.deliveries.lift_high()  # a throttled agent ends late
        self.note("deliver", f"recycle: {reason}", tier=Tier.RECYCLE.value)
        why = "before the agent is recycled"
        self.recycle.prepare(self.policy.recycle.deadline_ns, lambda then: self._archive(why, state, then=then))

    def _archive(
        self, reason: str, state: model.State, is_last: bool = False, then: Callable[[bool], None] | None = None
    ) -> None:
        """`then` is told whether it went well, instead of the ladder."""
        self.archiving.begin(self.policy.archive, reason, state, then or self._archived, is_last)

    def _archived(self, is_well: bool) -> None:
        self.feed(model.Archived(is_well, self.look()))

    def _shed(self, shed: model.Shed, state: model.State) -> None:
        self.note("shedding", f"shed: {shed.reason}", pid=shed.culprit_pid)
        culprit, agent_pid = (shed.culprit_pid, shed.culprit_start_ticks), self.agent.pid
        self._kill(
            lambda: processes.kill_tree(self.cgroup, *culprit, (agent_pid,), shed.members, agent_pid),
            lambda killed: self._was_shed(killed, shed, state),
        )

    def _was_shed(self, killed: _Killed | None, shed: model.Shed, state: model.State) -> None:
        if killed is None:
            return  # what memory does shows whether it helped
        self.note(
            "shed",
            f"SIGKILL to {killed if killed.number else 'nobody: it had ended'}",
            pids=[pid for pid, *_ in killed.first],
        )
        self.feed(model.Shedded(killed.number, self.left_of(shed.members)))
        if killed.number:
            max_bytes = state.held.state.max_bytes if state.held else 0
            text = told.of_a_shed([comm for _, comm, _ in killed.first], shed, max_bytes, killed.more)
            self.note_told(text)
            if self.policy.shed.tell:
                self.deliveries.tell(text)

    def note_told(self, text: str, **fields: object) -> None:
        """What the agent should know, for its next tool and whoever else asks."""
        self.note("told", text, **fields)
        with suppress(OSError):  # no run-time directory: the journal has it, and whoever subscribed
            told.write(self.limits.cgroup_id, text)

    def _terminate(self, reason: str, state: model.State) -> None:
        max_bytes = state.held.state.max_bytes if state.held else 0
        spared, agent, own_pid = self._spared(), self.agent.identity, os.getpid()

        def kill() -> Iterable[processes.Process]:
            within_reach = (process for process in self._within_reach(own_pid) if process.pid not in spared)
            return processes.kill_bursting(within_reach, agent[0], max_bytes)

        def then(killed: _Killed | None) -> None:
            if killed and killed.number:
                self.note("killed", f"SIGKILL to {killed}")
            if self.agent.identity == agent:  # it may have ended meanwhile
                self._ask_to_end(reason)

        self.order_resume(reason)
        self._kill(kill, then)

    def _ask_to_end(self, reason: str) -> None:
        pid, message = self.agent.pid, f"governor: terminated: {reason}"

        door, lives_elsewhere = self.agent.way_in(), self.agent.lives_elsewhere

        def tell() -> bytes:
            if lives_elsewhere and not door:  # nor is ours its termination log
                return b""
            written = termination_log.write_inside(message, door) if door else termination_log.write(message, pid)
            return b"written" if written else b""

        deadline_ns = time.monotonic_ns() + _TERMINATION_LOG_NS
        self.children.attempt(
            lambda: fork(tell, deadline_ns, "the termination log", keep=door.fds if door else ()),
            self._termination_log_ended,
        )
        sent = self.agent.ask_to_end()
        if not sent and self.resume_path:
            resume.withdraw(self.resume_path)
        whom = f"SIGTERM to the agent (process {pid})" if sent else "the agent is not known"
        self.note("terminating", f"{whom}: {reason}", sent=sent)
        self.feed(model.Signalled(self.look()))

    def order_resume(self, reason: str) -> None:
        """The agent is about to be terminated: while it lives, as at its end it may forget its session."""
        self._resume(resume.TERMINATED, reason)
        if self.deliveries.inside:
            self.deliveries.inside.tell("ending", reason=reason)

    def _resume(self, how: str, why: str) -> None:
        """Have the agent's session taken up again after its end, if somebody does that and it is known how."""
        profile, agent, wanted = self.profile, self.agent.known, self.policy.recycle
        if self.recycle.awaits_end:  # and so its session goes on compacted, whatever ends it
            self.recycle.leave()
            return
        if not (self.resume_path and profile and agent):
            return
        path = self.resume_path
        compacting_ns = 0 if wanted.efficacy is Efficacy.USELESS else wanted.compacting_ns
        try:
            is_ordered = resume.order_session(path, how, why, profile, agent, self.program, compacting_ns)
            if is_ordered and cut_turn.ended(path, profile, agent):
                self.note("turn_cut_off", "its turn was cut off: it is asked for again once, when it is resumed")
        except (OSError, ValueError) as error:
            resume.withdraw(path)
            self.note("not_resumed", f"the agent will not be resumed: {error}")

    def _kill(
        self, kill: Callable[[], Iterable[processes.Process]], then: Callable[[_Killed | None], None] = lambda _: None
    ) -> None:
        """`then` hears who was hit, None if that is not known; at once where few can be, else a child takes its time.

        Not so where governor is among them: a child would not know whom of its own to spare, and nobody else waits.
        """
        pids = memcg_pids(self.cgroup)
        if len(pids) <= _KILLED_HERE or os.getpid() in pids:
            then(_Killed.of(kill()))
            return

        def ended(how: Ended) -> None:
            if not how.ok:
                self.note("fault", f"not all were killed: {how.why}")
            then(_Killed(*orjson.loads(how.output)) if how.ok else None)

        deadline_ns = time.monotonic_ns() + _KILL_NS
        work = lambda: orjson.dumps(tuple(_Killed.of(kill())))  # noqa: E731
        try:
            child = fork(work, deadline_ns, f"SIGKILL among {len(pids)} processes")
        except OSError:  # no pid or memory for it, which may be what they took
            then(_Killed.of(kill()))
        else:
            self.children.start(child, ended)

    def _within_reach(self, own_pid: int) -> list[processes.Process]:
        """The whole memcg; where governor may not freeze that, the agent's own processes."""
        if self.brake == FREEZE:
            return processes.processes(self.cgroup)
        return [processes.process_of(stat) for stat in subtree.members(self.agent.pid, self.cgroup, own_pid)]

    def _spared(self) -> list[int]:
        """A `governor run` in there whose guard stands back: it brings the session back."""
        return self.deliveries.inside.family(self.agent.pid) if self.deliveries.inside else []

    def _kill_all(self) -> None:
        """SIGKILL to the whole memcg; where governor may not freeze that, to the agent's own processes."""
        spared = self._spared()
        if self.brake == FREEZE and spared:
            self._kill(lambda: processes.kill_all_but(self.cgroup, spared))
        elif self.brake == FREEZE:
            processes.kill_memcg(self.cgroup)
        else:
            own = (*self.remembered(), self.agent.identity)
            agent_pid = self.agent.pid
            self._kill(lambda: processes.kill_tree(self.cgroup, 0, 0, (), own, agent_pid))

    def _termination_log_ended(self, ended: Ended) -> None:
        if not ended.ok:
            self.note("termination_log_failed", f"the termination log cannot be written: {ended.why}")

    def sweep(self, state: model.State) -> None:
        """What a terminated agent leaves behind has no further grace."""
        if state.phase is model.Phase.TERMINATING and self.policy.terminate.sweep and not self.policy.dry_run:
            self._kill_all()

    def _sweep_by_name(self) -> None:
        """What its profile says outlives an agent: in the whole memcg where that is governor's, else of its own."""
        names = self.profile.session.sweep if self.profile else ()
        own = None if self.brake == FREEZE else self.remembered()
        if names:
            self._kill(lambda: processes.kill_named(self.cgroup, names, own), self._were_swept)

    def _were_swept(self, killed: _Killed | None) -> None:
        if killed and killed.number:
            self.note("killed", f"SIGKILL to {killed}, which outlived the agent")

    def archive_the_end(self, state: model.State, killed_by: str) -> None:
        """What the handler of a terminated agent wrote, or what is left of one that the kernel killed.

        `killed_by` says by which OOM kill, "" if it was none. The next agent's first archive is a full one.
        """
        if state.phase is model.Phase.TERMINATING:
            self._archive("after the agent's end", state, is_last=True)
        elif killed_by:
            self.note("oom_killed", f"the agent (process {self.agent.pid}) was killed: {killed_by}")
            if self.policy.dry_run:
                return
            self._sweep_by_name()
            self._archive(f"after the fact: {killed_by}", state, is_last=True)
            self._resume(resume.OOM_KILLED, killed_by)
        self.archiving.forget()
