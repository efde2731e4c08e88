"""What the ladder knows of one memcg: fed with events, each step journaled, kept in a file, and carried out.

The ladder itself is pure (`ladder.step`); what it decides is done by whoever `carry_out` is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence

from governor import ladder, model, state_file
from governor.agent_process import AgentProcess
from governor.announce import Warnings
from governor.journal import Journal, Note
from governor.policy import SECOND, Policy
from governor.subtree import read_stat
from governor.tiers import since

_JOURNALED_NS, _JOURNALED_RATIO = 60 * SECOND, 0.01  # samples that change nothing are journaled so seldom
_CACHE_NS, _CACHE_RATIO = 10 * SECOND, 0.05  # or when that much more or less of max is used, but never sooner

# The event, the state before and after it, what was decided, and when
OnStep = Callable[[model.Event, model.State, model.State, Sequence[model.Instruction], int], None]


class Decisions:
    """The ladder's state of one governed memcg, and its policy."""

    def __init__(self, target: str, policy: Policy, agent: AgentProcess, journal: Journal, note: Note) -> None:
        """Knows nothing of an earlier governor before remember()."""
        self.policy = policy
        self.state = model.State()
        self.carry_out: Callable[[model.Instruction, model.State], None] = lambda *_: None
        self.on_step: OnStep = lambda *_: None  # hears of each step before it is carried out
        self._target, self._agent = target, agent
        self._journal, self._note = journal, note
        self._path = state_file.path_for(target)
        self._journaled_ns: int | None = None
        self._journaled_ratio = self._journaled_usage_ratio = 0.0
        self._left_out: tuple[model.Sampled, int] | None = None  # the last sample that was not journaled, and when
        self._save_failed = False
        self._warnings = Warnings()
        self._remembers = False  # before, nothing may be saved over what an earlier governor knew

    def remember(self) -> None:
        """What an earlier governor knew of this target. What it had under way is not taken up again."""
        saved, warning = state_file.load(self._path, self._target)
        if warning:
            self._note("state_aside", warning)
        if saved:
            same_agent = saved.agent == self._agent.identity or (not self._agent.pid and _is_there(*saved.agent))
            self.state = ladder.resumed(saved.state, same_agent, boottime_ns())
        self._remembers = True

    def reachable(self, can: Collection[model.Tier]) -> None:
        """Tell the ladder what the agent can be asked for."""
        if not self._remembers:
            return
        for tier in model.Tier:
            if getattr(self.state, tier.value).reachable != (tier in can):
                self.feed(model.Reachable(tier, tier in can))

    def feed(self, event: model.Event) -> None:
        """Ask the ladder; journal and save what it says, and have it carried out."""
        before, at_ns = self.state, boottime_ns()
        self.state, instructions = ladder.step(before, event, at_ns, self.policy)
        worth, has_changed = self._worth_a_line(event, at_ns), self.state != before
        if has_changed or instructions or worth:
            self._write_where_it_rose_from(event, before)
            self._write(event, at_ns, before, self.state, instructions)
        elif isinstance(event, model.Sampled):
            self._left_out = event, at_ns
        if has_changed:
            self._save()
        self.on_step(event, before, self.state, instructions, at_ns)
        ended: list[str] = []
        if has_changed or instructions:
            ended = self._warnings.over(before, self.state, instructions, at_ns)  # what is carried out may feed more
        for instruction in instructions:
            try:
                self.carry_out(instruction, self.state)
            except Exception as error:  # noqa: BLE001  one that fails must not keep the others from being done
                self._note("fault", f"{error!r}: {type(instruction).__name__} was not carried out")
        for text in ended if not self.policy.dry_run else ():
            self._note("warning_over", text)

    def _write(
        self,
        event: model.Event,
        at_ns: int,
        before: model.State,
        after: model.State,
        instructions: Sequence[model.Instruction] = (),
    ) -> None:
        self._journal.write(
            "step",
            event=type(event).__name__,
            of=event,
            now_ns=at_ns,
            phase=after.phase.value,
            rule=ladder.rule(before.phase, event, after.phase, tuple(instructions)),
            instructions=[{type(each).__name__: each} for each in instructions],
        )

    def _write_where_it_rose_from(self, event: model.Event, before: model.State) -> None:
        """The sample before a jump: without it a burst would seem to begin a minute early, at the last line."""
        left_out, self._left_out = self._left_out, None
        if left_out is None or not isinstance(event, model.Sampled | model.Braked) or event.state is None:
            return
        sample, at_ns = left_out
        now_ratio = event.state.unreclaimable_ratio
        if sample.state and now_ratio - sample.state.unreclaimable_ratio >= _JOURNALED_RATIO:
            self._write(sample, at_ns, before, before)

    def _worth_a_line(self, event: model.Event, at_ns: int) -> bool:
        if not isinstance(event, model.Sampled) or event.state is None:
            return not isinstance(event, model.Sampled)
        ratio, usage_ratio = event.state.unreclaimable_ratio, event.state.usage_bytes / max(1, event.state.max_bytes)
        moved = abs(ratio - self._journaled_ratio) >= _JOURNALED_RATIO
        cache_moved = abs(usage_ratio - self._journaled_usage_ratio) >= _CACHE_RATIO
        age_ns = since(self._journaled_ns, at_ns)
        if not moved and age_ns < (_CACHE_NS if cache_moved else _JOURNALED_NS):
            return False
        self._journaled_ns, self._journaled_ratio, self._journaled_usage_ratio = at_ns, ratio, usage_ratio
        return True

    def _save(self) -> None:
        try:
            state_file.save(self._path, state_file.Saved(self._target, self._agent.identity, self.state))
            self._save_failed = False
        except (OSError, TypeError, ValueError) as error:  # what cannot be saved must not keep us from acting
            if not self._save_failed:
                self._note("state_not_saved", f"the state cannot be saved: {error}; going on without it")
            self._save_failed = True


def _is_there(pid: int, start_ticks: int) -> bool:
    """Whether that process still runs: an agent that is yet to be found is most likely the same as before."""
    stat = read_stat(pid)
    return stat is not None and stat.start_ticks == start_ticks and not stat.ended


def boottime_ns() -> int:
    """The ladder's clock: it goes on while the machine sleeps, and is not set."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
