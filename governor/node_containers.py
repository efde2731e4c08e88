"""The containers of a node as they are at one moment, for a command that ends; the daemon follows them by `census`.

Names come from the runtimes' bundles; labels and annotations from their sockets, for the pods that are asked about.
"""

from __future__ import annotations

import select
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from governor import cgroup
from governor.bundle import Bundle, read_bundle
from governor.census import container_of
from governor.container import Container
from governor.cri import DEADLINE_NS, Question, sockets
from governor.discovery import Appeared, Discovery

_SHORTEST_ID = 6  # of a container id that is not written out


def root() -> str:
    """Where the memcgs are: cgroup v2, or v1's memory hierarchy where there is one."""
    return cgroup.ROOT_V1 if Path(cgroup.ROOT_V1, "memory.usage_in_bytes").exists() else cgroup.ROOT


def containers(below: str, host_root: str) -> list[Container]:
    """All containers but pauses, without labels and annotations; raises OSError where `below` is no directory."""
    discovery = Discovery(below, 0)
    try:
        found = [event for event in discovery.drain(0) if isinstance(event, Appeared)]
    finally:
        discovery.close()
    judged = [(event, read_bundle(event.place, host_root) or Bundle()) for event in found]
    return [container_of(event.path, event.place, bundle, None) for event, bundle in judged if not bundle.is_sandbox]


def named(known: Iterable[Container], text: str) -> list[Container]:
    """Those that NAMESPACE/POD[/CONTAINER] means, or the path of a cgroup, or what a container's id begins with."""
    path = text.removeprefix(f"{cgroup.ROOT}/").strip("/")

    def is_meant(container: Container) -> bool:
        pod = f"{container.namespace}/{container.pod}"
        return (
            bool(container.pod and text in (pod, f"{pod}/{container.name}"))
            or (len(text) >= _SHORTEST_ID and container.container_id.startswith(text))
            or path == container.cgroup.removeprefix(f"{cgroup.ROOT}/").strip("/")
        )

    return [container for container in known if is_meant(container)]


def with_labels(known: list[Container], host_root: str) -> tuple[list[Container], str]:
    """The same with their pods' labels and annotations, and why some of them are not known; "" if all are."""
    paths = sockets(host_root)
    if not paths:
        return known, f"found no socket of a container runtime below {host_root}"
    try:
        question = Question(paths, {container.pod_uid for container in known}, time.monotonic_ns())
    except OSError as error:
        return known, str(error)
    select.select([question.fd], [], [], DEADLINE_NS / 1e9)
    answer = question.answer(question.deadline_ns)
    assert answer, "a question has an answer at its deadline"
    return [
        replace(one, labels=sandbox.labels, annotations=sandbox.annotations)
        if (sandbox := answer.sandboxes.get(one.pod_uid))
        else one
        for one in known
    ], answer.failed
