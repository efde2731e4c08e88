"""The DaemonSet's pod beside a real containerd, with the rights it is given there: it governs pods made through CRI,
with nothing of governor in them.
"""

import fcntl
import json
import signal
import socket
import sqlite3
import subprocess
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from conftest import CGROUPS, GOVERNOR, ROOT, checked, wait_for
from cri_pods import CriPod, ask, block, ended, exec_sync, number
from daemon_set import DaemonSet

from governor import cgroup, pins
from governor.loan import Loan
from governor.restore import restore
from tests.probes import answer
from tests.screen import Screen

POLICY = """
[select]
namespace = ["agents"]

[archive]
globs = ["/tmp/*.jsonl", "/tmp/compacted"]

[compact]
exec = ["/usr/bin/sh", "-c", "id -u > /tmp/compacted; grep -h CapEff /proc/self/status >> /tmp/compacted"]
settle = "1s"
"""
USER, PORT, HEALTH = 1500, 8099, 9464


class Node:
    """The daemon, and the pods of the tests."""

    def __init__(self, tmp_path, daemon, state):
        self.tmp_path, self.pods, self.count = tmp_path, [], 0
        self.daemon, self.state = daemon, state
        self.said("begun")

    def pod(self, namespace, limit_mib, *words, fake="agent", systemd=False):
        """A container that keeps its session in a file system of its own, and bursts once told so."""
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
        given = {"agent": ["/tmp/s.jsonl", *words, "--begin", "/told/begin"], "holder": ["/told", str(port)]}
        argv = ["/usr/bin/python3", f"{ROOT}/tests/fakes/{fake}.py", *given[fake]]
        pod = CriPod(uid, name, namespace, limit_mib, argv=argv, mounts=mounts, user=USER, systemd=systemd)
        pod.go, pod.termination_log, pod.told, pod.port = (told / "begin").touch, told / "log", told, port
        self.pods.append(pod)
        return pod

    def said(self, kind, pod=None):
        """The last line of a kind in the journal of a pod's container, or of the node."""
        name = f"containers/{pod.id}.ndjson" if pod else "journal-node.ndjson"

        def line():
            assert self.daemon.pids, self.daemon.log()
            path = self.state / name
            lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
            return next((read for read in map(json.loads, reversed(lines)) if read["kind"] == kind), None)

        try:
            return wait_for(line, what=f"a line {kind}")
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.daemon.log()}") from None

    def protects(self, pod):
        """Once it does, by BPF, and knows the agent."""
        wait_for(lambda: self.said("protecting", pod)["source"] == "bpf")
        self.said("agent", pod)
        wait_for(lambda: "ready" in pod.log.read_text(), what=f"the agent: {pod.log.read_text()}")

    def close(self):
        for pod in self.pods:
            print(pod.log.read_text())
            pod.close()
        print(self.daemon.log())
        self.daemon.close()


REFLEX = CGROUPS / "governor-reflex-node"


@pytest.fixture(scope="module")
def node(containerd, tmp_path_factory):
    """One daemon for all tests: under emulation it takes a minute to begin."""
    path = tmp_path_factory.mktemp("node")
    (path / "policies").mkdir()
    (path / "policies/10-agents.toml").write_text(POLICY)
    early = CriPod(str(uuid.uuid4()), "early", "shop", 32)
    made = Node(path, DaemonSet(path, path / "policies", path / "state"), path / "state")
    made.early = early
    yield made
    made.close()


def test_it_reads_and_brakes_from_outside_its_own_pod(node):
    reflex_pid = node.said("reflex_started")["pid"]
    assert cgroup.memcg_of(reflex_pid) == str(REFLEX)
    assert cgroup.memcg_of(node.daemon.pids[0]) == str(node.daemon.memcg)
    assert answer(HEALTH, 5, "/healthz") == 200


def test_the_root_of_a_container_that_has_ended_stays_mounted_nowhere(node):
    mounts = Path(f"/proc/{node.daemon.pids[0]}/mountinfo")
    assert f"/{node.early.id}/rootfs " in mounts.read_text()  # it was there when the daemon's pod was made
    node.early.close()
    wait_for(lambda: node.early.id not in mounts.read_text(), what=f"its end: {mounts.read_text()}")


def test_its_pods_are_watched_from_within_its_own_and_from_the_node(node, tmp_path):
    """As over `kubectl exec -it`: by the names of pods, with the daemon's rights, in what memory it has left."""
    governed, other = node.pod("agents", 128, "touch", "--rate-mb", "8"), node.pod("shop", 64, "none")
    node.protects(governed)
    name, pid = f"agents/{governed.name}", (governed.container / "cgroup.procs").read_text().split()[0]
    inside = ["ctr", "-n", "k8s.io", "task", "exec", "--exec-id"]

    def said_inside(*words):
        return checked(*inside, "once", node.daemon.id, "governor", *words).splitlines()

    every = [json.loads(line) for line in said_inside("watch", "--once", "--json")]
    names = [line["target"]["name"] for line in every if line["type"] == "sample"]
    assert names.index(f"{name}/agent") < names.index(f"shop/{other.name}/agent")  # the governed ones first
    by_pid = json.loads(said_inside("watch", pid, "--once", "--json")[-1])
    assert by_pid["target"]["cgroup"] == str(governed.container)
    source = json.loads(said_inside("watch", f"shop/{other.name}", "--json", "--for", "0")[0])["source"]
    assert "no BPF: compiling wants 320 MiB" in source
    words = [*inside, "seen", "--tty", node.daemon.id, "env", "TERM=xterm", "governor", "watch", name]
    screen = Screen(tmp_path, words)
    until = subprocess.Popen([GOVERNOR, "watch", name, "--json", "--until", "crossing", "--for", "60"], stdout=-1)
    try:
        screen.shows(f"{name}/agent by governor {node.daemon.pids[0]}", "compact at 70 %", "python3")
        assert until.stdout.readline()  # it has begun
        governed.go()
        said = [json.loads(line) for line in until.communicate()[0].splitlines()]
        assert until.returncode == 10
        assert said[-1]["type"] == "end" and said[-1]["name"] == f"{name}/agent"
        screen.shows("the memcg is gone", "terminating", "agent_ended", "thawed", seconds=60)
        screen.keys("q")
        screen.shows("ended with 0")
    finally:
        until.kill()
        screen.close()


def test_oomkilled_without_and_saved_with_governor(node, tmp_path):
    stranger, ours = node.pod("shop", 128, "touch"), node.pod("agents", 128, "touch", "--rate-mb", "8")
    node.protects(ours)
    stranger.go()
    wait_for(lambda: b"OOMKilled" in stranger.status())
    is_saved(node, ours, tmp_path)


def is_saved(node, ours, tmp_path):
    """Which takes all of the daemon's rights."""
    ours.go()
    node.said("archived", ours)
    wait_for(lambda: not (ours.container / "cgroup.procs").exists() or not ours.container.exists())
    assert b"OOMKilled" not in ours.status()
    assert node.said("terminating", ours)["sent"]
    wait_for(lambda: ours.termination_log.read_text().startswith("governor: terminated: "))
    # The session was in the container's own file system, and compact ran there, as its user, with no right.
    for manifest in sorted((node.state / "archive").glob("*/manifest.json")):  # the second holds what has changed
        restore(node.state / "archive", manifest.parent.name, tmp_path / "restored", overwrite=True)
    compacted = (tmp_path / "restored/tmp/compacted").read_text().split()
    assert compacted == [str(USER), "CapEff:", "0000000000000000"]
    assert (tmp_path / "restored/tmp/s.jsonl").exists()


def hold(pod, value):
    """As the brake does, for as long as it takes to ask."""
    (pod.container / "cgroup.freeze").write_text(str(value))
    wait_for(lambda: f"frozen {value}" in (pod.container / "cgroup.events").read_text(), what="the freezer")


def names(pod):
    """Of its processes, as the kernel has them."""
    pids = (pod.container / "cgroup.procs").read_text().split()
    return [Path("/proc", pid, "comm").read_text().strip() for pid in pids]


def is_held(pod):
    return (pod.container / "cgroup.freeze").read_text() == "1\n"


def refused(pod, argv, timeout_s):
    with pytest.raises(grpc.RpcError) as raised:
        exec_sync(pod.id, argv, timeout_s)
    return raised.value


def test_what_probes_see_of_a_container_that_is_held(node):
    pod = node.pod("agents", 128, fake="holder")
    node.protects(pod)
    assert exec_sync(pod.id, ["/usr/bin/true"], 20) == 0
    assert exec_sync(pod.id, ["/usr/bin/false"], 20) == 1
    assert answer(pod.port, 20) == 200
    with ThreadPoolExecutor() as pool:
        begun = pool.submit(refused, pod, ["/usr/bin/sleep", "100"], 3)
        wait_for(lambda: "sleep" in names(pod), what="the command's start")
        hold(pod, 1)
        assert answer(pod.port, 1) == 0
        socket.create_connection(("127.0.0.1", pod.port), 1).close()
        error = refused(pod, ["/usr/bin/true"], 20)
        assert "paused" in error.details() and error.code() is grpc.StatusCode.UNKNOWN  # not DEADLINE_EXCEEDED
        assert begun.result().code() is grpc.StatusCode.DEADLINE_EXCEEDED  # while it is held
        late = pool.submit(answer, pod.port, 60)
        assert not ended(pod.id)
        hold(pod, 0)
        assert late.result() == 200
    assert exec_sync(pod.id, ["/usr/bin/true"], 20) == 0


def test_who_waits_for_a_lock_of_one_that_is_held_waits_no_longer_than_the_loan(node):
    pod = node.pod("agents", 128, fake="holder")
    node.protects(pod)

    def flock():
        with (pod.told / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
        return time.monotonic()

    def write(patience_s):
        base = sqlite3.connect(pod.told / "base.db", timeout=patience_s)
        try:
            with base:
                base.execute("insert into kept values (1)")
        finally:
            base.close()
        return time.monotonic()

    node.daemon.signal(signal.SIGSTOP)  # so that nothing is decided: the longest loan there is
    try:
        pod.go()
        wait_for(lambda: is_held(pod), what="the brake")
        (pod.told / "enough").touch()
        with ThreadPoolExecutor() as pool:
            waiting = [pool.submit(flock), pool.submit(write, 20), pool.submit(answer, pod.port, 20)]
            with pytest.raises(sqlite3.OperationalError, match="locked"):
                write(0.2)
            assert is_held(pod)
            flock_s, write_s, status = [each.result() for each in waiting]
    finally:
        node.daemon.signal(signal.SIGCONT)
    held_s, thawed_s = node.said("braked", pod)["frozen_ns"] / 1e9, node.said("thawed", pod)["at_ns"] / 1e9
    assert Loan.LOAN_NS / 1e9 <= thawed_s - held_s < 2 * Loan.LOAN_NS / 1e9
    assert thawed_s < min(flock_s, write_s)
    assert status == 200
    assert not ended(pod.id)


def test_a_limit_that_is_resized_counts_at_once(node):
    pod = node.pod("agents", 64, "touch", "--total-mb", "96")
    node.protects(pod)
    pod.resize(512)
    pod.go()
    wait_for(lambda: int((pod.container / "memory.current").read_text()) > 96 << 20)
    [told] = [line for line in checked(GOVERNOR, "status", "--json").splitlines() if pod.id in line]
    assert str(512 << 20) in told
    assert "braked" not in (node.state / f"containers/{pod.id}.ndjson").read_text()


@pytest.mark.parametrize("systemd", [False, True], ids=["cgroupfs", "systemd"])
def test_a_container_that_ends_while_it_is_held_is_let_go(node, systemd):
    pod = node.pod("agents", 128, "touch", systemd=systemd)
    node.protects(pod)
    pod.go()
    node.said("braked", pod)
    pod.close()
    node.pods.remove(pod)
    node.said("memcg_gone", pod)
    other = node.pod("agents", 64, "none", systemd=systemd)
    node.protects(other)


def test_when_its_pod_is_deleted_the_programs_go_first_and_nobody_is_left_held(node):
    pod = node.pod("agents", 128, "touch", "--rate-mb", "20")
    node.protects(pod)
    assert node.daemon.run_pre_stop() == 0
    assert pins.current("node") is None
    wait_for(lambda: node.said("protecting", pod)["source"] == "psi", what="polling")
    assert answer(HEALTH, 5, "/healthz") == 503
    node.daemon.signal(signal.SIGSTOP)
    pod.go()
    wait_for(lambda: is_held(pod), what="the brake")
    node.daemon.signal(signal.SIGCONT)
    ask("StopContainer", block(1, node.daemon.id) + number(2, 60))
    assert b"Completed" in ended(node.daemon.id)
    assert ended(pod.id) or not is_held(pod)  # what grows on is the kernel's then
    assert not REFLEX.exists()
    assert not Path("/run/governor/node.knobs").exists()
