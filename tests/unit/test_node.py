"""node: who is governed, and who is not any more; memcgs are directories of plain files, and nothing brakes them."""

import errno
import json
import os
import shutil
import subprocess
import time
import uuid
from pathlib import Path

import pytest
from test_loop import Memcg

from governor import instance, state_file
from governor.model import State
from governor.node import Node, Wanted
from governor.state_file import Saved

BUNDLE = "run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/config.json"
DAY_S = 86400


class Machine:
    """A kubelet's cgroups, a runtime's bundles, one policy, and the node's daemon, turned by hand."""

    def __init__(self, top):
        self.top, self.cgroups = top, top / "cgroup"
        (top / "policies").mkdir()
        self.policy = top / "policies/10-agents.toml"
        self.policy.write_text('[select]\nnamespace = ["agents"]\n')
        (self.cgroups / "kubepods/burstable").mkdir(parents=True)
        self.wanted = Wanted(
            instance="test-node",
            knob_path=str(top / "knobs"),
            policies=str(top / "policies"),
            state=str(top / "state"),
            cgroup_root=str(self.cgroups),
            host_root=str(top / "host"),
            source="poll",
        )
        self.node = None

    def begin(self):
        self.node = Node(self.wanted)
        self.node._journal.begin()
        return self.node

    def path(self, number):
        return self.cgroups / f"kubepods/burstable/pod{uuid.UUID(int=number)}" / f"{number:064x}"

    def container(self, number, namespace="agents", pod="", environment=()):
        bundle = self.top / "host" / BUNDLE.format(id=f"{number:064x}")
        bundle.parent.mkdir(parents=True)
        said = {"container-type": "container", "sandbox-namespace": namespace, "sandbox-name": pod or f"pod-{number}"}
        said["container-name"] = pod
        annotations = {f"io.kubernetes.cri.{key}": value for key, value in said.items()}
        bundle.write_text(json.dumps({"annotations": annotations, "process": {"env": environment}}))
        return Memcg(self.path(number))

    def turn(self):
        """One turn after a rescan; the pods that are governed then."""
        self.node._census._discovery.due_ns = self.node._census.due_ns = 0
        while self.node._turn(time.monotonic_ns()):
            pass
        return sorted(there.container.pod for there in self.node._there.values() if there.slot is not None)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path / "run")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    made = Machine(tmp_path)
    yield made
    if made.node:
        made.node.loop._end()
        made.node._observation.close()


def test_who_comes_while_it_stops_is_left_to_whoever_follows(machine):
    machine.container(1)
    machine.begin()
    assert machine.turn() == ["pod-1"]
    machine.node.loop._stop()
    machine.container(2)
    assert machine.turn() == ["pod-1"]


def test_policies_that_were_read_again_are_those_that_choose(machine):
    machine.container(1)
    machine.container(2, namespace="shop")
    machine.begin()
    assert machine.turn() == ["pod-1"]
    machine.policy.write_text('[select]\nnamespace = ["shop"]\n')
    machine.node._read_policies_again()
    assert machine.turn() == ["pod-2"]


def test_why_a_wish_does_not_count_is_said_once_until_it_is_for_another_reason(machine, capfd):
    machine.container(1, environment=["GOVERNOR_POLICY=careful"])
    machine.begin()
    for _ in range(3):
        assert machine.turn() == ["pod-1"]
        machine.node._read_policies_again()
    assert capfd.readouterr().err.count("which is no policy") == 1
    (machine.top / "policies/20-careful.toml").write_text('name = "careful"\n[select]\nnamespace = ["shop"]\n')
    machine.node._read_policies_again()
    machine.turn()
    assert capfd.readouterr().err.count("which is not selectable") == 1


def remembered(target, age_s):
    path = state_file.path_for(str(target))
    state_file.save(path, Saved(str(target), (0, 0), State()))
    os.utime(path, (time.time() - age_s,) * 2)
    return path


def test_what_is_remembered_of_containers_that_went_meanwhile_goes_a_day_later(machine):
    there = machine.container(1)
    kept = {
        "a container that is there": remembered(there.path, 2 * DAY_S),
        "gone for an hour": remembered(machine.path(2), 3600),
        "a service, which comes again": remembered(Path("/sys/fs/cgroup/system.slice/agent.service"), 2 * DAY_S),
        "another file": instance.state_directory() / "state-odd.json",
    }
    kept["another file"].write_text("[]")
    os.utime(kept["another file"], (0, 0))
    gone = remembered(machine.path(3), 2 * DAY_S)
    assert state_file.sweep_containers(machine.wanted.cgroup_root) == 1
    assert not gone.exists()
    assert {what for what, path in kept.items() if not path.exists()} == set()


def test_nothing_stays_of_a_container_that_went_while_it_was_added(machine, monkeypatch):
    machine.container(1)
    node = machine.begin()

    def gone(*_, **__):
        shutil.rmtree(machine.path(1))
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr(node.loop, "add", gone)
    assert machine.turn() == []
    assert list(instance.run_directory().glob("*.lock*")) == []
    assert node.loop.tally.not_governed == 0


HOSTILE = "\x1b]0;mine\x07\x1b[2J\n../../../../etc/cron.d/x\u202e\x9b"


def test_hostile_names_steer_no_terminal_and_lead_out_of_no_directory(machine, capfd):
    machine.policy.write_text('[select]\nnamespace = ["agents*"]\n')
    machine.container(1, f"agents{HOSTILE}", HOSTILE, [f"GOVERNOR_POLICY={HOSTILE}"])
    before = {path for path in machine.top.rglob("*") if path.is_dir()}
    machine.begin()
    assert machine.turn() == [HOSTILE]
    [target] = machine.node.loop.targets.values()
    target.note("warning", "soon")
    machine.policy.write_text('[select]\nnamespace = ["shop"]\n')
    machine.node._read_policies_again()
    assert machine.turn() == []
    said = capfd.readouterr().err
    assert "not governed any more" in said and "soon" in said
    assert not set(said) & set("\x1b\x07\u202e\x9b")
    assert all(line.startswith("governor: ") for line in said.splitlines())
    made = {path for path in machine.top.rglob("*") if path not in before}
    assert not [path for path in made if "cron" in path.name or "mine" in path.name]
    [journal] = (machine.top / "state/containers").iterdir()
    assert journal.name == f"{1:064x}.ndjson"
    for path in (journal, machine.top / "state/journal-node.ndjson"):
        assert all(line.isprintable() for line in path.read_text().splitlines())


def test_nothing_of_its_own_pod_is_governed(machine, monkeypatch):
    machine.policy.write_text('[select]\ncgroup = ["*"]\n')
    monkeypatch.setattr("governor.cgroup.memcg_of", lambda pid, v1=False: str(machine.path(1)))
    machine.container(1)
    machine.container(2)
    machine.begin()
    assert machine.turn() == ["pod-2"]


@pytest.mark.parametrize("lost", ["journal-node.ndjson", "containers"])
def test_where_no_journal_can_be_written_containers_are_governed(machine, lost, capfd):
    state = machine.top / "state"
    state.mkdir()
    if lost == "containers":
        (state / lost).mkdir()
        (state / lost / f"{1:064x}.ndjson").mkdir()
    else:
        (state / lost).mkdir()
    machine.container(1)
    machine.begin()
    assert machine.turn() == ["pod-1"]
    assert "cannot be opened" in capfd.readouterr().err


def test_what_fails_in_adding_is_tried_again_with_its_lock(machine, monkeypatch):
    machine.container(1)
    node = machine.begin()
    with monkeypatch.context() as broken:
        broken.setattr(node.loop, "add", lambda *_: {}["a fault of ours"])
        with pytest.raises(KeyError):
            machine.turn()
    node._again.set(str(machine.path(1)), 0)
    assert machine.turn() == ["pod-1"]


def test_no_slot_to_be_had_is_tried_again(machine, monkeypatch, capfd):
    machine.container(1)
    node = machine.begin()

    def full():
        raise OSError(errno.ENOSPC, "No space left on device", machine.wanted.knob_path)

    with monkeypatch.context() as broken:
        broken.setattr(node.loop.knob_file, "free_slot", full)
        assert machine.turn() == []
    assert "No space left on device" in capfd.readouterr().err
    node._again.set(str(machine.path(1)), 0)
    assert machine.turn() == ["pod-1"]


def test_a_memcg_that_is_made_again_at_its_path_takes_nothing_and_leaves_nothing(machine):
    """Its target is looked at once its path is another memcg's, with a process in it."""
    runs = [subprocess.Popen(["sleep", "600"]) for _ in range(3)]
    try:
        machine.container(1)
        node = machine.begin()
        assert machine.turn() == ["pod-1"]
        for number, run in enumerate(runs):
            [old] = node.loop.targets.values()
            machine.path(1).rename(machine.top / f"gone-{number}")
            Memcg(machine.path(1)).write("cgroup.procs", f"{run.pid}\n")
            old.turn(time.monotonic_ns())
            assert old.standing().agent_pid != run.pid
            assert machine.turn() == ["pod-1"]
            old.gone = True  # a real memcg's files say so
            node.loop._turn(old, time.monotonic_ns())
            [target] = node.loop.targets.values()
            assert target.standing().agent_pid == run.pid
            locks = [path.name for path in instance.run_directory().glob("memcg-*.lock")]
            assert locks == [f"memcg-{machine.path(1).stat().st_ino}.lock"]
            assert node._left == {}
    finally:
        for run in runs:
            run.kill()
            run.wait()
