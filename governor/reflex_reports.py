"""What reflex says of one governed memcg, brought to the ladder, the journal and people: brakes, thaws, crossings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from governor import link, model, poll_source, record
from governor.brake import BRAKE_NAMES, FREEZE
from governor.decisions import Decisions
from governor.executor import Executor
from governor.journal import Journal, Note
from governor.levels import CONFIRM_SLACK_RATIO
from governor.limits import Limits
from governor.model import Phase
from governor.policy import MINUTE, MS
from governor.sampling import Sampling
from governor.shared import Shared
from governor.subscribers import Subscribers

_HELD_BUDGET_NS = 100 * MS  # for finding out whose growth it is, while nothing grows


@dataclass(slots=True)
class ReflexReports:
    """On the memcg in one slot of the knob file."""

    slot: int
    shared: Shared
    limits: Limits
    sampling: Sampling
    decisions: Decisions
    executor: Executor
    subscribers: Subscribers
    journal: Journal
    note: Note
    say: Callable[[str], None]  # to people alone
    source: str = ""  # where crossings come from; not known before reflex has adopted the memcg
    is_answered: bool = False  # reflex has said whether it can watch it
    level: int = 0  # the last that was heard of
    _pretended_ns: int = 0  # when a dry run decided last
    _held_ns: int = 0  # when the last brake was confirmed

    def lost_reflex(self) -> None:
        """reflex ended, and its brake was undone."""
        self.is_answered = False
        if self.decisions.state.phase is Phase.HELD:
            self.decisions.feed(model.Thawed())

    def on_said(self, what: link.Braked | link.Thawed | link.Adopted | link.Source) -> None:
        """What was said of this slot."""
        self.is_answered |= isinstance(what, link.Adopted)
        match what:
            case link.Braked():
                self.shared.tally.braked(self.slot, what)
                self._on_braked(what)
            case link.Thawed(reason=reason, at_ns=at_ns):
                self.shared.tally.thawed(self.slot, at_ns, reason)
                self.note("thawed", f"thawed: {link.THAW_REASONS[reason]}", at_ns=at_ns)
                if reason != link.ASKED:
                    self.decisions.feed(model.Thawed())
            case link.Adopted(ok=True, source=source, brake=brake):
                self._protecting(source, brake)
                phase = self.decisions.state.phase
                if phase is not Phase.WATCHING or self.shared.knob_file.is_slot_turned(self.slot):
                    self.executor.levels_again(phase)  # and undo what an earlier run left
            case link.Adopted(ok=False):
                self.note("unprotected", "reflex cannot watch this memcg: only sampling is left")
            case link.Source(source=source, brake=brake):
                self._protecting(source, brake)

    def _protecting(self, source: int, brake: int) -> None:
        self.executor.brake, self.source = brake, poll_source.NAMES[source]
        if not self.sampling.looked_ns:
            self.executor.look()  # which limit counts
        limit = self.limits.describe()
        text = f"protecting: {self.shared.source_name(source)}; brake: {BRAKE_NAMES[brake]}; limit: {limit}"
        self.note("protecting", text, source=poll_source.NAMES[source], brake=BRAKE_NAMES[brake], limit=limit)
        self.shared.protected()

    def on_record(self, found: record.Record, called_back_ns: int) -> None:
        """A record of this memcg, or an OOM kill of nobody knows whom."""
        latency_ms = (called_back_ns - found.ktime_ns) / MS
        fields = {"record": found._asdict(), "called_back_ns": called_back_ns}
        if found.kind == record.OOM_KILL:
            whom = f"process {found.pid}" if found.pid else "a process here or in a memcg below"
            self.note("oom_kill", f"the kernel's OOM killer chose {whom}", **fields)
            return
        self.journal.write(record.KIND_NAMES.get(found.kind, "record"), **fields)
        if found.kind == record.STALL:
            self.decisions.feed(model.Stalled())
            self.sampling.looked_ns = 0  # look now
        if found.kind == record.CROSSING and found.level != self.level:
            way = f"{'rising' if found.rising else 'falling'} to level {record.LEVEL_NAMES[found.level]}"
            self.say(f"{way}: {_megabytes(found)}, heard after {latency_ms:.2f} ms")
            self.level = found.level
            self.sampling.looked_ns = 0
            self.subscribers.tell_level(found)
        if found.kind == record.CROSSING and found.rising and self.decisions.policy.dry_run:
            self._pretend(found)
        elif found.kind == record.CROSSING and found.rising and found.level >= record.LEVEL_BRAKE:
            held = self.decisions.state.held if self.decisions.state.phase is Phase.HELD else None
            if held and held.frozen and found.ktime_ns > self._held_ns + 20 * MS:
                self.decisions.feed(model.StillGrowing())

    def _pretend(self, found: record.Record) -> None:
        """In a dry run reflex holds nobody: what would follow a brake is decided, once a minute."""
        wanted, now_ns = self.decisions.policy.brake, time.monotonic_ns()
        early = bool(found.flags & record.HORIZON)
        is_wanted = wanted.enabled and (early or found.level >= record.LEVEL_BRAKE)
        if not is_wanted or (self._pretended_ns and now_ns - self._pretended_ns < MINUTE):
            return
        state = self.executor.look()
        least_ratio = wanted.early_ratio if early else wanted.engage_ratio
        if state and state.unreclaimable_ratio >= least_ratio - CONFIRM_SLACK_RATIO:
            self._pretended_ns = now_ns
            at = f"{100 * state.unreclaimable_ratio:.1f} % of {state.max_bytes >> 20} MiB"
            self.note("dry_run", f"dry run: would brake at {at}")
            growth = self.sampling.attribution.growth(now_ns, found.pid, _HELD_BUDGET_NS)
            trend = found.trend_bytes
            self.decisions.feed(model.Braked(state, trend, False, growth, found.fill_rate_bytes))

    def braked_before(self, braked: link.Braked) -> None:
        """A brake that another followed before governor had time to hear of it: only the last counts.

        Each would be archived, for a memcg that is as the last one says.
        """
        self.shared.tally.braked(self.slot, braked)
        self._note_braked(braked)

    def _on_braked(self, braked: link.Braked) -> None:
        self._held_ns = braked.frozen_ns
        self._note_braked(braked)
        trend = self.sampling.rate_bytes if braked.trend_bytes < 0 else braked.trend_bytes
        now_ns, attribution = time.monotonic_ns(), self.sampling.attribution
        growth = attribution.growth(now_ns, braked.charging_pid, _HELD_BUDGET_NS)
        since_first = attribution.since_first(now_ns)
        rate = None if braked.fill_rate_bytes < 0 else braked.fill_rate_bytes
        since = None if since_first == growth else since_first
        self.decisions.feed(model.Braked(braked.state, trend, braked.frozen, growth, rate, since))

    def _note_braked(self, braked: link.Braked) -> None:
        took = (
            f" {(braked.frozen_ns - braked.crossed_ns) / MS:.2f} ms after the crossing" if braked.crossed_ns else ""
        )
        how = "cannot be held"
        if braked.frozen:
            how = "frozen" if self.executor.brake == FREEZE else "stopped"
        by = f", charged by process {braked.charging_pid}" if braked.charging_pid else ""
        ratio, max_mib = braked.state.unreclaimable_ratio, braked.state.max_bytes >> 20
        text = f"braked: {how}{took} at {100 * ratio:.1f} % of {max_mib} MiB{by}"
        self.note("braked", text, **braked._asdict())


def _megabytes(found: record.Record) -> str:
    held_mib = found.bound_pages * record.PAGE_BYTES / (1 << 20)
    return f"{held_mib:.1f} MiB of {found.max_pages * record.PAGE_BYTES >> 20} MiB ({100 * found.bound_ratio:.1f} %)"
