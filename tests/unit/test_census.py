"""What is known of a node's containers, from a real tree, real bundles and a real CRI socket; and when it is told."""

import json
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from governor import census
from governor.bundle import Bundle
from governor.census import Census, Known, container_of
from governor.container import Container
from governor.cri import Sandbox
from governor.discovery import Gone
from governor.pods import place_of
from tests.fakes.cri import Runtime, sandbox

UID, OTHER = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718", "4d5e6f708192a3b4c5d6e7f8091a2b3c"
ID, SECOND_ID = "c0ffee" + "0" * 58, "b" * 64
MS = 1_000_000


class Node:
    """A node's files in a temporary directory."""

    def __init__(self, path):
        self.root, self.host, self.notes = path / "cgroup", path / "host", []
        for directory in (self.root / "kubepods/burstable", self.host / "run/containerd"):
            directory.mkdir(parents=True)
        self.census = Census(str(self.root), 0, self.notes.append, str(self.host))

    def bundle(self, container_id, kind="container", uid=UID, name="agent"):
        annotations = {
            "io.kubernetes.cri.container-type": kind,
            "io.kubernetes.cri.sandbox-name": "agent-0",
            "io.kubernetes.cri.sandbox-namespace": "team-a",
            "io.kubernetes.cri.sandbox-uid": uid,
            "io.kubernetes.cri.container-name": name,
        }
        file = self.host / f"run/containerd/io.containerd.runtime.v2.task/k8s.io/{container_id}/config.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps({"annotations": annotations, "process": {"env": ["GOVERNOR_POLICY=careful"]}}))

    def cgroup(self, container_id, uid=UID):
        path = self.root / f"kubepods/burstable/pod{uid}" / container_id
        path.mkdir(parents=True)
        return str(path)

    def runtime(self, *sandboxes):
        return Runtime(self.host / "run/containerd/containerd.sock", sandboxes)

    def news(self, seconds=30.0):
        """What comes next, on the real clock from 0."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if found := self.census.drain(1):
                return found
            select.select(self.census.fds, [], [], 0.1)
        raise AssertionError("nothing came")


@pytest.fixture
def node(tmp_path):
    one = Node(tmp_path)
    assert one.census.drain(0) == []
    yield one
    one.census.close()


def known(path, **more):
    of = {"namespace": "team-a", "pod": "agent-0", "name": "agent", "chosen_policy": "careful"}
    return Known(Container(path, ID, UID, "burstable", **(of | more)))


def test_without_a_socket_it_is_told_at_once_and_that_is_said_once(node):
    node.bundle(ID)
    path = node.cgroup(ID)
    assert node.census.drain(1) == [known(path)]
    assert node.census.drain(2) == []
    node.bundle(SECOND_ID)
    second = node.cgroup(SECOND_ID)
    assert [event.container.cgroup for event in node.census.drain(3)] == [second]
    assert node.notes == ["labels and annotations of pods are unknown: no socket of a runtime is mounted"]
    shutil.rmtree(path)
    assert node.census.drain(4) == [Gone(path)]


def test_pause_containers_are_never_told_of(node):
    node.bundle(ID, kind="sandbox")
    path = node.cgroup(ID)
    assert node.census.drain(1) == []
    shutil.rmtree(path)
    assert node.census.drain(2) == []
    assert node.notes == []


def test_a_bundle_that_comes_later_is_found_soon(node):
    path = node.cgroup(ID)
    assert node.census.drain(1) == []
    assert node.census.due_ns == 1 + census.BUNDLE_RETRIES_NS[0]
    node.bundle(ID)
    assert node.census.drain(2) == []  # not looked for before it is due
    assert node.census.drain(node.census.due_ns) == [known(path)]


def test_without_bundles_the_path_is_what_is_known(node):
    path = node.cgroup(ID)
    now_ns = 1
    while not (found := node.census.drain(now_ns)):
        now_ns = node.census.due_ns
    assert found == [Known(Container(path, ID, UID, "burstable"))]
    assert 1000 * MS < now_ns < 2000 * MS
    assert "no bundle of a container was found" in node.notes[0]


def test_a_bundle_that_comes_late_makes_it_be_told_again_and_a_pause_container_be_let_go(node):
    path, pause = node.cgroup(ID), node.cgroup(SECOND_ID)
    now_ns, told = 1, []
    while len(told) < 2:
        told += node.census.drain(now_ns)
        now_ns = node.census.due_ns
    node.bundle(ID)
    node.bundle(SECOND_ID, kind="sandbox")
    later = []
    while len(later) < 2:
        later += node.census.drain(now_ns)
        now_ns = node.census.due_ns
    assert now_ns < 60_000 * MS
    assert sorted(later, key=str) == [Gone(pause), known(path)]


@pytest.mark.parametrize(("comm", "is_told"), [("pause", False), ("agent", True)])
def test_without_a_bundle_a_pause_container_is_known_by_its_process(node, comm, is_told):
    code = f"import sys; open('/proc/self/comm', 'w').write({comm!r}); print(flush=True); sys.stdin.read()"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    process.stdout.readline()
    path = node.cgroup(ID)
    Path(path, "cgroup.procs").write_text(f"{process.pid}\n")
    found = [event for now_ns in range(0, 5000 * MS, 50 * MS) for event in node.census.drain(now_ns)]
    process.communicate()
    assert found == [Known(Container(path, ID, UID, "burstable"))] * is_told


def test_labels_come_with_it_and_each_pod_is_asked_for_once(node):
    runtime = node.runtime((UID, sandbox(UID, {"app": "agent"}, {"governor.dev/policy": "careful"})))
    node.bundle(ID)
    path = node.cgroup(ID)
    assert node.census.drain(1) == []
    assert len(node.census.fds) == 2
    assert node.news() == [known(path, labels={"app": "agent"}, annotations={"governor.dev/policy": "careful"})]
    assert len(node.census.fds) == 1
    node.bundle(SECOND_ID, name="other")
    node.cgroup(SECOND_ID)
    [second] = node.census.drain(2)  # at once
    assert (second.container.name, second.container.labels) == ("other", {"app": "agent"})
    assert len(runtime.requests) == 1
    runtime.stop()
    assert node.notes == []


def test_a_runtime_that_hangs_delays_nobody_for_long(node):
    runtime = node.runtime((UID, sandbox(UID, {"app": "agent"})))
    runtime.hang.clear()
    node.bundle(ID)
    path = node.cgroup(ID)
    assert node.census.drain(1) == []
    assert node.census.due_ns == 1 + census.CRI_PATIENCE_NS
    assert node.census.drain(node.census.due_ns) == [known(path)]
    assert len(node.census.fds) == 2  # it is still being asked
    runtime.hang.set()
    assert node.news() == [known(path, labels={"app": "agent"})]
    runtime.stop()


def test_a_runtime_that_answers_later_makes_it_be_told_again(node):
    node.bundle(ID)
    path = node.cgroup(ID)
    assert node.census.drain(1) == [known(path)]
    runtime = node.runtime((UID, sandbox(UID, {"app": "agent"})))
    assert node.census.drain(2) == []
    assert node.census.drain(node.census.due_ns) == []
    assert node.news() == [known(path, labels={"app": "agent"})]
    runtime.stop()


def test_a_pod_that_the_runtime_does_not_know_is_asked_for_again_a_few_times(node):
    runtime = node.runtime()
    node.bundle(ID)
    path = node.cgroup(ID)
    assert node.census.drain(1) == []
    assert node.news() == [known(path)]
    now_ns = 1
    for _ in census.CRI_RETRIES_NS:
        now_ns = now_ns + max(census.CRI_RETRIES_NS)
        assert node.census.drain(now_ns) == []
        assert select.select([node.census.fds[-1]], [], [], 30)[0]
        assert node.census.drain(now_ns) == []
    assert node.census.drain(now_ns + 10 * max(census.CRI_RETRIES_NS)) == []
    assert len(node.census.fds) == 1
    assert len(runtime.requests) == 1 + len(census.CRI_RETRIES_NS)
    runtime.stop()


def test_one_that_goes_before_it_was_told_is_not_told_of(node):
    runtime = node.runtime((UID, sandbox(UID)))
    node.bundle(ID)
    path = node.cgroup(ID)
    assert node.census.drain(1) == []
    shutil.rmtree(path)
    assert node.census.drain(2) == []
    assert select.select([node.census.fds[-1]], [], [], 30)[0]
    assert node.census.drain(3) == []
    runtime.stop()


def test_a_pod_that_is_gone_is_forgotten(node):
    node.bundle(ID)
    path = node.cgroup(ID)
    node.census.drain(1)
    shutil.rmtree(Path(path).parent)
    node.census.drain(2)
    assert not node.census._pods
    assert not node.census._entries


def test_a_bundle_that_names_another_pod_is_not_believed():
    place = place_of(f"kubepods/burstable/pod{UID}/{ID}")
    liar = Bundle(False, "kube-system", "dns", OTHER, "dns", "off")
    assert container_of("/c", place, liar, None) == Container("/c", ID, UID, "burstable")
    labels = container_of("/c", place, liar, Sandbox({"a": "b"}, {})).labels
    assert labels == {"a": "b"}
