"""`governor daemon` in a pod's memcg, with no more rights than scripts/k8s gives it, and what becomes of its pod."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import INSTANCE
from test_node import Node

from governor import cgroup, outside, pins
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

K8S = Path(__file__).parent.parent.parent / "scripts" / "k8s"
OUTSIDE = Path(cgroup.ROOT, f"governor-reflex-{INSTANCE}")


def capabilities(kind, file="base/daemonset.yaml"):
    pod = yaml.safe_load((K8S / file).read_text())["spec"]["template"]["spec"]
    return pod[kind][0]["securityContext"]["capabilities"]["add"]


def with_only(names):
    """What setpriv wants, for a root that has these capabilities and can get no other."""
    return ["setpriv", f"--bounding-set=-all,{','.join(f'+{name.lower()}' for name in names)}", "--inh-caps=-all"]


def governor(*words):
    return [sys.executable, "-P", "-m", "governor", *map(str, words)]


class InPod(Node):
    """A daemon in a container of a pod of its own, as runtimes make one: with a cgroup namespace, not privileged."""

    def daemon(self, *options):
        self.own = self.pod(256, namespace="governor")
        command = governor("daemon", "--policies", self.policies, "--state", self.state, "--host-root", self.host)
        command += ["--instance", INSTANCE, "--no-load", *options]
        with (self.tmp_path / "daemon.log").open("ab") as log:
            argv = ["unshare", "--cgroup", *with_only(capabilities("containers")), *command]
            self.process = self.own.start(*argv, stdout=log, stderr=log)
        self.daemons.append(self.process)
        return self

    def reflex(self):
        return self.await_line(None, "reflex_started")["pid"]


def is_held(pod):
    """Frozen, and not for a false alarm."""
    was_frozen = pod.read("cgroup.freeze") == "1"
    time.sleep(0.1)
    return was_frozen and pod.read("cgroup.freeze") == "1"


def nobody_is_outside():
    return (OUTSIDE / "cgroup.procs").read_text() == ""


@pytest.fixture
def node(tmp_path, loaded):
    made = InPod(tmp_path)
    yield made
    made.close()


def test_who_is_frozen_when_the_pod_is_killed_goes_on(node, tmp_path):
    pod = node.pod(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch")
    node.daemon()
    assert node.await_line(pod, "protecting")["source"] == "bpf", node.log()
    node.await_line(pod, "agent")
    reflex = Path("/proc", str(node.reflex()))
    assert cgroup.memcg_of(reflex.name) == str(OUTSIDE), node.log()
    assert int((OUTSIDE / "memory.current").read_text()) < outside.MIN_BYTES
    status = dict(line.split(":\t") for line in (reflex / "status").read_text().splitlines() if ":\t" in line)
    assert status["VmLck"].strip() != "0 kB"
    assert (reflex / "oom_score_adj").read_text() == "-900\n"
    assert cgroup.memcg_of(node.process.pid) == str(node.own.path)

    node.process.send_signal(signal.SIGSTOP)  # so that nothing is decided: frozen is frozen
    agent.go()
    wait_for(lambda: is_held(pod), what="the brake")
    node.own.write("cgroup.kill", 1)
    wait_for(nobody_is_outside, what="the end of reflex")
    assert node.process.wait(timeout=10) == -signal.SIGKILL
    assert pod.read("cgroup.freeze") == "0"
    assert f"governor: reflex: {pod.path}: " in node.log()
    assert pod.read("memory.high") == "max"


def test_its_memcg_is_taken_over_and_goes_with_who_stops(node):
    for _ in range(2):
        pod = node.pod(64)
        pod.start("sleep", "600")
        node.daemon()
        node.await_line(pod, "protecting")
        node.own.write("cgroup.kill", 1)
        node.process.wait()
        wait_for(nobody_is_outside, what="the end of reflex")
    node.daemon()
    wait_for(lambda: len(node.lines(None, "outside")) == 3, 60)
    assert node.stop(node.process) == 0
    assert not OUTSIDE.exists()


def test_the_programs_are_loaded_with_no_more_than_the_init_container_may():
    options = ["load", "--instance", "least", "--json"]
    try:
        for file, attach in (("base/daemonset.yaml", "fentry"), ("components/kprobe/loader.yaml", "kprobe")):
            argv = [*with_only(capabilities("initContainers", file)), *governor(*options, "--attach", attach)]
            done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
            assert done.returncode == 0, done.stderr
            assert json.loads(done.stdout)["modules"]["charge"] == attach
            pins.unload("least")
    finally:
        pins.unload("least")
