"""The containers of a node with all that is known of them: what discovery finds, their bundles, and CRI's labels.

A container is told of when its policy can be chosen: its bundle has been read, and CRI was asked for its pod or could
not be. What is known only later makes it be told of again. Pause containers are never told of. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from governor.bundle import Bundle, read_bundle
from governor.container import Container
from governor.cri import PODS_MAX, Answer, Question, Sandbox, sockets
from governor.discovery import Appeared, Discovery, Gone
from governor.pods import Place

_MS = 1_000_000
# Until a bundle that is not there is taken for one that is not mounted; it is written before the cgroup is made.
BUNDLE_RETRIES_NS = (50 * _MS, 100 * _MS, 200 * _MS, 400 * _MS, 800 * _MS)
CRI_RETRIES_NS = (1_000 * _MS, 10_000 * _MS, 60_000 * _MS, 600_000 * _MS)
_NEVER_NS = (1 << 63) - 1


@dataclass(frozen=True, slots=True)
class Known:
    """A container is there, and this is known of it; comes again when more is."""

    container: Container


@dataclass(slots=True)
class _Entry:
    place: Place
    bundle: Bundle | None
    looks: int  # for its bundle
    due_ns: int
    told: bool = False
    sandbox: Sandbox | None = None  # as told


@dataclass(slots=True)
class _Pod:
    sandbox: Sandbox | None
    questions: int
    due_ns: int  # of the next question


class Census:
    """Follows one node. Poll `fds` for reading, and call drain() when one is ready and at `due_ns`."""

    def __init__(self, root: str, now_ns: int, note: Callable[[str], None], host_root: str = "/") -> None:
        """`root` as for Discovery; `note` is told, once each, what cannot be known. Raises OSError."""
        self._discovery = Discovery(root, now_ns)
        self._host_root = host_root
        self._note = note
        self._noted: set[str] = set()
        self._entries: dict[str, _Entry] = {}
        self._pods: dict[str, _Pod] = {}
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
                self._entries[event.path] = _Entry(event.place, None, 0, now_ns)
            elif (entry := self._entries.pop(event.path, None)) and entry.told:
                found.append(event)
        if self._discovery.blind:
            self._note_once(f"containers are seen by looking once a second: {self._discovery.blind}")
        self._look_for_bundles(now_ns)
        self._ask(now_ns)
        found += self._news()
        due = [entry.due_ns for entry in self._entries.values() if entry.bundle is None]
        pods = [pod.due_ns for pod in self._pods.values()]
        asked = self._question.deadline_ns if self._question else min(pods, default=_NEVER_NS)
        self.due_ns = min([self._discovery.due_ns, asked, *due])
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

    def _look_for_bundles(self, now_ns: int) -> None:
        for path, entry in list(self._entries.items()):
            if entry.bundle is not None or now_ns < entry.due_ns:
                continue
            entry.bundle = read_bundle(entry.place, self._host_root)
            if entry.bundle is None and entry.looks == len(BUNDLE_RETRIES_NS):
                self._note_once("no bundle of a container was found: names, namespace and environment are unknown")
                entry.bundle = Bundle()
            elif entry.bundle is None:
                entry.due_ns = now_ns + BUNDLE_RETRIES_NS[entry.looks]
                entry.looks += 1
            elif entry.bundle.is_sandbox:
                del self._entries[path]

    def _ask(self, now_ns: int) -> None:
        """One question at a time, of the pods that are new or due again."""
        answer = self._question.answer(now_ns) if self._question else None
        if self._question and answer:
            self._heed(self._question.uids, answer, now_ns)
            self._question = None
        there = {entry.place.pod_uid for entry in self._entries.values() if entry.bundle is not None}
        self._pods = {uid: self._pods.get(uid) or _Pod(None, 0, now_ns) for uid in there}
        due = [uid for uid, pod in self._pods.items() if pod.due_ns <= now_ns]
        if self._question or not due:
            return
        uids = due[:PODS_MAX]
        if not (paths := sockets(self._host_root)):
            self._heed(frozenset(uids), Answer(failed="no socket of a runtime is mounted"), now_ns)
            return
        try:
            self._question = Question(paths, uids, now_ns)
        except OSError as error:
            self._heed(frozenset(uids), Answer(failed=str(error)), now_ns)

    def _heed(self, uids: frozenset[str], answer: Answer, now_ns: int) -> None:
        for uid in uids & self._pods.keys():
            pod = self._pods[uid]
            pod.sandbox = answer.sandboxes.get(uid)
            again = pod.sandbox is None and pod.questions < len(CRI_RETRIES_NS)
            pod.due_ns = now_ns + CRI_RETRIES_NS[pod.questions] if again else _NEVER_NS
            pod.questions += 1
        if answer.failed and not answer.sandboxes:
            self._note_once(f"labels and annotations of pods are unknown: {answer.failed}")

    def _news(self) -> list[Known]:
        news = []
        for path, entry in self._entries.items():
            pod = self._pods.get(entry.place.pod_uid)
            if entry.bundle is None or pod is None or not pod.questions:
                continue
            if not entry.told or entry.sandbox is not pod.sandbox:
                entry.told, entry.sandbox = True, pod.sandbox
                news.append(Known(container_of(path, entry.place, entry.bundle, pod.sandbox)))
        return news


def container_of(cgroup: str, place: Place, bundle: Bundle, sandbox: Sandbox | None) -> Container:
    """All that is known of a container. The path, which the kubelet made, is believed before the bundle."""
    container = Container(cgroup, place.container_id, place.pod_uid, place.qos)
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
