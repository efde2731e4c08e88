"""`governor daemon`: every container of a node that a policy selects, governed from outside.

Follows the containers, asks the policies, and adds a target to the loop for each that one selects; whoever is not
selected is not touched. What becomes of a target is the loop's; nothing here decides about memory.
"""

from __future__ import annotations

import gc
import os
import resource
import sys
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import orjson

from governor import (
    cgroup,
    guard_options,
    instance,
    outside,
    pins,
    policy_directory,
    profile_file,
    real_time,
    selection,
    state_file,
    told,
)
from governor.census import Census, Known
from governor.container import Container
from governor.discovery import Gone
from governor.guard import Guard, with_profile
from governor.journal import Journal, printable, say
from governor.loop import Loop
from governor.observation import Observation
from governor.policy import Policy, Source
from governor.policy_directory import PoliciesError
from governor.profile import Profile
from governor.schedule import Schedule
from governor.toml_file import FileError

_DESCRIPTORS = 1 << 16  # a target has about ten
_JOURNALS, _JOURNALS_KEPT = "containers", 256
_AGAIN_NS = 30_000_000_000  # until a container that could not be governed is tried again
_COLLECTIONS = (700, 10, 2)  # Python's third is 10: targets are cyclic, and those that are gone would wait as long
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
    refused: tuple[str, ...] = ()  # which of its wishes, as was said


class Node:
    """The containers of one node, and the loop that protects those that are selected."""

    def __init__(self, wanted: Wanted) -> None:
        """Raises OSError, PoliciesError."""
        self._wanted = wanted
        self._policies = policy_directory.load(Path(wanted.policies))
        self._profiles: dict[str, Profile | None] = {}  # by what policies call them
        self._journal = Journal.or_none(Path(wanted.state) / "journal-node.ndjson", "node", self._first_line)
        self._in_order = self._as_asked()
        self._outside, self._why_inside = outside.make(wanted.instance)
        # As the machine sees it by now.
        self._own = str(cgroup.memcg_of("self", v1=wanted.cgroup_root == cgroup.ROOT_V1))
        source = Source(wanted.source)
        self.loop = Loop(wanted.instance, wanted.knob_path, source, wanted.bpf_refused, self._outside)
        self.loop.is_lasting, self.loop.unload_at_end = True, wanted.unload_at_end
        self.loop.note, self.loop.reload, self.loop.on_turn = self.note, self._read_policies_again, self._turn
        now_ns = time.monotonic_ns()
        self._census = Census(wanted.cgroup_root, now_ns, lambda text: self.note("census", text), wanted.host_root)
        self._polled: list[int] = []
        self._there: dict[str, _There] = {}  # by path
        self._undecided: deque[_There] = deque()
        self._again: Schedule[str] = Schedule()  # paths of those that should be governed, and could not be
        self._scanning_ns = 0  # since when; what it found is to be decided as well
        self._journals = str(Path(wanted.state, _JOURNALS))
        journals = sorted(Path(self._journals).glob("*.ndjson"), key=_changed_s)
        self._left = dict.fromkeys(str(path) for path in journals)  # journals of who is gone, oldest first
        self._observation = Observation(self.loop, wanted.listen)

    def run(self) -> int:
        """Until SIGTERM; the status to exit with."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        for limit in (min(_DESCRIPTORS, hard), _DESCRIPTORS):  # above the hard limit only with CAP_SYS_RESOURCE
            with suppress(ValueError, OSError):
                resource.setrlimit(resource.RLIMIT_NOFILE, (limit, max(limit, hard)))
        self._journal.begin()
        for line in self.loop.knob_file.restore_all():  # a killed daemon's: whoever is in need is braked again
            self.note("restored", line)
        for slot in list(self.loop.knob_file.slots()):
            self.loop.knob_file.release(slot)
        if swept := state_file.sweep_containers(self._wanted.cgroup_root):
            self.note("swept", f"removed what was remembered of {swept} containers that are gone")
        names = ", ".join(policy.name for policy in self._in_order) or "none"
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
        return {"wanted": self._wanted}

    # Policies

    def _as_asked(self) -> list[Policy]:
        """The policies in their order, with what was asked of the whole node, and with what their profiles know."""
        source, dry_run = Source(self._wanted.source), self._wanted.dry_run
        policies = [loaded.policy for loaded in self._policies.values()]
        self._profiles = {one.profile: self._profile(one.profile) for one in policies}
        asked = [
            replace(one, dry_run=one.dry_run or dry_run, signals=replace(one.signals, source=source))
            for one in policies
        ]
        profiles = [self._profiles[one.profile] for one in asked]
        return [with_profile(one, known) if known else one for one, known in zip(asked, profiles, strict=True)]

    def _profile(self, name: str) -> Profile | None:
        try:
            return profile_file.load(name).profile if name else None
        except (FileError, OSError) as error:  # it was good when the policy was read, a moment ago
            self.note("profile_refused", f"without a profile: {error}")
            return None

    def _read_policies_again(self) -> None:
        self._policies = policy_directory.reload(self._policies, Path(self._wanted.policies), self.note)
        self._in_order = self._as_asked()
        self._undecided.extend(self._there.values())

    # Containers

    def _turn(self, now_ns: int) -> bool:
        self._observation.turn(now_ns)
        if self.loop.is_stopping:  # who comes now is the next daemon's
            return False
        if now_ns >= self._census.due_ns:
            self._heed_census()
            self._scanning_ns = self._scanning_ns or now_ns
        self._undecided.extend(self._there[path] for path in self._again.due(now_ns))
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
                case Known(container=container) if cgroup.is_inside(self._own, container.cgroup.rpartition("/")[0]):
                    continue  # our own pod: whatever a policy says, we freeze and end nothing of ourselves
                case Known(container=container):
                    self.loop.tally.found += container.cgroup not in self._there
                    there = self._there.setdefault(container.cgroup, _There(container))
                    there.container = container
                    self._undecided.append(there)
                case Gone(path=path):
                    gone = self._there.pop(path, None)
                    self._again.drop(path)
                    self.loop.tally.gone += gone is not None
                    if gone and gone.slot is not None:
                        self.loop.look_at(gone.slot)  # what was begun for it is brought to its end

    def _choose(self, there: _There) -> None:
        """Govern it, or not, as the policies have it now."""
        choice = selection.choose(self._in_order, there.container)
        shown, path = _shown(there.container), there.container.cgroup
        self._again.drop(path)
        for refused in choice.refused:
            if refused not in there.refused:
                self.note("wish_refused", f"{shown}: {refused}", cgroup=path)
        there.refused = choice.refused
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
        elif choice.policy.profile != target.policy.profile:  # another kind of agent: all that is known of it is
            self.loop.drop(target)
            self._govern(there, choice.policy, choice.reason)
        elif choice.policy != target.policy:
            target.policy_again(choice.policy)

    def _govern(self, there: _There, policy: Policy, reason: str) -> None:
        shown, path = _shown(there.container), there.container.cgroup
        cgroup_id, lock_fd = 0, -1
        try:
            cgroup_id = os.stat(path).st_ino  # noqa: PTH116  fifty times a second, as what follows
            slot = self.loop.knob_file.free_slot()
            lock_fd = instance.lock(guard_options.lock_name(cgroup_id))
            os.set_inheritable(lock_fd, False)
            guard = self._guard(there.container, policy)
            done = lambda: self._dropped(there, cgroup_id, lock_fd)  # noqa: E731
            self.loop.add(guard, slot, policy, self._profiles[policy.profile], done, there.container)
        except instance.Busy as busy:
            self._again.set(path, time.monotonic_ns() + _AGAIN_NS)
            self.loop.tally.not_governed += 1
            self.note("busy", f"{shown}: guarded by process {busy.pid}", cgroup=path)
        except Exception as error:  # ValueError: a path that is no text, or too long for a slot
            is_gone = not _is_there(path, cgroup_id)
            if lock_fd >= 0:
                _unlock(cgroup_id, lock_fd, is_gone)
            if is_gone:
                return
            self._again.set(path, time.monotonic_ns() + _AGAIN_NS)
            self.loop.tally.not_governed += 1
            if not isinstance(error, (OSError, ValueError)):  # a fault of ours: the loop says where
                raise
            why = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) else str(error)
            self.note("not_governed", f"{shown}: {why}", cgroup=printable(path))
        else:
            there.slot = slot
            self._left.pop(self._journal_path(there.container), None)
            text = f"{shown}: governed by policy {policy.name!r}: {reason}"
            self.note("governed", text, cgroup=path, slot=slot, container=there.container)

    def _guard(self, container: Container, policy: Policy) -> Guard:
        return Guard(
            cgroup=container.cgroup,
            instance=self._wanted.instance,
            knob_path=self._wanted.knob_path,
            archive_directory=f"{self._wanted.state}/archive",
            journal_path=self._journal_path(container),
            policy=policy.name,
            is_container=True,
            has_own_mounts=container.has_own_mounts,
        )

    def _journal_path(self, container: Container) -> str:
        return f"{self._journals}/{container.container_id}.ndjson"

    def _dropped(self, there: _There, cgroup_id: int, lock_fd: int) -> None:
        """The loop has let go of it."""
        there.slot = None
        path = there.container.cgroup
        is_gone = not _is_there(path, cgroup_id)  # its id does not come again
        if is_gone:
            with suppress(OSError):
                _remove(str(told.path_for(cgroup_id)))
        if is_gone and not os.path.exists(path):  # noqa: PTH110  as below; nor does its path, but for who has it now
            with suppress(OSError):
                _remove(str(state_file.path_for(path)))
            self._left[self._journal_path(there.container)] = None
        _unlock(cgroup_id, lock_fd, is_gone)
        while len(self._left) > _JOURNALS_KEPT:
            journal = next(iter(self._left))
            del self._left[journal]
            names = (journal, *(f"{journal}.{number}" for number in range(1, Journal.KEEP + 1)))
            all(_remove(name) for name in names)  # where there is no FILE.1 there is no FILE.2


def _unlock(cgroup_id: int, lock_fd: int, is_gone: bool) -> None:
    if is_gone:
        with suppress(OSError):
            _remove(str(instance.lock_path(guard_options.lock_name(cgroup_id))))
    os.close(lock_fd)


def _is_there(path: str, cgroup_id: int) -> bool:
    """Whether the memcg of this id still has the path; False as well where that cannot be seen."""
    try:
        return os.stat(path).st_ino == cgroup_id  # noqa: PTH116  no pathlib where containers come and go: it takes twice
    except OSError:
        return False


def _remove(path: str) -> bool:
    """False where there is no such file, or it cannot be removed."""
    try:
        os.unlink(path)  # noqa: PTH108
    except OSError:
        return False
    return True


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
    real_time.become_prompt()
    gc.freeze()  # what stays for good is looked through no more
    gc.set_threshold(*_COLLECTIONS)
    return node.run()


if __name__ == "__main__":
    sys.exit(main())
