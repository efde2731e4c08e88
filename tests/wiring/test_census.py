"""A pod that containerd's own CRI plug-in made, as a kubelet asks for it: its path, its bundle, its labels."""

import select
import time
from pathlib import Path

from conftest import CGROUPS
from cri_pods import CriPod

from governor.census import Census, Known
from governor.container import Container
from governor.discovery import Gone

UID = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718"
LABELS = {"app": "agent", "io.kubernetes.pod.uid": UID}
ANNOTATIONS = {"governor.dev/policy": "careful"}


def news(census):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if found := census.drain(time.monotonic_ns()):
            return found
        select.select(census.fds, [], [], 0.1)
    raise AssertionError("nothing came")


def test_a_real_pod_is_known_with_its_labels_and_its_pause_container_is_not_told_of(containerd):
    notes = []
    census = Census(str(CGROUPS), time.monotonic_ns(), notes.append)
    assert census.drain(time.monotonic_ns()) == []
    pod = CriPod(UID, "agent-0", "team-a", 64, LABELS, ANNOTATIONS)
    texts_known = {"namespace": "team-a", "pod": "agent-0", "name": "agent", "chosen_policy": "careful"}
    path = str(pod.container)
    expected = Container(path, pod.id, UID, "burstable", **texts_known, labels=LABELS, annotations=ANNOTATIONS)
    told = news(census)
    if not told[0].container.labels:  # under emulation the answer may take longer than the census waits for it
        told = news(census)
    assert told == [Known(expected)]
    assert Path(path, "memory.max").read_text().strip() == str(64 << 20)
    assert (pod.cgroup / pod.sandbox).is_dir()
    pod.close()
    assert news(census) == [Gone(path)]
    assert notes == []
    census.close()
