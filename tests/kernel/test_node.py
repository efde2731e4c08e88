"""`governor daemon` on a real kernel: memcgs where a kubelet makes them, bundles as a runtime writes them."""

import itertools
import json
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from conftest import INSTANCE, Container, in_a_fork

from governor import bpflib, cgroup, instance, record
from tests.journal_lines import lines_of
from tests.probes import answer
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

SELECTS = '[select]\nnamespace = ["agents"]\n\n[archive]\nglobs = ["{sessions}/*.jsonl"]\n'
HEALTH = 9464
BUNDLE = "run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/config.json"


class Node:
    """A kubelet's part of the cgroup tree, a runtime's bundles, and the daemon."""

    def __init__(self, tmp_path):
        self.tmp_path, self.host = tmp_path, tmp_path / "host"
        self.policies, self.state = tmp_path / "policies", tmp_path / "state"
        self.policies.mkdir()
        (self.policies / "10-agents.toml").write_text(SELECTS.format(sessions=tmp_path))
        self.root = Path(cgroup.ROOT, "kubepods")
        self.pods, self.daemons, self.numbers = [], [], itertools.count()
        self.directory(self.root)
        self.directory(self.root / "burstable")

    def directory(self, path):
        path.mkdir(exist_ok=True)
        (path / "cgroup.subtree_control").write_text("+memory +pids")

    def pod(self, limit_mib, namespace="agents", kind="container", pod_limit_mib=0):
        above = Container(f"pod{uuid.UUID(int=next(self.numbers))}", pod_limit_mib, parent=self.root / "burstable")
        self.directory(above.path)
        return self.container(above, limit_mib, namespace, kind)

    def container(self, above, limit_mib, namespace="agents", kind="container"):
        number = len(self.pods)
        container_id = f"{number:064x}"
        said = {"container-type": kind, "sandbox-namespace": namespace, "container-name": "agent"}
        said |= {"sandbox-name": f"pod-{number}"}
        bundle = self.host / BUNDLE.format(id=container_id)
        bundle.parent.mkdir(parents=True)
        annotations = {f"io.kubernetes.cri.{key}": value for key, value in said.items()}
        config = {"annotations": annotations, "process": {"env": []}, "linux": {"namespaces": []}}
        bundle.write_text(json.dumps(config))
        inner = Container(container_id, limit_mib, parent=above.path)
        inner.id, inner.above = container_id, above
        self.pods.append(inner)
        return inner

    def daemon(self, *options):
        argv = ["governor", "daemon", "--policies", self.policies, "--state", self.state, "--host-root", self.host]
        argv = [str(word) for word in (*argv, "--instance", INSTANCE, *options)]
        with (self.tmp_path / "daemon.log").open("ab") as log:
            self.daemons.append(subprocess.Popen(argv, stdout=log, stderr=log, preexec_fn=in_a_fork(argv)))
        self.process = self.daemons[-1]
        return self

    def log(self):
        return (self.tmp_path / "daemon.log").read_text()

    def lines(self, pod, kind):
        path = self.state / ("journal-node.ndjson" if pod is None else f"containers/{pod.id}.ndjson")
        return [line for line in lines_of(path) if line["kind"] == kind]

    def await_line(self, pod, kind, seconds=60):
        try:
            return wait_for(lambda: self.lines(pod, kind), seconds, f"a line {kind}")[-1]
        except AssertionError as error:
            raise AssertionError(f"{error}:\n{self.log()}") from None

    def stop(self, process):
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        return process.wait(timeout=30)

    def close(self):
        for process in self.daemons:
            self.stop(process)
        for pod in self.pods:
            pod.close()
        for above in {pod.above.path: pod.above for pod in self.pods}.values():
            above.close()
        for path in (self.root / "burstable", self.root):
            path.rmdir()
        print(self.log())


@pytest.fixture
def node(tmp_path, loaded):
    made = Node(tmp_path)
    yield made
    made.close()


def test_only_who_is_selected_is_saved_and_the_others_go_on(node, tmp_path):
    first, second, stranger = node.pod(128), node.pod(128), node.pod(128, namespace="shop")
    sandbox = node.pod(64, kind="sandbox")
    agents = [pod.agent(tmp_path / f"{name}.jsonl", "touch") for name, pod in (("first", first), ("second", second))]
    victim = stranger.agent(tmp_path / "stranger.json", "touch")
    sandbox.start("sleep", "600")
    node.daemon()
    for pod in (first, second):
        assert node.await_line(pod, "protecting")["source"] == "bpf"
        node.await_line(pod, "agent")
    late = node.pod(128)
    third = late.agent(tmp_path / "late.jsonl", "touch")
    assert node.await_line(late, "protecting")["source"] == "bpf"
    node.await_line(late, "agent")

    agents[0].go()
    assert agents[0].wait(timeout=60) == 143, node.log()
    assert (tmp_path / "first.jsonl.saved").exists()
    assert first.events()["oom_kill"] == 0
    third.go()
    assert third.wait(timeout=60) == 143, node.log()
    victim.go()
    assert victim.wait(timeout=60) == -signal.SIGKILL  # the kernel's: nobody selected it
    assert agents[1].poll() is None
    governed = {line["container"]["pod"] for line in node.lines(None, "governed")}
    assert governed == {"pod-0", "pod-1", "pod-4"}
    assert "No such" not in node.log()


def test_a_container_that_goes_is_let_go_and_its_slot_is_used_again(node):
    node.daemon()
    node.await_line(None, "begun")
    before = set(instance.run_directory().glob("memcg-*"))
    for _ in range(3):
        pod = node.pod(64)
        pod.start("sleep", "600")
        assert node.await_line(pod, "protecting")["source"] == "bpf"
        pod.close()
        node.await_line(pod, "memcg_gone")
    assert [line["slot"] for line in node.lines(None, "governed")] == [0, 0, 0]
    wait_for(lambda: set(instance.run_directory().glob("memcg-*")) <= before, what="no file left of them")
    descriptors = len(os.listdir(f"/proc/{node.process.pid}/fd"))
    pod = node.pod(64)
    pod.start("sleep", "600")
    node.await_line(pod, "protecting")
    pod.close()
    node.await_line(pod, "memcg_gone")
    wait_for(lambda: len(os.listdir(f"/proc/{node.process.pid}/fd")) <= descriptors)


def test_beside_bpf_no_memcg_costs_a_kernel_thread(node):
    pod = node.pod(64)
    pod.start("sleep", "600")
    node.daemon()
    wait_for(lambda: any(line["source"] == "bpf" for line in node.lines(pod, "protecting")))
    reflex_pid = node.await_line(None, "reflex_started")["pid"]
    opened = [os.readlink(each) for each in Path(f"/proc/{reflex_pid}/fd").iterdir()]
    assert any(path.endswith("memory.events") for path in opened)
    assert not any(path.endswith("memory.pressure") for path in opened)


def test_health_fails_while_the_loop_stalls_and_once_the_programs_are_gone(node, loaded):
    pod = node.pod(64)
    pod.start("sleep", "600")
    node.daemon("--listen", f"127.0.0.1:{HEALTH}")
    wait_for(lambda: any(line["source"] == "bpf" for line in node.lines(pod, "protecting")))
    wait_for(lambda: answer(HEALTH, 5, "/readyz") == 200, what="a start that is over")
    assert answer(HEALTH, 5, "/healthz") == 200
    node.process.send_signal(signal.SIGSTOP)
    try:
        assert answer(HEALTH, 1, "/healthz") == 0
    finally:
        node.process.send_signal(signal.SIGCONT)
    assert answer(HEALTH, 5, "/healthz") == 200
    away = loaded.rename(loaded.with_name("away"))  # as after governor unload, but nobody need compile them again
    try:
        wait_for(lambda: answer(HEALTH, 5, "/healthz") == 503, what="the end of the programs")
        assert answer(HEALTH, 5, "/readyz") == 503
    finally:
        away.rename(loaded)


def test_a_dry_run_touches_nothing(node, tmp_path):
    pod = node.pod(96)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20")
    node.daemon("--dry-run")
    node.await_line(pod, "agent")
    agent.go()
    assert agent.wait(timeout=120) == -signal.SIGKILL
    said = [line["text"] for line in node.lines(pod, "dry_run")]
    assert any(text.startswith("dry run: would brake at ") for text in said)
    assert "dry run: would archive" in said
    assert not node.lines(pod, "braked")
    assert (pod.read("cgroup.freeze"), pod.read("memory.high")) == ("0", "max")
    assert not list((node.state / "archive").glob("*"))


def test_a_sidecar_that_sits_still_is_left_alone(node, tmp_path):
    pod = node.pod(256, pod_limit_mib=128)
    beside = node.container(pod.above, 256)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20")
    sidecar = beside.agent(tmp_path / "sidecar.jsonl", "touch", "--picture-mb", "32")
    node.daemon()
    for one in (pod, beside):
        node.await_line(one, "agent")
        wait_for(lambda one=one: any(line["source"] == "bpf" for line in node.lines(one, "protecting")))
    agent.go()
    assert agent.wait(timeout=60) in (143, -signal.SIGKILL), node.log()
    node.await_line(pod, "archived")
    assert sidecar.poll() is None
    assert not node.lines(beside, "braked"), node.log()


def test_a_page_of_its_own_that_crosses_the_level_to_which_others_filled_the_pod_is_no_burst(node, tmp_path):
    pod = node.pod(512, pod_limit_mib=512)
    stranger = node.container(pod.above, 512, namespace="shop")
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--total-mb", "1")
    neighbour = stranger.agent(tmp_path / "neighbour.json", "touch", "--total-mb", "64")
    node.daemon()
    wait_for(lambda: any(line["source"] == "bpf" for line in node.lines(pod, "protecting")))
    neighbour.go()
    assert neighbour.stdout.readline() == "burst over\n"
    held_bytes = cgroup.Memcg(pod.above.path).memory_state().unreclaimable_bytes
    pod.above.write("memory.max", (held_bytes + (1 << 19)) * 10 // 9)
    agent.go()
    assert agent.stdout.readline() == "burst over\n"
    assert "false alarm" in node.await_line(pod, "thawed")["text"]
    assert not node.lines(pod, "braked"), node.log()


def test_policies_are_read_again(node):
    pod = node.pod(64, namespace="shop")
    pod.start(sys.executable, "-c", "import time; time.sleep(600)")
    node.daemon()
    node.await_line(None, "begun")
    policy = node.policies / "20-shop.toml"
    policy.write_text('[select]\nnamespace = ["shop"]\n')
    node.process.send_signal(signal.SIGHUP)
    assert node.await_line(pod, "protecting")
    policy.write_text("[select]\nnamespace = 7\n")
    node.process.send_signal(signal.SIGHUP)
    assert "20-shop.toml:2" in node.await_line(None, "policy_refused")["text"]
    policy.unlink()
    node.process.send_signal(signal.SIGHUP)
    node.await_line(None, "let_go")


def test_a_daemon_that_was_killed_leaves_nobody_frozen_and_is_followed(node, tmp_path):
    pod = node.pod(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20")
    node.daemon()
    node.await_line(pod, "protecting")
    node.process.kill()
    node.process.wait()
    node.daemon()
    wait_for(lambda: len(node.lines(pod, "begin")) == 2, 60)
    wait_for(lambda: len(node.lines(pod, "protecting")) == 2, 60)
    agent.go()
    assert agent.wait(timeout=60) == 143, node.log()
    assert "frozen 0" in pod.read("cgroup.events")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_daemon_that_ends_while_it_holds_leaves_nobody_frozen_nor_who_went_meanwhile(node, tmp_path, how):
    held, goes = node.pod(256), node.pod(64)
    agent = held.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "40", "--total-mb", "234")
    goes.start("sleep", "600")
    node.daemon()
    for pod in (held, goes):
        node.await_line(pod, "protecting")
    first, reflex = node.process, node.await_line(None, "reflex_started")["pid"]
    first.send_signal(signal.SIGSTOP)  # so that nothing is decided: frozen is frozen
    agent.go()
    wait_for(lambda: held.read("cgroup.freeze") == "1", what="the brake")
    first.send_signal(how)
    first.send_signal(signal.SIGCONT)
    assert first.wait(timeout=30) == (-how if how == signal.SIGKILL else 0)
    wait_for(lambda: not Path("/proc", str(reflex)).exists(), what="the end of reflex")
    assert (held.read("cgroup.freeze"), held.read("memory.high")) == ("0", "max")
    goes.close()
    node.daemon()
    wait_for(lambda: len(node.lines(None, "governed")) == 3, 60)
    assert node.lines(None, "governed")[2]["container"]["pod"] == "pod-0"


def test_who_finds_no_room_in_the_kernels_maps_is_polled_until_there_is(node, tmp_path, loaded, request):
    watch = bpflib.PinnedMap(bpflib.open_libbpf(), f"{loaded}/charge/watch")
    others = []

    def make_room():
        while others:
            watch.delete(record.CGROUP_ID.pack(others.pop()))

    request.addfinalizer(make_room)
    with pytest.raises(OSError, match="watch"):
        for number in itertools.count(1 << 40):
            watch.update(record.CGROUP_ID.pack(number), bytes(record.WATCH_BYTES))
            others.append(number)
    burst, calm = node.pod(128), node.pod(64)
    agent = burst.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20")
    calm.start("sleep", "600")
    node.daemon()
    node.await_line(burst, "agent")
    assert [node.await_line(pod, "protecting")["source"] for pod in (burst, calm)] == ["psi", "psi"]
    agent.go()
    assert agent.wait(timeout=60) == 143, node.log()
    make_room()
    wait_for(lambda: node.lines(calm, "protecting")[-1]["source"] == "bpf", 30)
    assert len(node.lines(None, "reflex_started")) == 1
