"""The DaemonSet's pod beside a real containerd, with the rights it is given there: it governs pods made through CRI,
with nothing of governor in them.
"""

import fcntl
import json
import os
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
from conftest import CGROUPS, GOVERNOR, checked, sh, wait_for
from cri_pods import CriPod, ask, block, ended, exec_sync, number
from daemon_set import DaemonSet
from governed_node import POLICIES, Node, is_ended_with_care, is_saved

from governor import cgroup, pins
from governor.loan import Loan
from tests.probes import answer
from tests.screen import Screen

HEALTH = 9464
REFLEX = CGROUPS / "governor-reflex-node"


@pytest.fixture(scope="module")
def node(containerd, tmp_path_factory):
    """One daemon for all tests: under emulation it takes a minute to begin."""
    path = tmp_path_factory.mktemp("node")
    (path / "policies").mkdir()
    for name, text in POLICIES.items():
        (path / f"policies/{name}.toml").write_text(text)
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
    pod = node.pod("agents", 128, "touch", sandbox={"systemd": systemd})
    node.protects(pod)
    pod.go()
    node.said("braked", pod)
    pod.close()
    node.pods.remove(pod)
    node.said("memcg_gone", pod)
    other = node.pod("agents", 64, "none", sandbox={"systemd": systemd, "qos": "guaranteed"})
    node.protects(other)
    assert node.governs(other.id)["container"]["qos"] == "guaranteed"


@pytest.fixture(scope="module")
def chosen(node):
    """Pods that sleep, with what they are selected by; and the policy and the reason of each container's id."""
    both = node.asleep("shop", sandbox={"labels": {"ai": "claude"}})
    asks = both.start("asks", 64, environment={"GOVERNOR_POLICY": "30-gentle"})
    annotated = node.asleep("shop", sandbox={"annotations": {"governor.dev/policy": "30-gentle"}})
    first = node.asleep("agents", sandbox={"labels": {"ai": "claude"}})
    nobody = node.asleep("shop", sandbox={"labels": {"app": "shop"}})
    expected = {
        both.id: ("20-labelled", "the first that matches"),
        asks: ("30-gentle", 'environment GOVERNOR_POLICY = "30-gentle"'),
        annotated.id: ("30-gentle", 'annotation governor.dev/policy = "30-gentle"'),
        first.id: ("10-agents", "the first that matches"),
    }
    return (both, annotated, first, nobody), expected


def test_who_is_selected_by_what_its_runtime_knows_is_governed_as_meant(node, chosen):
    (both, *_, nobody), expected = chosen
    for each, (policy, reason) in expected.items():
        assert node.governs(each)["text"].endswith(f": governed by policy '{policy}': {reason}")
    known = node.governs(both.id)["container"]
    labels = {"ai": "claude", "io.kubernetes.pod.uid": both.uid}
    assert known == {
        "cgroup": str(both.container),
        "container_id": both.id,
        "pod_uid": both.uid,
        "qos": "burstable",
        "namespace": "shop",
        "pod": both.name,
        "name": "agent",
        "chosen_policy": "careful",
        "labels": labels,
        "annotations": {},
        "has_own_mounts": True,
    }
    node.said("wish_refused")  # the image's own, of "careful"
    [governor] = json.loads(checked(GOVERNOR, "status", "--json"))
    policies = {one["container_id"]: one["policy"] for one in governor["targets"]}
    assert policies | {each: policy for each, (policy, _) in expected.items()} == policies
    assert not policies.keys() & {nobody.id, *(pod.sandbox for pod in node.pods)}  # nor a pause container


def test_explain_says_of_them_what_the_daemon_decided(node, chosen):
    pods, expected = chosen
    inside = ["ctr", "-n", "k8s.io", "task", "exec", "--exec-id", "explain", node.daemon.id, "governor"]

    def explained(pod):
        """Of one in the daemon's own pod, in what memory that has left; of the others on the node."""
        begin, end = (inside, []) if pod is pods[0] else ([GOVERNOR], [f"--policies={node.tmp_path}/policies"])
        done = sh(*begin, "policy", "explain", f"{pod.namespace}/{pod.name}", "--json", *end)
        assert done.returncode == (0 if any(each in done.stdout for each in expected) else 3), done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    with ThreadPoolExecutor() as pool:
        told = {one["container"]["container_id"]: one for said in pool.map(explained, pods) for one in said}
    *_, nobody = pods
    why_not = told.pop(nobody.id)
    assert {each: (one["policy"], one["reason"]) for each, one in told.items()} == expected
    assert (why_not["governed"], why_not["reason"]) == (False, "no policy matches")
    assert [one["key"] for one in why_not["verdicts"]] == ["select.namespace", "select.label", ""]
    assert 'found "careful", which is no policy' in why_not["wishes"][0]["text"]


NEST = """
mkdir /tmp/cgroup; mount -t cgroup2 cgroup /tmp/cgroup; mkdir /tmp/cgroup/{id}
echo $$ > /tmp/cgroup/{id}/cgroup.procs; echo +memory > /tmp/cgroup/cgroup.subtree_control; exec "$0" "$@"
"""


def test_a_cgroup_that_a_container_makes_below_its_own_is_part_of_it(node, tmp_path):
    inner = "0123456789abcdef" * 4
    first = ["/usr/bin/sh", "-ec", NEST.format(id=inner)]
    words = ("touch", "--rate-mb", "8")
    pod = node.pod("agents", 128, *words, first=first, user=0, capabilities=["SYS_ADMIN"])
    node.protects(pod)
    assert not (pod.container / "cgroup.procs").read_text()
    assert (pod.container / inner / "cgroup.procs").read_text()
    is_saved(node, pod, tmp_path, user=0)
    assert not any(inner in line["cgroup"] for line in node.lines("governed"))


def test_limits_that_are_lowered_to_just_above_what_is_held_count_at_once(node):
    words = ("touch", "--start-mb", "90", "--rate-mb", "8")
    own, above = node.pod("agents", 256, *words), node.pod("agents", 256, *words)
    (above.cgroup / "memory.max").write_text(str(256 << 20))
    for pod in (own, above):
        node.protects(pod)
    lowered = [int((pod.container / "memory.current").read_text()) * 100 // 92 >> 20 for pod in (own, above)]
    own.resize(lowered[0])
    (above.cgroup / "memory.max").write_text(str(lowered[1] << 20))
    for pod, limit_mib in zip((own, above), lowered, strict=True):
        assert node.said("braked", pod)["state"]["max_bytes"] == limit_mib << 20
    for pod in (own, above):
        is_ended_with_care(node, pod)


def test_a_daemon_that_is_killed_with_reflex_is_followed_by_one_that_thaws_and_knows(node, chosen):
    _, expected = chosen
    goes = node.asleep("agents")
    held = node.pod("agents", 192, "touch", "--start-mb", "130", "--total-mb", "40", "--rate-mb", "20")
    node.said("protecting", goes)
    node.protects(held)
    node.said("delivered", held)
    begun, reflex_pid = len(node.lines("begun")), node.said("reflex_started")["pid"]
    node.daemon.signal(signal.SIGSTOP)  # so that nothing is decided
    held.go()
    wait_for(lambda: is_held(held), what="the brake")
    os.kill(reflex_pid, signal.SIGKILL)  # before its loan is over
    node.daemon.signal(signal.SIGKILL)
    wait_for(lambda: ended(node.daemon.id), what="the daemon's end")
    node.pods.remove(goes)
    goes.close()
    comes = node.asleep("agents")
    assert is_held(held)  # nobody is left who would thaw it
    node.daemon.begin()
    since_ns = node.said("begun", times=begun + 1)["monotonic_ns"]
    wait_for(lambda: not is_held(held), what="its thaw")
    assert any(held.id in line["text"] and "thawed" in line["text"] for line in node.lines("restored"))
    node.said("protecting", held, times=2)
    node.said("protecting", comes)
    for each, (policy, _) in expected.items():
        wait_for(lambda each=each: node.governs(each)["monotonic_ns"] > since_ns, what="its adoption")
        assert f"policy '{policy}'" in node.governs(each)["text"]
    assert node.governs(goes.id)["monotonic_ns"] < since_ns
    before, after = (line["state"] for line in node.lines("begin", held))
    assert (before["in_episode"], after["in_episode"]) == (False, True)
    assert after["compact"]["delivered_ns"]
    assert not ended(held.id)


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
