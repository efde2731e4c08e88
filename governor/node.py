"""`governor daemon`: every container of a node that a policy selects, governed from outside.

Follows the containers, asks the policies, and adds a target to the loop for each that one selects; whoever is not
selected is not touched. What becomes of a target is the loop's; nothing here decides about memory.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from governor import cgroup, guard_options, instance, outside, pins, policy_directory, selection, state_file
from governor.census import Census, Known
from governor.container import Container
from governor.discovery import Gone
from governor.guard import Guard
from governor.journal import Journal, printable, say
from governor.loop import Loop
from governor.observation import Observation
from governor.policy import Policy, Source
from governor.policy_directory import PoliciesError

_DESCRIPTORS = 1 << 16  # a target has about ten
_JOURNALS, _JOURNALS_KEPT = "containers", 256
_AGAIN_NS = 30_000_000_000  # until a container that could not be governed is tried again
_CHOOSING_NS = 50_000_000  # at a time: a thousand new ones must not keep the loop from those that are there


@dataclass(frozen=True, slots=True)
class Wanted:
    """What `governor daemon` was asked to do; cli writes it, as JSON."""

    instance: str
    knob_path: str
    policies: str  # a directory
    state: str  # the directory of journals and archives
    cgroup_root: str = cgroup.ROOT
    host_root: str = "/"
    dry_run: bool = False
    source: str = Source.AUTO.value
    bpf_refused: str = ""  # why the programs are not to be loaded
    unload_at_end: bool = True
    listen: str = ""  # where /metrics, /healthz and /readyz are answered; "": nowhere


@dataclass(slots=True)
class _There:
    """A container that is there."""

    container: Container
    slot: int | None = None  # None: not governed
    again_ns: int | None = None  # it should be, and could not be: to be tried again then


class Node:
    """The containers of one node, and the loop that protects those that are selected."""

    def __init__(self, wanted: Wanted) -> None:
        """Raises OSError, PoliciesError."""
        self._wanted = wanted
        self._policies = policy_directory.load(Path(wanted.policies))
        self._journal = Journal(Path(wanted.state) / "journal-node.ndjson", "node", self._first_line)
        self._outside, self._why_inside = outside.make(wanted.instance)
        source = Source(wanted.source)
        self.loop = Loop(wanted.instance, wanted.knob_path, source, wanted.bpf_refused, self._outside)
        self.loop.is_lasting, self.loop.unload_at_end = True, wanted.unload_at_end
        self.loop.note, self.loop.reload, self.loop.on_turn = self.note, self._read_policies_again, self._turn
        now_ns = time.monotonic_ns()
        self._census = Census(wanted.cgroup_root, now_ns, lambda text: self.note("census", text), wanted.host_root)
        self._polled: list[int] = []
        self._there: dict[str, _There] = {}  # by path
        self._undecided: deque[_There] = deque()
        self._scanning_ns = 0  # since when; what it found is to be decided as well
        journals = Path(wanted.state, _JOURNALS).glob("*.ndjson")
        self._left = dict.fromkeys(sorted(journals, key=_changed_s))  # journals of who is gone, oldest first
        self._observation = Observation(self.loop, wanted.listen)

    def run(self) -> int:
        """Until SIGTERM; the status to exit with."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in (min(_DESCRIPTORS, hard), _DESCRIPTORS):  # above the hard limit only with CAP_SYS_RESOURCE
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
        self._journal.begin()
        for told in self.loop.knob_file.restore_all():  # a killed daemon's: whoever is in need is braked again
            self.note("restored", told)
        for slot in list(self.loop.knob_file.slots()):
            self.loop.knob_file.release(slot)
        names = ", ".join(policy.name for policy in self._in_order()) or "none"
        self.note("begun", f"policies: {names}{'; dry run' if self._wanted.dry_run else ''}")
        if self._outside:
            self.note("outside", f"reflex lives in {self._outside}, and outlives this pod")
        elif self._why_inside:
            danger = "whoever kills this pod kills reflex with it, and what is frozen stays so"
            self.note("inside", f"{danger}: {self._why_inside}")
        try:
            self.loop.run()
        finally:
            self._observation.close()
            if self._outside:
                outside.remove(self._outside)
        return self.loop.status

    def note(self, kind: str, text: str, **fields: object) -> None:
        """Of the node as a whole."""
        say(text)
        self._journal.write(kind, text=text, **fields)

    def _first_line(self) -> dict[str, object]:
        return {"wanted": asdict(self._wanted)}

    # Policies

    def _in_order(self) -> list[Policy]:
        return [self._as_asked(loaded.policy) for loaded in self._policies.values()]

    def _as_asked(self, policy: Policy) -> Policy:
        signals = replace(policy.signals, source=Source(self._wanted.source))  # one source for the whole node
        return replace(policy, dry_run=policy.dry_run or self._wanted.dry_run, signals=signals)

    def _read_policies_again(self) -> None:
        self._policies = policy_directory.reload(self._policies, Path(self._wanted.policies), self.note)
        self._undecided.extend(self._there.values())

    # Containers

    def _turn(self, now_ns: int) -> bool:
        self._observation.turn(now_ns)
        if now_ns >= self._census.due_ns:
            self._heed_census()
            self._scanning_ns = self._scanning_ns or now_ns
        for there in [there for there in self._there.values() if there.again_ns and now_ns >= there.again_ns]:
            there.again_ns = None
            self._undecided.append(there)
        until_ns = time.monotonic_ns() + _CHOOSING_NS
        while self._undecided and time.monotonic_ns() < until_ns:
            there = self._undecided.popleft()
            if self._there.get(there.container.cgroup) is there:
                self._choose(there)
        if self._scanning_ns and not self._undecided:
            self.loop.tally.scanned(time.monotonic_ns() - self._scanning_ns)
            self._scanning_ns = 0
        return bool(self._undecided)

    def _heed_census(self) -> None:
        while self._polled:  # drain() may close one, and open another of its number
            self.loop.poller.unregister(self._polled.pop())
        try:
            events = self._census.drain(time.monotonic_ns())
        finally:
            for fd in self._census.fds:
                self.loop.poller.register(fd, lambda _: self._heed_census())
                self._polled.append(fd)
        for event in events:
            match event:
                case Known(container=container):
                    self.loop.tally.found += container.cgroup not in self._there
                    there = self._there.setdefault(container.cgroup, _There(container))
                    there.container = container
                    self._undecided.append(there)
                case Gone(path=path):
                    gone = self._there.pop(path, None)
                    self.loop.tally.gone += gone is not None
                    if gone and gone.slot is not None:
                        self.loop.look_at(gone.slot)  # what was begun for it is brought to its end

    def _choose(self, there: _There) -> None:
        """Govern it, or not, as the policies have it now."""
        there.again_ns = None
        choice = selection.choose(self._in_order(), there.container)
        shown, path = _shown(there.container), there.container.cgroup
        for refused in choice.refused:
            self.note("wish_refused", f"{shown}: {refused}", cgroup=path)
        target = self.loop.targets.get(there.slot) if there.slot is not None else None
        if target:
            target.known_as(there.container)
        if choice.policy is None:
            self.loop.tally.not_selected += 1
            if target:
                self.note("let_go", f"{shown}: not governed any more: {choice.reason}", cgroup=path)
                self.loop.drop(target)
        elif target is None:
            self._govern(there, choice.policy, choice.reason)
        elif choice.policy != target.policy:
            target.policy_again(choice.policy)

    def _govern(self, there: _There, policy: Policy, reason: str) -> None:
        shown, path = _shown(there.container), there.container.cgroup
        slot = self.loop.knob_file.free_slot()
        lock_fd = -1
        try:
            cgroup_id = Path(path).stat().st_ino
            lock_fd = instance.lock(guard_options.lock_name(cgroup_id))
            os.set_inheritable(lock_fd, False)
            guard = self._guard(there.container, policy)
            done = lambda: self._dropped(there, cgroup_id, lock_fd)  # noqa: E731
            self.loop.add(guard, slot, policy, None, done, there.container)
        except FileNotFoundError:  # gone again
            pass
        except instance.Busy as busy:
            there.again_ns = time.monotonic_ns() + _AGAIN_NS
            self.loop.tally.not_governed += 1
            self.note("busy", f"{shown}: guarded by process {busy.pid}", cgroup=path)
        except (OSError, ValueError) as error:  # ValueError: a path that is no text, or too long for a slot
            there.again_ns = time.monotonic_ns() + _AGAIN_NS
            self.loop.tally.not_governed += 1
            why = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
            self.note("not_governed", f"{shown}: {why}", cgroup=printable(path))
        else:
            there.slot = slot
            self._left.pop(self._journal_path(there.container), None)
            text = f"{shown}: governed by policy {policy.name!r}: {reason}"
            self.note("governed", text, cgroup=path, slot=slot, container=asdict(there.container))
            return
        if lock_fd >= 0:
            os.close(lock_fd)

    def _guard(self, container: Container, policy: Policy) -> Guard:
        return Guard(
            cgroup=container.cgroup,
            instance=self._wanted.instance,
            knob_path=self._wanted.knob_path,
            archive_directory=f"{self._wanted.state}/archive",
            journal_path=str(self._journal_path(container)),
            policy=policy.name,
            is_container=True,
        )

    def _journal_path(self, container: Container) -> Path:
        return Path(self._wanted.state, _JOURNALS, f"{container.container_id}.ndjson")

    def _dropped(self, there: _There, cgroup_id: int, lock_fd: int) -> None:
        """The loop has let go of it."""
        there.slot = None
        path = there.container.cgroup
        with suppress(OSError):
            if not Path(path).exists():  # neither its path nor its id comes again
                state_file.path_for(path).unlink(missing_ok=True)
                instance.lock_path(guard_options.lock_name(cgroup_id)).unlink(missing_ok=True)
                self._left[self._journal_path(there.container)] = None
        os.close(lock_fd)
        while len(self._left) > _JOURNALS_KEPT:
            journal = next(iter(self._left))
            del self._left[journal]
            numbered = (journal.with_name(f"{journal.name}.{number}") for number in range(1, Journal.KEEP + 1))
            for file in (journal, *numbered):
                with suppress(OSError):
                    file.unlink(missing_ok=True)


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def _shown(container: Container) -> str:
    """For people: namespace/pod/container, as far as that is known, and the beginning of its id."""
    names = "/".join(part for part in (container.namespace, container.pod, container.name) if part)
    return printable(f"{names or 'container'} ({container.container_id[:12]})")


def main() -> int:
    """Entry point: a JSON object with the fields of Wanted as the only argument."""
    wanted = Wanted(**orjson.loads(sys.argv[1]))
    try:
        node = Node(wanted)
    except (OSError, ValueError, PoliciesError) as error:
        say(f"cannot govern this node: {error}")
        if wanted.unload_at_end:
            pins.unload(wanted.instance)
        return 1
    return node.run()


if __name__ == "__main__":
    sys.exit(main())
