"""Whoever acts on one governed memcg and its agent, tied together, and what all of them have under way.

Decides nothing: what is to be done the ladder says, and `executor` has it done.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from governor import instance, model
from governor.agent_process import AgentProcess
from governor.archiving import Archiving
from governor.children import Children
from governor.decisions import Decisions
from governor.deliveries import Deliveries
from governor.executor import Executor
from governor.guard import Guard
from governor.inside_guard import InsideGuard
from governor.journal import Note
from governor.limits import Limits
from governor.profile import Profile
from governor.recycle import Recycle
from governor.sampling import Sampling
from governor.shared import Shared
from governor.subscribers import Subscribers


class Actuators:
    """Of one governed memcg; each tells the ladder what becomes of what it does."""

    def __init__(
        self,
        guard: Guard,
        slot: int,
        profile: Profile | None,
        limits: Limits,
        agent: AgentProcess,
        decisions: Decisions,
        sampling: Sampling,
        shared: Shared,
        note: Note,
        say: Callable[[str], None],
    ) -> None:
        self._guard, self._slot, self._limits, self._agent = guard, slot, limits, agent
        self._decisions, self._shared, self._note = decisions, shared, note
        self.children = Children(shared.poller, shared.archives)
        self.subscribers = Subscribers(shared.poller, self._hello)
        self.deliveries = Deliveries(
            cgroup=guard.cgroup,
            slot=slot,
            agent=agent,
            knob_file=shared.knob_file,
            children=self.children,
            commands=shared.commands,
            subscribers=self.subscribers,
            note=note,
            feed=decisions.feed,
            limits=limits,
            profile=profile,
            channel=guard.channel,
        )
        self.subscribers.on_change, self.subscribers.on_answer = self.reachable, self.deliveries.delivered
        self.inside: InsideGuard | None = None
        if guard.is_container:
            self.inside = InsideGuard(limits.own, shared.poller, self.children.attempt, note)
            self.inside.on_change, self.inside.on_answer = self.reachable, self.deliveries.delivered
            self.deliveries.inside = self.inside
        self.recycle = Recycle(
            agent=agent,
            children=self.children,
            limits=limits,
            note=note,
            feed=decisions.feed,
            answered=lambda status, why: self.deliveries.delivered(model.Tier.RECYCLE, status, why),
            agent_bytes=lambda: sum(sampling.attribution.agent_held_bytes()),
            profile=profile,
            channel=guard.channel,
            program=guard.program,
            resume_path=guard.resume_path,
        )
        self.executor = Executor(
            cgroup=limits.own.own_path,
            slot=slot,
            policy=decisions.policy,
            agent=agent,
            knob_file=shared.knob_file,
            children=self.children,
            deliveries=self.deliveries,
            archiving=Archiving(
                cgroup=guard.cgroup,
                directory=Path(guard.archive_directory),
                agent=agent,
                children=self.children,
                note=note,
                say=say,
            ),
            recycle=self.recycle,
            send=shared.send,
            note=note,
            say=say,
            limits=limits,
            feed=decisions.feed,
            remembered=lambda: sampling.attribution.descendants(),
            left_of=sampling.left_of,
            profile=profile,
            program=guard.program,
            resume_path=guard.resume_path,
        )
        decisions.carry_out = self.executor.carry_out

    def listen(self) -> None:
        """Let who subscribes connect."""
        path = instance.run_directory() / f"memcg-{self._limits.cgroup_id}.sock"
        try:
            self.subscribers.listen(path)
        except OSError as error:
            self._note("no_socket", f"nobody can subscribe: {path}: {error.strerror}")

    def _hello(self) -> dict[str, object]:
        self._shared.look_at(self._slot)
        return {"cgroup": self._guard.cgroup, "agent_pid": self._agent.pid}

    def reachable(self) -> None:
        """Tell the ladder what the agent can be asked for now."""
        recycle = {model.Tier.RECYCLE} if self._agent.pid and self._agent.known and self.recycle.possible else set()
        self._decisions.reachable(self.deliveries.can | recycle)

    @property
    def are_idle(self) -> bool:
        """Whether nobody has a deadline, and nobody listens."""
        none_asked = self.subscribers.are_none and (self.inside is None or self.inside.are_none)
        return not self.recycle.awaits_end and self.children.are_none and none_asked

    def prolong(self, by_ns: int) -> None:
        """The target was frozen for so long: whoever delivers to a frozen agent has to wait."""
        self.children.prolong(by_ns)
        self.subscribers.prolong(by_ns)
        self.recycle.prolong(by_ns)
        if self.inside:
            self.inside.prolong(by_ns)

    def check_deadlines(self, now_ns: int) -> None:
        """End what is over its time; a guard inside has a turn of its own."""
        self.children.check_deadlines(now_ns)
        self.subscribers.check_deadlines(now_ns)
        self.recycle.check_deadline(now_ns)

    def drop_requests(self) -> None:
        """The agent has ended: nobody can answer for it any more."""
        self.subscribers.drop_requests()
        if self.inside:
            self.inside.drop_requests()

    def abandon(self) -> None:
        """Start nothing more, and end what was started."""
        if self._agent.pid:
            self.recycle.let_be()
        for what in self.children.abandon():
            self._note("abandoned", f"was still running: {what}")

    def close(self) -> None:
        """Hang up on everybody."""
        if self.inside:
            self.inside.close(in_silence=True)
        self.subscribers.close()
