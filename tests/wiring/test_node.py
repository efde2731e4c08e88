"""`governor daemon` beside a real containerd: pods made through CRI, with nothing of governor in them."""

import json
import signal
import subprocess
import uuid

import pytest
from conftest import GOVERNOR, ROOT, checked, wait_for
from cri_pods import CriPod

from governor.restore import restore

POLICY = """
[select]
namespace = ["agents"]

[archive]
globs = ["/tmp/*.jsonl", "/tmp/compacted"]

[compact]
exec = ["/usr/bin/sh", "-c", "id -u > /tmp/compacted; grep -h CapEff /proc/self/status >> /tmp/compacted"]
settle = "1s"
"""
USER = 1500


class Node:
    """The daemon, and the pods of one test."""

    def __init__(self, tmp_path):
        self.tmp_path, self.pods = tmp_path, []
        self.state = tmp_path / "state"
        policies = tmp_path / "policies"
        policies.mkdir()
        (policies / "10-agents.toml").write_text(POLICY)
        self.log_path = tmp_path / "daemon.log"
        with self.log_path.open("wb") as log:
            command = [GOVERNOR, "daemon", "--policies", policies, "--state", self.state]
            self.process = subprocess.Popen([str(word) for word in command], stdout=log, stderr=log)
        self.said("begun")

    def pod(self, namespace, limit_mib, burst, *options):
        """A container that keeps its session in a file system of its own, and bursts once told so."""
        uid = str(uuid.uuid4())
        told = self.tmp_path / uid
        told.mkdir()
        mounts = [(path, path, True) for path in ("/usr", "/lib", "/lib64", str(ROOT))]
        (told / "log").touch(0o666)  # as a kubelet makes it
        (told / "log").chmod(0o666)
        mounts += [(str(told), "/told", False), (str(told / "log"), "/dev/termination-log", False)]
        agent = ["/usr/bin/python3", f"{ROOT}/tests/fakes/agent.py", "/tmp/s.jsonl", burst, "--begin", "/told/begin"]
        name = f"pod-{len(self.pods)}"
        pod = CriPod(uid, name, namespace, limit_mib, argv=[*agent, *options], mounts=mounts, user=USER)
        pod.go, pod.termination_log = (told / "begin").touch, told / "log"
        self.pods.append(pod)
        return pod

    def said(self, kind, pod=None):
        """The last line of a kind in the journal of a pod's container, or of the node."""
        name = f"containers/{pod.id}.ndjson" if pod else "journal-node.ndjson"

        def line():
            assert self.process.poll() is None, self.log_path.read_text()
            path = self.state / name
            lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
            return next((read for read in map(json.loads, reversed(lines)) if read["kind"] == kind), None)

        try:
            return wait_for(line, what=f"a line {kind}")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log_path.read_text()}") from None

    def protects(self, pod):
        """Once it does, by BPF, and knows the agent."""
        wait_for(lambda: self.said("protecting", pod)["source"] == "bpf")
        self.said("agent", pod)
        wait_for(lambda: "ready" in pod.log.read_text(), what=f"the agent: {pod.log.read_text()}")

    def close(self):
        for pod in self.pods:
            print(pod.log.read_text())
            pod.close()
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=60)
        print(self.log_path.read_text())


@pytest.fixture(scope="module")
def node(containerd, tmp_path_factory):
    """One daemon for all tests: under emulation it takes a minute to begin."""
    made = Node(tmp_path_factory.mktemp("node"))
    yield made
    made.close()


def test_oomkilled_without_and_saved_with_governor(node, tmp_path):
    stranger, ours = node.pod("shop", 128, "touch"), node.pod("agents", 128, "touch", "--rate-mb", "8")
    node.protects(ours)
    stranger.go()
    wait_for(lambda: b"OOMKilled" in stranger.status())
    ours.go()
    node.said("archived", ours)
    wait_for(lambda: not (ours.container / "cgroup.procs").exists() or not ours.container.exists())
    assert b"OOMKilled" not in ours.status()
    assert node.said("terminating", ours)["sent"]
    assert ours.termination_log.read_text().startswith("governor: terminated: ")
    # The session was in the container's own file system, and compact ran there, as its user, with no right.
    for manifest in sorted((node.state / "archive").glob("*/manifest.json")):  # the second holds what has changed
        restore(node.state / "archive", manifest.parent.name, tmp_path / "restored", overwrite=True)
    compacted = (tmp_path / "restored/tmp/compacted").read_text().split()
    assert compacted == [str(USER), "CapEff:", "0000000000000000"]
    assert (tmp_path / "restored/tmp/s.jsonl").exists()


def test_a_limit_that_is_resized_counts_at_once(node):
    pod = node.pod("agents", 64, "touch", "--total-mb", "96")
    node.protects(pod)
    pod.resize(512)
    pod.go()
    wait_for(lambda: int((pod.container / "memory.current").read_text()) > 96 << 20)
    [told] = [json.loads(line) for line in checked(GOVERNOR, "status", "--json").splitlines()]
    assert str(512 << 20) in json.dumps(told)
    assert "braked" not in (node.state / f"containers/{pod.id}.ndjson").read_text()


def test_a_container_that_ends_while_it_is_held_is_let_go(node):
    pod = node.pod("agents", 128, "touch")
    node.protects(pod)
    pod.go()
    node.said("braked", pod)
    pod.close()
    node.pods.remove(pod)
    node.said("memcg_gone", pod)
    other = node.pod("agents", 64, "none")
    node.protects(other)
