"""Looks at the memory of one governed memcg, as often as it matters, and tells the ladder what it sees.

Whose growth it is, what the kernel's OOM killer took, and a person's veto are looked at along with it.
"""

from __future__ import annotations

import time
from collections.abc import Collection

from governor import model
from governor.actions.processes import peak_anonymous_bytes
from governor.agent_process import AgentProcess
from governor.attribution import Attribution
from governor.cgroup import MemoryState
from governor.decisions import Decisions, boottime_ns
from governor.journal import Note
from governor.limits import Limits
from governor.model import Phase
from governor.oom_kills import OomKills
from governor.policy import MS, SECOND
from governor.shared import Shared
from governor.tiers import since
from governor.veto import Veto

_SAMPLE_NS = {Phase.HELD: 50 * MS, Phase.PROBATION: 100 * MS, Phase.TERMINATING: 50 * MS}


class Sampling:
    """Of one governed memcg: its last sample, and what is remembered from look to look."""

    def __init__(
        self,
        limits: Limits,
        slot: int,
        agent: AgentProcess,
        agent_pid: int,
        decisions: Decisions,
        shared: Shared,
        note: Note,
    ) -> None:
        """`agent_pid` is the one that governor was given, 0 for none."""
        self.gone = False  # the memcg is
        self.looked_ns = 0  # 0: look now
        self.rate_bytes: int | None = None  # per second, between the last two samples
        self.attribution = Attribution(limits.own.own_path, agent_pid)
        self._limits, self._slot, self._agent = limits, slot, agent
        self._decisions, self._shared, self._note = decisions, shared, note
        self._veto = Veto(limits.cgroup_id)
        self._kills = OomKills(limits.own.path)
        self._last: MemoryState | None = None
        self._last_ns = 0
        self._unreadable = False

    @property
    def memory(self) -> MemoryState | None:
        """As it was last seen; None where it cannot be read now."""
        return None if self._unreadable else self._last

    @property
    def is_raised(self) -> bool:
        """Whether the last sample was at the first tier's level."""
        return (
            self._last is not None and self._last.unreclaimable_ratio >= self._decisions.policy.compact.engage_ratio
        )

    @property
    def interval_ns(self) -> int:
        """From the last look to the next."""
        policy, state = self._decisions.policy, self._decisions.state
        if state.phase is Phase.PROBATION and since(state.probation_ns, boottime_ns()) > policy.brake.probation_ns:
            return policy.signals.raised_interval_ns  # full, but it has sat still for long
        if state.phase in _SAMPLE_NS:
            return max(_SAMPLE_NS[state.phase], self._shared.lively_interval_ns())
        if self.is_raised:
            return policy.signals.raised_interval_ns
        return max(policy.signals.interval_ns, self._shared.calm_interval_ns())

    def found_agent(self) -> None:
        """Follow the processes from this agent on."""
        self.attribution = Attribution(self._limits.own.own_path, self._agent.pid)

    def look(self, now_ns: int) -> None:
        """Look at its memory, and ask the ladder."""
        self.looked_ns = now_ns
        self._count_oom_kills(now_ns)
        state = self._limits.memory_state(now_ns)
        if state is None:
            self._cannot_read()
            return
        self._unreadable = False
        if self._last is not None:
            grown_bytes = max(0, state.unreclaimable_bytes - self._last.unreclaimable_bytes)
            held = self._decisions.state.phase is Phase.HELD  # and says nothing of how it grows
            self.rate_bytes = None if held else grown_bytes * SECOND // max(1, now_ns - self._last_ns)
        self._last, self._last_ns = state, now_ns
        if self._decisions.state.phase in (Phase.WATCHING, Phase.PROBATION):
            self.attribution.look(now_ns)
        if (for_ns := self._veto.changed()) is not None:
            self._note("veto", f"nothing but the brake for {for_ns / SECOND:g} s" if for_ns else "the veto is over")
            self._decisions.feed(model.Vetoed(for_ns))
        own_bytes, below_bytes = self.attribution.agent_held_bytes()
        settles = self._decisions.state.recycle.status is model.Status.DELIVERED
        peak_bytes = below_bytes + peak_anonymous_bytes(self._agent.pid) if settles and self._agent.pid else 0
        answered_for = self._limits.own_part(state)
        if self._decisions.state.phase in (Phase.WATCHING, Phase.PROBATION):  # while it is held it grows no more
            state = answered_for
        self._decisions.feed(model.Sampled(state, boottime_ns(), own_bytes + below_bytes, peak_bytes))

    def _cannot_read(self) -> None:
        if not self._limits.own.exists() and not self.gone:
            self._note("memcg_gone", "the memcg is gone: leaving")
            self.gone = True
        elif not self._unreadable:
            self._note("unreadable", "the memory of this memcg cannot be read: nothing is decided until it can")
        self._unreadable = True
        self._decisions.feed(model.Sampled(None, boottime_ns()))

    def left_of(self, shed: Collection[tuple[int, int]]) -> model.Growth:
        """How the others have grown in this run of brakes, now that these processes are being killed."""
        now_ns = time.monotonic_ns()
        self.attribution.look(now_ns)
        self.attribution.shed(shed)
        return self.attribution.since_first(now_ns)

    def what_killed(self, now_ns: int) -> str:
        """By which kind of OOM kill a process that ended now can have ended; "" for none."""
        self._count_oom_kills(now_ns)
        return self._kills.what_killed(now_ns)

    def _count_oom_kills(self, now_ns: int) -> None:
        before = self._kills.count
        if text := self._kills.look(now_ns):
            self._shared.tally.oom_killed(self._slot, self._kills.count - before)
            self._note("oom_kills", text)
