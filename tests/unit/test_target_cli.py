"""`governor hold`, `why` and `off`, of one TARGET: as `governor watch` takes it, and of nobody else."""

import os
import signal

import pytest
from typer.testing import CliRunner

from governor import cgroup, instance, pins, target_cli, told
from governor.cli import app
from tests.unit.watch_fixture import make_memcg, standing
from tests.waiting import wait_for

POD = "kubepods.slice/kubepods-pod1.slice"
AGENT, SIDECAR = f"{POD}/cri-containerd-{'3f' * 32}.scope", f"{POD}/cri-containerd-{'4a' * 32}.scope"
SERVICE, OTHER = "system.slice/agent.service", "system.slice/other.service"
TOOL = f"{SERVICE}/tool"  # a memcg of the agent's own, below the one that is guarded


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = tmp_path / "sys" / "fs" / "cgroup"
    monkeypatch.setattr(cgroup, "ROOT", str(root))
    monkeypatch.setattr(cgroup, "ROOT_V1", "/nowhere")
    for name in (AGENT, SIDECAR, TOOL, OTHER, SERVICE):
        make_memcg(root / name)
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path / "run")
    monkeypatch.setattr(pins, "INSTANCES", tmp_path / "bpf")
    standings = [standing(cgroup=f"{root}/{AGENT}"), standing(cgroup=f"{root}/{SIDECAR}", container="sidecar")]
    monkeypatch.setattr(target_cli, "standings", lambda: standings)
    return root


def cgroup_id(root, name):
    return (root / name).stat().st_ino


@pytest.fixture
def guards(root):
    """Processes that hold locks, as guards and daemons do."""
    started = []

    def guard(name, *memcgs):
        pid = os.fork()
        if pid == 0:
            instance.lock(name)
            for memcg in memcgs:
                instance.lock(f"memcg-{cgroup_id(root, memcg)}")
            while True:
                signal.pause()
        started.append(pid)
        wait_for(lambda: len(instance.held_by(pid)) == 1 + len(memcgs))
        return pid

    yield guard
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def held(root):
    """What of it is held."""
    ids = {int(path.stem.removeprefix("memcg-")) for path in instance.run_directory().glob("*.hold")}
    return {name for name in (AGENT, SIDECAR, SERVICE, TOOL, OTHER) if cgroup_id(root, name) in ids}


HELD = [
    ("agents/claude-0", {AGENT, SIDECAR}),
    ("agents/claude-0/sidecar", {SIDECAR}),
    ("3f3f3f", {AGENT}),
    ("agent", {SERVICE}),
    (TOOL, {SERVICE}),  # by whose guard it is held
]


@pytest.mark.parametrize(("target", "wanted"), HELD, ids=lambda value: value if isinstance(value, str) else "")
def test_hold_is_of_what_is_meant_and_of_nothing_else(root, guards, target, wanted):
    guards("node", AGENT, SIDECAR)
    guards("guard-1", SERVICE)
    done = run("hold", "10m", target)
    assert done.exit_code == 0, done.output
    assert done.stdout.count("nothing but the brake for 10m") == len(wanted)
    assert held(root) == wanted
    assert "the hold is over" in run("hold", "0", target).stdout


def test_hold_by_the_path_as_before_and_of_what_nobody_guards(root, guards):
    guards("guard-1", SERVICE)
    assert run("hold", "10m", "--cgroup", root / SERVICE).exit_code == 0
    assert held(root) == {SERVICE}
    done = run("hold", "10m", "other")
    assert done.exit_code == 1
    assert "other.service: not guarded, or not by a governor of yours; governor status shows" in done.stderr


def test_why_tells_of_a_pod_and_of_what_is_above_a_target(root):
    told.write(cgroup_id(root, SIDECAR), "killed make")
    told.write(cgroup_id(root, SERVICE), "killed cc1")
    assert "killed make" in run("why", "agents/claude-0").stdout
    assert "killed cc1" in run("why", TOOL).stdout
    for target in ("agents/claude-0/agent", "other"):
        done = run("why", target)
        assert (done.exit_code, done.stdout) == (0, ""), target
        assert "nothing was done to a tool here" in done.stderr


def test_off_stops_the_guard_of_one_and_its_hold_and_no_other(root, guards):
    ended, other = guards("guard-1", SERVICE), guards("guard-2", OTHER)
    for target in ("agent", "other"):
        run("hold", "10m", target)
    assert run("off", "agent").stdout.splitlines()[0] == f"stopped process {ended}"
    assert instance.holders() == [other]
    assert held(root) == {OTHER}
    assert run("off", "agent").stdout == "nothing was on\n"


def test_off_stops_no_daemon_for_the_sake_of_one(root, guards):
    pid = guards("node", AGENT, SIDECAR)
    instance.knob_file("node").touch()
    done = run("off", "agents/claude-0/agent")
    assert done.exit_code == 1
    assert "is governed by the daemon 'node', among others: governor off --instance node stops it" in done.stderr
    assert instance.holders() == [pid]
