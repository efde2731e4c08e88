"""`governor daemon`: every container of a node that a policy selects, governed from outside.

Finds the containers, asks the policies, and adds a target to the loop for each that one selects; whoever is not
selected is not touched. What becomes of a target is the loop's; nothing here decides about memory.
"""

from __future__ import annotations

import os
import resource
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import orjson

from governor import cgroup, guard_options, instance, outside, pins, policy_directory, selection, state_file
from governor.bundle import Bundle, read_bundle
from governor.container import Container
from governor.discovery import Appeared, Discovery, Gone
from governor.guard import Guard
from governor.journal import Journal, printable, say
from governor.loop import Loop
from governor.pods import Place
from governor.policy import Policy, Source

_DESCRIPTORS = 1 << 16  # a target has about ten
_JOURNALS, _JOURNALS_KEPT = "containers", 256
_UNKNOWN_NS = 5_000_000_000  # so long a container may be without a bundle; then its path alone has to do


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


@dataclass(slots=True)
class _Known:
    """A container that is there; `slot` None: not governed."""

    place: Place
    cgroup_id: int
    since_ns: int
    slot: int | None = None


class Node:
    """The containers of one node, and the loop that protects those that are selected."""

    def __init__(self, wanted: Wanted) -> None:
        """Raises OSError, PoliciesError."""
        self._wanted = wanted
        self._policies = policy_directory.load(Path(wanted.policies))
        self._outside, self._why_inside = outside.make(wanted.instance)
        source = Source(wanted.source)
        self.loop = Loop(wanted.instance, wanted.knob_path, source, wanted.bpf_refused, self._outside)
        self.loop.is_lasting, self.loop.unload_at_end = True, wanted.unload_at_end
        self.loop.note, self.loop.reload, self.loop.on_turn = self.note, self._read_policies_again, self._look
        self._journal = Journal(Path(wanted.state) / "journal-node.ndjson", "node", self._first_line)
        self._discovery = Discovery(wanted.cgroup_root, time.monotonic_ns())
        if self._discovery.fd >= 0:
            self.loop.poller.register(self._discovery.fd, lambda _: self._discover())
        self._known: dict[str, _Known] = {}  # by path
        self._unread: set[str] = set()  # of those, the ones whose bundle was not there yet
        self._blind = ""

    def run(self) -> int:
        """Until SIGTERM; the status to exit with."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(_DESCRIPTORS, hard), hard))
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
            self.note(
                "inside",
                f"whoever kills this pod kills reflex with it, and what is frozen stays so: {self._why_inside}",
            )
        self.loop.run()
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
        policy = replace(policy, dry_run=policy.dry_run or self._wanted.dry_run)
        return replace(policy, signals=replace(policy.signals, source=Source(self._wanted.source)))

    def _read_policies_again(self) -> None:
        self._policies = policy_directory.reload(self._policies, Path(self._wanted.policies), self.note)
        for path in list(self._known):
            self._choose(path)

    # Containers

    def _look(self, now_ns: int) -> None:
        if now_ns >= self._discovery.due_ns:
            self._discover()
        for path in list(self._unread):
            self._choose(path)

    def _discover(self) -> None:
        for event in self._discovery.drain(time.monotonic_ns()):
            match event:
                case Appeared(path=path, place=place):
                    with suppress(OSError):  # gone again
                        self._known[path] = _Known(place, os.lstat(path).st_ino, time.monotonic_ns())
                        self._choose(path)
                case Gone(path=path):
                    self._unread.discard(path)
                    if (known := self._known.pop(path, None)) and known.slot is not None:
                        self.loop.look_at(known.slot)  # what was begun for it is brought to its end
        if self._discovery.blind != self._blind:
            self._blind = self._discovery.blind
            self.note("blind", self._blind or "all containers are seen at once again")

    def _choose(self, path: str) -> None:
        """Govern it, or not, as the policies have it now."""
        known = self._known[path]
        bundle = read_bundle(known.place, self._wanted.host_root)
        if bundle is None and time.monotonic_ns() - known.since_ns < _UNKNOWN_NS:
            self._unread.add(path)
            return
        self._unread.discard(path)
        if bundle and bundle.is_sandbox:
            return
        container = _container(path, known.place, bundle or Bundle())
        choice = selection.choose(self._in_order(), container)
        for refused in choice.refused:
            self.note("wish_refused", f"{_shown(container)}: {refused}", cgroup=path)
        if known.slot is not None and (target := self.loop.targets.get(known.slot)):
            if choice.policy is None:
                self.note("let_go", f"{_shown(container)}: not governed any more: {choice.reason}", cgroup=path)
                self.loop.drop(target)
                known.slot = None
            elif choice.policy != target.policy:
                target.policy_again(choice.policy)
            return
        if choice.policy is not None:
            self._govern(path, known, container, choice)

    def _govern(self, path: str, known: _Known, container: Container, choice: selection.Choice) -> None:
        assert choice.policy
        try:
            lock_fd = instance.lock(guard_options.lock_name(known.cgroup_id))
        except instance.Busy as busy:
            self.note("busy", f"{_shown(container)}: guarded by process {busy.pid} already", cgroup=path)
            return

        def dropped() -> None:
            os.close(lock_fd)
            known.slot = None
            if not Path(path).exists():  # a container's path never comes again
                self._forget(path)

        os.set_inheritable(lock_fd, False)
        slot = self.loop.knob_file.free_slot()
        guard = Guard(
            cgroup=path,
            instance=self._wanted.instance,
            knob_path=self._wanted.knob_path,
            archive_directory=f"{self._wanted.state}/archive",
            journal_path=f"{self._wanted.state}/{_JOURNALS}/{known.place.container_id}.ndjson",
            policy=choice.policy.name,
        )
        try:
            self.loop.add(guard, slot, choice.policy, None, dropped)
        except OSError as error:
            os.close(lock_fd)
            why = f"{error.strerror}: {error.filename}" if error.filename else str(error)
            self.note("not_governed", f"{_shown(container)}: {why}", cgroup=path)
            return
        known.slot = slot
        text = f"{_shown(container)}: governed by policy {choice.policy.name!r}: {choice.reason}"
        self.note("governed", text, cgroup=path, slot=slot, container=asdict(container))

    def _forget(self, path: str) -> None:
        """What was remembered of a container that is gone; its journal stays, as one of so many."""
        with suppress(OSError):
            state_file.path_for(path).unlink(missing_ok=True)
        journals = sorted(Path(self._wanted.state, _JOURNALS).glob("*.ndjson"), key=_changed_s)
        for journal in journals[:-_JOURNALS_KEPT]:
            for file in (journal, *journal.parent.glob(f"{journal.name}.*")):
                file.unlink(missing_ok=True)


def _changed_s(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0


def _container(path: str, place: Place, bundle: Bundle) -> Container:
    return Container(
        cgroup=path,
        container_id=place.container_id,
        pod_uid=bundle.pod_uid or place.pod_uid,
        qos=place.qos,
        namespace=bundle.namespace,
        pod=bundle.pod,
        name=bundle.name,
        chosen_policy=bundle.chosen_policy,
    )


def _shown(container: Container) -> str:
    """For people: namespace/pod/container, as far as that is known, and the beginning of its id."""
    names = "/".join(part for part in (container.namespace, container.pod, container.name) if part)
    return printable(f"{names or 'container'} ({container.container_id[:12]})")


def main() -> int:
    """Entry point: a JSON object with the fields of Wanted as the only argument."""
    wanted = Wanted(**orjson.loads(sys.argv[1]))
    try:
        node = Node(wanted)
    except (OSError, policy_directory.PoliciesError) as error:
        say(f"cannot govern this node: {error}")
        if wanted.unload_at_end:
            pins.unload(wanted.instance)
        return 1
    return node.run()


if __name__ == "__main__":
    sys.exit(main())
