"""The containers of a node with all that is known of them: what discovery finds, their bundles, and CRI's labels.

A container is told of when its policy can be chosen: its bundle has been read, and CRI was asked for its pod, could
not be, or hangs. What is known only later makes it be told of again. Pause containers are never told of. Decides
nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import islice

from governor import subtree
from governor.bundle import Bundle, read_bundle
from governor.container import Container
from governor.cri import PODS_MAX, Answer, Question, Sandbox, sockets
from governor.discovery import Appeared, Discovery, Gone
from governor.pods import Place
from governor.schedule import Schedule

_MS = 1_000_000
_PAUSE = "pause"
# Until a bundle that is not there is taken for one that is not mounted; it is written before the cgroup is made.
BUNDLE_RETRIES_NS = (50 * _MS, 100 * _MS, 200 * _MS, 400 * _MS, 800 * _MS)
# After that: a disk may have been slow, or descriptors used up.
BUNDLE_LATER_NS = (10_000 * _MS, 60_000 * _MS, 600_000 * _MS)
CRI_RETRIES_NS = (1_000 * _MS, 10_000 * _MS, 60_000 * _MS, 600_000 * _MS)
CRI_PATIENCE_NS = 2_000 * _MS  # of who is new with a runtime that hangs: bursts do not wait for it
_NEVER_NS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Known:
    """A container is there, and this is known of it; comes again when more is."""

    container: Container


@dataclass(slots=True)
class _Entry:
    place: Place
    bundle: Bundle | None = None
    looks: int = 0  # for its bundle
    told: bool = False
    sandbox: Sandbox | None = None  # as told


@dataclass(slots=True)
class _Pod:
    patient_until_ns: int  # for an answer to the first question
    sandbox: Sandbox | None = None
    questions: int = 0  # that were answered
    containers: dict[str, None] = field(default_factory=dict)  # whose bundles are known, oldest first

    def is_told_of(self, now_ns: int) -> bool:
        """Whether its containers are, with its labels or without."""
        return self.questions > 0 or now_ns >= self.patient_until_ns


class Census:
    """Follows one node. Poll `fds` for reading, and call drain() when one is ready and at `due_ns`.

    What drain() takes grows with what has changed, and not with how many containers there are.
    """

    def __init__(self, root: str, now_ns: int, note: Callable[[str], None], host_root: str = "/") -> None:
        """`root` as for Discovery; `note` is told, once each, what cannot be known. Raises OSError."""
        self._discovery = Discovery(root, now_ns)
        self._host_root = host_root
        self._note = note
        self._noted: set[str] = set()
        self._entries: dict[str, _Entry] = {}
        self._looks: Schedule[str] = Schedule()  # when the bundle of each is to be looked for
        self._pods: dict[str, _Pod] = {}  # by UID
        self._unanswered: set[str] = set()  # pods of which nothing is told yet
        self._questions: Schedule[str] = Schedule()  # when each pod is to be asked for
        self._changed: dict[str, None] = {}  # containers of which there may be news
        self._question: Question | None = None
        self.due_ns = now_ns

    @property
    def fds(self) -> list[int]:
        """What there is to poll just now: a question comes and goes."""
        question = self._question.fd if self._question else -1
        return [fd for fd in (self._discovery.fd, question) if fd >= 0]

    def drain(self, now_ns: int) -> list[Known | Gone]:
        """What has changed since the last call."""
        found: list[Known | Gone] = []
        for event in self._discovery.drain(now_ns):
            if isinstance(event, Appeared):
                self._entries[event.path] = _Entry(event.place)
                self._looks.set(event.path, now_ns)
            elif self._forget(event.path):
                found.append(event)
        if self._discovery.blind:
            self._note_once(f"containers are seen by looking once a second: {self._discovery.blind}")
        found += self._look_for_bundles(now_ns)
        self._ask(now_ns)
        found += self._news(now_ns)
        due = [self._pods[uid].patient_until_ns for uid in self._unanswered]
        asked = self._question.deadline_ns if self._question else self._questions.next_ns()
        due += [at_ns for at_ns in (self._looks.next_ns(), asked) if at_ns is not None]
        self.due_ns = min([self._discovery.due_ns, *due])
        return found

    def close(self) -> None:
        """Follow it no longer."""
        self._discovery.close()
        if self._question:
            self._question.close()

    def _note_once(self, text: str) -> None:
        if text not in self._noted:
            self._noted.add(text)
            self._note(text)

    def _forget(self, path: str) -> bool:
        """It is gone, or not to be told of; whether it was told of."""
        entry = self._entries.pop(path, None)
        if entry is None:
            return False
        self._looks.drop(path)
        self._changed.pop(path, None)
        uid = entry.place.pod_uid
        if pod := self._pods.get(uid):
            pod.containers.pop(path, None)
            if not pod.containers:
                del self._pods[uid]
                self._unanswered.discard(uid)
                self._questions.drop(uid)
        return entry.told

    def _look_for_bundles(self, now_ns: int) -> list[Gone]:
        """Those that turn out to be pause containers after all."""
        gone = []
        for path in list(self._looks.due(now_ns)):
            entry = self._entries[path]
            bundle, is_last = read_bundle(entry.place, self._host_root), entry.looks == len(BUNDLE_RETRIES_NS)
            if bundle.is_sandbox if bundle else is_last and _is_pause(path):
                gone += [Gone(path)] if self._forget(path) else []
                continue
            if not bundle:
                if is_last:
                    unknown = "names, namespace and environment are unknown"
                    self._note_once(f"no bundle of a container was found: {unknown}")
                    bundle = Bundle()
                retries = (*BUNDLE_RETRIES_NS, *BUNDLE_LATER_NS)
                if entry.looks < len(retries):
                    self._looks.set(path, now_ns + retries[entry.looks])
                entry.looks += 1
            if bundle:
                entry.bundle, entry.told = bundle, False
                self._join(path, entry.place.pod_uid, now_ns)
        return gone

    def _join(self, path: str, uid: str, now_ns: int) -> None:
        if uid not in self._pods:
            self._pods[uid] = _Pod(now_ns + CRI_PATIENCE_NS)
            self._unanswered.add(uid)
            self._questions.set(uid, now_ns)
        self._pods[uid].containers[path] = self._changed[path] = None

    def _ask(self, now_ns: int) -> None:
        """One question at a time, of the pods that are new or due again."""
        answer = self._question.answer(now_ns) if self._question else None
        if self._question and answer:
            self._heed(self._question.uids, answer, now_ns)
            self._question = None
        if self._question or not (uids := frozenset(islice(self._questions.due(now_ns), PODS_MAX))):
            return
        if not (paths := sockets(self._host_root)):
            self._heed(uids, Answer(failed="no socket of a runtime is mounted"), now_ns)
            return
        try:
            self._question = Question(paths, uids, now_ns)
        except OSError as error:
            self._heed(uids, Answer(failed=str(error)), now_ns)

    def _heed(self, uids: frozenset[str], answer: Answer, now_ns: int) -> None:
        for uid in uids & self._pods.keys():
            pod = self._pods[uid]
            pod.sandbox = answer.sandboxes.get(uid)
            if pod.sandbox is None and pod.questions < len(CRI_RETRIES_NS):
                self._questions.set(uid, now_ns + CRI_RETRIES_NS[pod.questions])
            pod.questions += 1
            self._changed |= pod.containers
        if answer.failed and not answer.sandboxes:
            self._note_once(f"labels and annotations of pods are unknown: {answer.failed}")

    def _news(self, now_ns: int) -> list[Known]:
        for uid in [uid for uid in self._unanswered if self._pods[uid].is_told_of(now_ns)]:
            self._unanswered.remove(uid)
            self._changed |= self._pods[uid].containers
        news = []
        for path in self._changed:
            entry = self._entries[path]
            pod = self._pods[entry.place.pod_uid]
            if not entry.bundle or not pod.is_told_of(now_ns):
                continue
            if not entry.told or entry.sandbox is not pod.sandbox:
                entry.told, entry.sandbox = True, pod.sandbox
                news.append(Known(container_of(path, entry.place, entry.bundle, pod.sandbox)))
        self._changed.clear()
        return news


def _is_pause(path: str) -> bool:
    """Whether nothing runs there but what holds a pod's namespaces. Who calls itself so is not protected, no more."""
    stats = [subtree.read_stat(pid) for pid in subtree.memcg_pids(path)]
    return bool(stats) and all(stat is None or stat.comm == _PAUSE for stat in stats)


def container_of(cgroup: str, place: Place, bundle: Bundle, sandbox: Sandbox | None) -> Container:
    """All that is known of a container. The path, which the kubelet made, is believed before the bundle."""
    own_mounts = bundle.has_own_mounts
    container = Container(cgroup, place.container_id, place.pod_uid, place.qos, has_own_mounts=own_mounts)
    if bundle.pod_uid in ("", place.pod_uid):
        container = replace(
            container,
            namespace=bundle.namespace,
            pod=bundle.pod,
            name=bundle.name,
            chosen_policy=bundle.chosen_policy,
        )
    if sandbox:
        container = replace(container, labels=sandbox.labels, annotations=sandbox.annotations)
    return container
