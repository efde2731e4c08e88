"""A node of the tests in this directory: the DaemonSet's pod, and the pods that it governs or leaves alone."""

import uuid
from concurrent.futures import ThreadPoolExecutor

from conftest import ROOT, wait_for
from cri_pods import CriPod

from governor.restore import restore
from tests.journal_lines import lines_of

POLICIES = {
    "10-agents": """
[select]
namespace = ["agents"]

[archive]
globs = ["/tmp/*.jsonl", "/tmp/compacted"]

[compact]
exec = ["/usr/bin/sh", "-c", "id -u > /tmp/compacted; grep -h CapEff /proc/self/status >> /tmp/compacted"]
settle = "1s"
""",
    "20-labelled": '[select]\nlabel = ["ai=*"]\n',
    "30-gentle": "[select]\nselectable = true\n",
}
USER, PORT = 1500, 8099


class Node:
    """The daemon (a DaemonSet's pod), and the pods of the tests."""

    def __init__(self, tmp_path, daemon, state):
        self.tmp_path, self.pods, self.count = tmp_path, [], 0
        self.daemon, self.state = daemon, state
        self.said("begun")

    def pod(self, namespace, limit_mib, *words, fake="agent", first=(), **given):
        """A container that keeps its session in a file system of its own, and bursts once told so.

        `first`: what its command line begins with; `given`: of CriPod.
        """
        uid = str(uuid.uuid4())
        told = self.tmp_path / uid
        told.mkdir()
        told.chmod(0o777)
        mounts = [(path, path, True) for path in ("/usr", str(ROOT))]
        (told / "log").touch(0o666)  # as a kubelet makes it
        (told / "log").chmod(0o666)
        mounts += [(str(told), "/told", False), (str(told / "log"), "/dev/termination-log", False)]
        self.count += 1
        name, port = f"pod-{self.count}", PORT + self.count
        words_of = {"agent": ["/tmp/s.jsonl", *words, "--begin", "/told/begin"], "holder": ["/told", str(port)]}
        argv = [*first, "/usr/bin/python3", f"{ROOT}/tests/fakes/{fake}.py", *words_of[fake]]
        pod = CriPod(uid, name, namespace, limit_mib, argv=argv, mounts=mounts, **{"user": USER, **given})
        pod.go, pod.termination_log, pod.told, pod.port = (told / "begin").touch, told / "log", told, port
        self.pods.append(pod)
        return pod

    def asleep(self, namespace, **given):
        """A pod whose container sleeps."""
        self.count += 1
        self.pods.append(CriPod(str(uuid.uuid4()), f"pod-{self.count}", namespace, 64, **given))
        return self.pods[-1]

    def lines(self, kind, pod=None):
        """Of a kind, in the journal of a pod's container, or of the node."""
        name = f"containers/{pod.id}.ndjson" if pod else "journal-node.ndjson"
        return [line for line in lines_of(self.state / name) if line["kind"] == kind]

    def said(self, kind, pod=None, times=1):
        """The last of so many such lines, or of more."""

        def line():
            assert self.daemon.pids, self.daemon.log()
            found = self.lines(kind, pod)
            return found[-1] if len(found) >= times else None

        try:
            return wait_for(line, what=f"a line {kind}")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.daemon.log()}") from None

    def governs(self, container_id):
        """The last that was said of it."""

        def lines():
            return [line for line in self.lines("governed") if line["container"]["container_id"] == container_id]

        return wait_for(lines, what=f"the adoption of {container_id}")[-1]

    def protects(self, pod):
        """Once it does, by BPF, and knows the agent."""
        wait_for(lambda: self.said("protecting", pod)["source"] == "bpf")
        self.said("agent", pod)
        wait_for(lambda: "ready" in pod.log.read_text(), what=f"the agent: {pod.log.read_text()}")

    def close(self):
        for pod in self.pods:
            print(pod.log.read_text())
        with ThreadPoolExecutor() as pool:
            list(pool.map(CriPod.close, self.pods))
        print(self.daemon.log())
        self.daemon.close()


def is_saved(node, ours, tmp_path, user=USER):
    """Which takes all of the daemon's rights."""
    is_ended_with_care(node, ours)
    wait_for(lambda: ours.termination_log.read_text().startswith("governor: terminated: "))
    # The session was in the container's own file system, and compact ran there, as its user, with no right.
    for manifest in sorted((node.state / "archive").glob("*/manifest.json")):  # the second holds what has changed
        restore(node.state / "archive", manifest.parent.name, tmp_path / "restored", overwrite=True)
    compacted = (tmp_path / "restored/tmp/compacted").read_text().split()
    assert compacted == [str(user), "CapEff:", "0000000000000000"]
    assert (tmp_path / "restored/tmp/s.jsonl").exists()


def is_ended_with_care(node, ours):
    """It grows on, is archived, and ends by SIGTERM before the kernel kills it."""
    ours.go()
    node.said("archived", ours)
    wait_for(lambda: not (ours.container / "cgroup.procs").exists() or not ours.container.exists())
    assert b"OOMKilled" not in ours.status()
    assert node.said("terminating", ours)["sent"]
