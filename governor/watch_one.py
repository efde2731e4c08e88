"""One memcg as `governor watch` follows it: by a running governor's socket, else by BPF, a PSI trigger, or looking.

Best first: who is governed is told of by its governor, at once and with what was decided and why. Else BPF programs
of our own, where they may be loaded and watch does not itself live off the memory in question. Else the kernel is
asked to wake us (a PSI trigger, `memory.events`), else it is looked at once a second, four times when max is near.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from governor import cgroup, guard_options, instance, record, status_cli, watch_place
from governor.attribution import Attribution
from governor.cgroup import Memcg
from governor.limits import Limits
from governor.poll_source import NAMES, PollSource
from governor.poller import Poller
from governor.watch_bpf import Crossings
from governor.watch_governor import Gone, GovernorLink
from governor.watch_model import LEVEL_WORDS, NOT_TOLD, NOT_YET, SECOND_NS, SILENT, Entry, Model, time_to_max_s
from governor.watch_sample import take
from governor.watch_target import Target

INTERVAL_NS = SECOND_NS
_HURRY_NS = 250_000_000
_STIRRED_NS = 100_000_000  # between two looks, however often the kernel wakes us
_NEAR_S, _NEAR_RATIO = 5.0, 0.3  # from max in time, and how full at least
_SEARCH_NS = 5 * SECOND_NS  # for a governor, while there is none
_BUDGET_NS = 3_000_000  # of one look at the processes
_UNTOLD = 8
SOURCES = ("auto", "bpf", "psi", "poll")


class NoBpf(Exception):
    """BPF programs were asked for, and cannot be had; says why."""


class One:
    """A memcg that is watched; reads only, and says what it sees through `on_entry`."""

    def __init__(
        self, target: Target, poller: Poller, wanted: str, on_entry: Callable[[Entry], None], brief: bool = False
    ) -> None:
        """Raises OSError when the target is no memcg that may be read. `wanted`: one of SOURCES.

        `brief`: for a look or two, for which nothing is loaded.
        """
        self.target = target
        self._poller, self._wanted, self._on_entry = poller, wanted, on_entry
        self._memcg = Memcg(target.path)
        self._limits = Limits(self._memcg)
        self.model = Model(target.name, target.path)
        self.due_ns = self.told_ns = 0
        self._governor: GovernorLink | None = None
        self._search_ns = 0
        self._bpf: Crossings | None = None
        self._bpf_fd = -1
        self._no_bpf = "none are loaded for so short a time" if brief else ""
        self._kernel: PollSource | None = None
        self._attribution = Attribution(target.path)
        self._agent_pid = self._looked_ns = 0
        self._victims: list[int] = []
        self._kills = 0  # of whose victims BPF has not told yet
        self._untold: deque[Entry] = deque(maxlen=_UNTOLD)  # crossings seen that a governor is yet to tell of
        self._told_last: tuple[str, bool] | None = None  # by a governor: level, and whether rising
        # Whose limits may kill here; 0: the machine's.
        self._ids = {0, *(each.cgroup_id for each in (self._memcg, *self._limits.above))}

    # What to go by

    def _find_governor(self, now_ns: int) -> None:
        if self._wanted != "auto" or self._governor or now_ns < self._search_ns:
            return
        self._search_ns = now_ns + _SEARCH_NS
        for path in sockets(self._memcg.cgroup_id):
            with suppress(OSError, status_cli.Unanswered):
                self._governor = GovernorLink(path)
                self._poller.register(self._governor.fd, lambda _: self._hear_governor())
                self.model.untold = NOT_YET if self._governor.asks else NOT_TOLD
                self._governor.ask()
                return

    @property
    def _is_told(self) -> bool:
        """Whether a governor is what to go by."""
        return self._governor is not None and not self._governor.is_silent

    def _choose(self) -> None:
        """The best source there is; what it is not is closed."""
        if self._is_told:
            self._close_bpf()
            self._close_kernel()
        elif not self._bpf and not self._no_bpf and self._wanted in ("auto", "bpf"):
            self._no_bpf = self._bpf_refused()
            if not self._no_bpf:
                self._bpf = Crossings(time.monotonic_ns())
        if self._no_bpf and self._wanted == "bpf":
            raise NoBpf(self._no_bpf)
        has_bpf = self._bpf is not None and bool(self._bpf.how)
        if not self._is_told and not has_bpf and not self._kernel:
            with_psi = self._wanted != "poll"
            self._kernel = PollSource(self._limits, self._poller, with_psi, 0, lambda _: self._on_stir())
        if has_bpf:
            self._close_kernel()
        self._say_source()

    def _bpf_refused(self) -> str:
        for memcg in (self._limits.own, *self._limits.above):
            if not memcg.v1 and cgroup.is_inside(cgroup.memcg_of("self"), memcg.path):
                return "watch itself runs in there, and compiling would take 160 MiB of it"
        return watch_place.no_room() or guard_options.bpf_refused(self._memcg.v1)

    def _say_source(self) -> None:
        if self._governor and self._is_told:
            told = "" if self._governor.asks else ", which does not tell this user how it stands"
            source = f"governor {self._governor.pid}{told}"
        elif self._bpf and self._bpf.how:
            source = f"bpf ({self._bpf.how}), programs of its own"
        else:
            name = NAMES[self._kernel.name] if self._kernel else "poll"
            why = "; BPF programs are loading" if self._bpf else f"; no BPF: {self._no_bpf}" if self._no_bpf else ""
            source = f"{name}{why}"
        if source != self.model.source:
            self.model.source = source
            self._say(Entry(time.time(), "source", source))

    # Looking

    def turn(self, now_ns: int) -> None:
        """A look, and all that is due with it; raises NoBpf."""
        if self._bpf and self._bpf.opened():
            self._no_bpf = self._bpf.failed
            if self._bpf.how:
                self._bpf_fd = self._bpf.fd
                self._poller.register(self._bpf_fd, lambda _: self._hear_bpf())
            else:
                self._close_bpf()
            self._choose()
        if not self._governor and now_ns >= self._search_ns and not self.model.gone:
            self._find_governor(now_ns)
            self._choose()
        if self._governor:
            self._governor.ask()
            self._heed_silence(self._governor)
        limits = (self._limits.own, *self._limits.above)
        charged = self._bpf.charged_pages([each.cgroup_id for each in limits]) if self._bpf else {}
        seen = self._limits.look(now_ns)
        sample = take(self._limits, now_ns, seen)
        if sample is None:
            self.due_ns = now_ns + INTERVAL_NS
            if not self.model.gone:
                self._close_kernel()  # its descriptors would be ready for ever
                self._tell_kills()
                self._say(Entry(time.time(), "gone", "the memcg is gone"))
            self.model.see(None)
            return
        if self._bpf:
            self._bpf.watch(seen, self.model.levels, charged, now_ns)
        before = self.model.sample
        crossed = self.model.see(sample, self._look_at_processes(now_ns))
        if not self._is_told:
            self._find_victims(before.events if before else sample.events, sample.events)
        if crossed and not (self._bpf and self._bpf.how):
            entry = _crossing(*crossed, sample.memory.unreclaimable_bytes, sample.memory.max_bytes)
            if not self._is_told:
                self._say(entry)
            elif crossed != self._told_last:
                self._untold.append(entry)
        to_max_s = time_to_max_s(sample, self.model.fill_rate_bytes)
        near = to_max_s is not None and to_max_s < _NEAR_S and sample.memory.unreclaimable_ratio >= _NEAR_RATIO
        self.due_ns = now_ns + (_HURRY_NS if near else INTERVAL_NS)

    def _look_at_processes(self, now_ns: int) -> list[Any]:
        agent_pid = int((self.model.standing or {}).get("agent_pid") or 0)
        if agent_pid != self._agent_pid:
            self._agent_pid, self._attribution = agent_pid, Attribution(self.target.path, agent_pid)
        if now_ns - self._looked_ns < _STIRRED_NS:
            return list(self.model.processes)
        self._looked_ns = now_ns
        self._attribution.look(now_ns, _BUDGET_NS)
        return self._attribution.held()

    def _find_victims(self, before: Any, after: Any) -> None:
        has_waited = self._kills > 0
        self._kills += after.get("oom_kill", 0) - before.get("oom_kill", 0)
        if self._victims or has_waited or not self._bpf:  # the kernel counts a kill before BPF hears whose it is
            self._tell_kills()

    def _tell_kills(self) -> None:
        if kills := self._kills:
            victims, self._victims, self._kills = self._victims, [], 0
            pids = f": {', '.join(f'process {pid}' for pid in victims)}" if victims else ""
            text = f"the kernel's OOM killer: {kills} process{'es' * (kills > 1)} killed here{pids}"
            self._say(Entry(time.time(), "oom_kill", text, {"pids": victims, "kills": kills}))

    # Hearing

    def _on_stir(self) -> None:
        now_ns = time.monotonic_ns()
        if self._kernel:
            self._kernel.stirred(now_ns)
        self._soon(now_ns)

    def _soon(self, now_ns: int) -> None:
        last = self.model.sample
        self.due_ns = min(self.due_ns, max(now_ns, (last.at_ns if last else 0) + _STIRRED_NS))

    def _hear_bpf(self) -> None:
        now_ns = time.monotonic_ns()
        for found in self._bpf.drain() if self._bpf else ():
            if found.kind == record.OOM_KILL and found.cgroup_id in self._ids:
                self._victims.append(found.pid)
            elif found.kind == record.CROSSING:
                size = record.PAGE_BYTES
                self._say(
                    _crossing(
                        *(record.LEVEL_NAMES[found.level], found.rising),
                        *(found.bound_pages * size, found.max_pages * size, found.pid),
                    )
                )
            self._soon(now_ns)

    def _hear_governor(self) -> None:
        if self._governor is None:
            return
        try:
            lines, standings = self._governor.drain()
        except Gone as gone:
            self._say_untold()
            self._say(Entry(time.time(), "governor_gone", f"governor {self._governor.pid}: {gone}"))
            self._close_governor()
            self._choose()
            return
        self._heed_silence(self._governor)
        for line in lines:
            if line.get("type") == "memory":
                figures = (line["unreclaimable_bytes"], line["max_bytes"])
                self._told_last = line["level"], line["rising"]
                self._untold.clear()
                self._say(_crossing(*self._told_last, *figures))
            elif line.get("type") == "event":
                self._say(Entry(time.time(), line["kind"], line["text"]))
        if standings is not None:
            self._untold.clear()  # it is awake, and would have told
        if lines:
            self._governor.ask()  # what has been decided, and why
            self._soon(time.monotonic_ns())
        for standing in standings or ():
            if standing.get("cgroup_id") == self._memcg.cgroup_id:
                self.model.name = status_cli.name_of(standing)
                if entry := self.model.govern(standing):
                    self._say(Entry(time.time(), entry.kind, entry.text))

    def _heed_silence(self, governor: GovernorLink) -> None:
        """Who does not answer is not gone by until it does; the link is kept, or it would be asked for ever anew."""
        if governor.is_silent == (self.model.untold == SILENT):
            return
        self.model.untold = SILENT if governor.is_silent else NOT_YET if governor.asks else NOT_TOLD
        if governor.is_silent:
            self._say_untold()
            self._say(Entry(time.time(), "governor_gone", f"governor {governor.pid}: it does not answer"))
            self.model.govern(None)
        self._choose()

    def _say_untold(self) -> None:
        """What was seen since its last answer: it takes three seconds to be known for silent."""
        while self._untold:
            self._say(self._untold.popleft())

    def _say(self, entry: Entry) -> None:
        self.model.note(entry)
        self._on_entry(entry)

    # Leaving

    def close(self) -> None:
        """Close everything; remove the programs."""
        self._close_governor()
        self._close_bpf()
        self._close_kernel()
        self._limits.close()
        self._memcg.close()

    def _close_governor(self) -> None:
        if self._governor:
            self._poller.unregister(self._governor.fd)
            self._governor.close()
            self._governor = None
            self.model.untold = ""
            self.model.govern(None)

    def _close_bpf(self) -> None:
        if self._bpf_fd >= 0:
            self._poller.unregister(self._bpf_fd)
            self._bpf_fd = -1
        if self._bpf:
            self._bpf.close()
            self._bpf = None

    def _close_kernel(self) -> None:
        if self._kernel:
            self._kernel.close()
            self._kernel = None


def sockets(cgroup_id: int) -> list[Path]:
    """Where the governor of a memcg may listen."""
    directories = [Path("/run/governor")]
    with suppress(OSError):
        directories.append(instance.run_directory())
    found = [directory / f"memcg-{cgroup_id}.sock" for directory in dict.fromkeys(directories)]
    return [path for path in found if path.exists()]


def _crossing(level: str, rising: bool, unreclaimable_bytes: int, max_bytes: int, pid: int = 0) -> Entry:
    way = "rising to" if rising else "falling to"
    share = f": {100 * unreclaimable_bytes / max_bytes:.1f} % of max" if max_bytes else ""
    whose = f", process {pid}" if pid else ""
    text = f"{way} {LEVEL_WORDS.get(level, level)}{share}{whose}"
    fields = {"level": level, "rising": rising, "unreclaimable_bytes": unreclaimable_bytes, "max_bytes": max_bytes}
    return Entry(time.time(), "crossing", text, fields | ({"pid": pid} if pid else {}))
