"""Sources beside BPF, while it loads and where it is refused, and the brake where freezing is not allowed."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from conftest import AGENT, Container, Guard

from governor import bpflib, pins, record, subtree
from tests.waiting import wait_for

# Of this mount namespace only; without "bind" it would be everybody's.
READ_ONLY = (
    *("unshare", "-m", "sh", "-c"),
    'mount -o remount,bind,ro /sys/fs/cgroup && exec "$@"',
    "sh",
)
NO_BPF = ("setpriv", "--bounding-set=-sys_admin,-bpf,-perfmon")
USER = ("setpriv", "--reuid", "1000", "--regid", "1000", "--clear-groups")


@pytest.fixture
def plain_guard(tmp_path):
    """A guard without programs that were loaded before."""
    made = []

    def make(target, *options, directory=tmp_path, **named):
        made.append(Guard(directory, target, *options, loaded=False, **named))
        return made[-1]

    yield make
    for one in made:
        print(one.log())
        one.stop()


def is_saved(governor, agent, pod):
    status = agent.wait(timeout=60)
    assert pod.events()["oom_kill"] == 0, governor.log()
    assert status == 143, governor.log()
    archived = governor.await_line("archived")
    first_death = min(line["monotonic_ns"] for line in governor.lines("killed", "terminating"))
    assert archived["monotonic_ns"] < first_death


@pytest.mark.parametrize("source", ["psi", "poll"])
def test_a_burst_of_moderate_rate_is_saved_without_bpf(container, plain_guard, tmp_path, source):
    pod = container(256)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "60")
    governor = plain_guard(pod, "--source", source).ready()
    line = governor.lines("protecting")[0]
    assert (line["source"], line["brake"]) == (source, "freeze")
    agent.go()
    is_saved(governor, agent, pod)


def test_protection_begins_before_the_programs_are_loaded_and_outlives_them(container, plain_guard, tmp_path):
    pod = container(64)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "60")
    governor = plain_guard(pod).ready()
    agent.go()
    is_saved(governor, agent, pod)
    loaded = governor.await_line("protecting", seconds=120, count=2)
    assert [line["source"] for line in governor.lines("protecting")] == ["psi", "bpf"]
    assert governor.lines("archived")[0]["monotonic_ns"] < loaded["monotonic_ns"]
    assert "BPF (fentry)" in loaded["text"]
    pins.unload(f"guard-{pod.path.stat().st_ino}")
    assert governor.await_line("protecting", count=3)["source"] == "psi"
    assert "unloaded" in governor.await_line("bpf_refused")["text"]


def test_a_level_that_bpf_missed_is_found(container, guard, tmp_path, loaded):
    pod = container(256)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20")
    governor = guard(pod).ready()
    config = bpflib.PinnedMap(bpflib.open_libbpf(), f"{loaded}/charge/config")
    ended = threading.Event()

    def switch_off():  # reflex switches the programs on again, once a second
        while not ended.wait(0.002):
            config.update(record.CONFIG_KEY, record.Config(0, 0, enabled=0).encode())

    thread = threading.Thread(target=switch_off)
    thread.start()
    try:
        agent.go()
        is_saved(governor, agent, pod)
        assert governor.lines("braked")[0]["charging_pid"] == 0  # only BPF names one
    finally:
        ended.set()
        thread.join()


@pytest.mark.any_kernel
def test_without_a_limit_what_the_machine_has_left_counts(container, guard, tmp_path):
    pod = container(0)
    machine_mib = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "300", "--total-mb", str(machine_mib))
    governor = guard(pod).ready()
    assert "no limit anywhere" in governor.lines("protecting")[0]["limit"]
    agent.go()
    is_saved(governor, agent, pod)


@pytest.mark.any_kernel
def test_where_bpf_is_refused_the_reason_is_said_and_psi_stays(container, plain_guard, tmp_path):
    pod = container(64)
    pod.agent(tmp_path / "session.jsonl", "none")
    governor = plain_guard(pod, wrap=NO_BPF).ready()
    assert "no right to load BPF programs" in governor.await_line("bpf_refused")["text"]
    assert [line["source"] for line in governor.lines("protecting")] == ["psi"]
    governor.stop()
    forced = plain_guard(pod, "--source", "bpf", wrap=NO_BPF)
    assert forced.process.wait(timeout=20) == 1
    assert "source bpf allows nothing else" in forced.log()
    assert forced.log().count("protecting: ") == 1  # the first one's


@pytest.mark.any_kernel
def test_a_read_only_cgroup_tree_stops_the_agent_instead(container, plain_guard, tmp_path):
    pod = container(256)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "60")
    governor = plain_guard(pod, "--source", "psi", wrap=READ_ONLY).ready()
    line = governor.lines("protecting")[0]
    assert (line["source"], line["brake"]) == ("poll", "stop")
    agent.go()
    is_saved(governor, agent, pod)
    assert governor.lines("braked")[0]["frozen"]
    assert pod.read("memory.high") == "max"


@pytest.mark.any_kernel
def test_bpf_with_a_read_only_cgroup_tree(container, guard, tmp_path):
    pod = container(256)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "200")
    governor = guard(pod, wrap=READ_ONLY).ready()
    line = governor.lines("protecting")[0]
    assert (line["source"], line["brake"]) == ("bpf", "stop")
    agent.go()
    is_saved(governor, agent, pod)


def state_of(pid):
    stat = subtree.read_stat(pid)
    return stat.state if stat else ""


@pytest.mark.any_kernel
@pytest.mark.parametrize("victim", ["governor", "reflex"])
def test_nobody_stays_stopped_when_one_is_killed(container, plain_guard, tmp_path, victim):
    pod = container(256)
    agent = pod.agent(
        *(tmp_path / "session.jsonl", "touch", "--total-mb", "232", "--picture-mb", "64", "--rate-mb", "60")
    )
    stopped_before = pod.start("sleep", "1000")
    stopped_before.send_signal(signal.SIGSTOP)
    governor = plain_guard(pod, "--source", "poll", "--pid", agent.pid, wrap=READ_ONLY).ready()
    agent.go()
    governor.await_line("braked")
    assert state_of(agent.pid) == "T"
    reflex_pid = governor.reflex_pid()
    os.kill(governor.process.pid if victim == "governor" else reflex_pid, signal.SIGKILL)
    wait_for(lambda: state_of(agent.pid) != "T", seconds=5, what="SIGCONT")
    if victim == "governor":
        wait_for(lambda: not os.path.exists(f"/proc/{reflex_pid}"), what="the end of reflex")
        governor.process.wait()
        assert state_of(agent.pid) != "T"
    else:
        assert "processes go on" in governor.await_line("reflex_gone")["text"]
        governor.await_line("protecting", count=2)
    assert state_of(stopped_before.pid) == "T"


@pytest.fixture
def scratch():
    """A directory of user 1000's; pytest's own are root's."""
    with tempfile.TemporaryDirectory() as path:
        os.chown(path, 1000, 1000)
        yield Path(path)


@pytest.mark.any_kernel
def test_from_inside_the_memcg_without_root(container, scratch, plain_guard):
    pod = container(256)
    begin = scratch / "begin"
    agent = pod.start(
        *(*USER, sys.executable, AGENT, scratch / "session.jsonl", "touch", "--begin", begin, "--rate-mb", "60"),
        stdout=subprocess.PIPE,
    )
    assert agent.stdout.readline() == "ready\n"
    enter = f'echo $$ > {pod.path}/cgroup.procs && exec "$@"'
    governor = plain_guard(
        pod,
        directory=scratch,
        wrap=("sh", "-c", enter, "sh", *USER),
        environment={"HOME": str(scratch), "XDG_RUNTIME_DIR": str(scratch)},
    ).ready()
    line = governor.lines("protecting")[0]
    assert (line["source"], line["brake"]) == ("poll", "stop")
    assert governor.lines("agent")[0]["pid"] == agent.pid
    assert "runs inside the memcg" in governor.lines("bpf_refused")[0]["text"]
    begin.touch()
    is_saved(governor, agent, pod)
    governor.await_line("agent_ended")
    assert state_of(governor.process.pid) != "T"
    assert governor.stop() == 0


def test_the_limit_above_counts_where_the_growth_is_from_inside(container, guard, tmp_path):
    pod = container(128)
    pod.write("cgroup.subtree_control", "+memory")
    inside, beside = (Container(name, 0, parent=pod.path) for name in ("inside", "beside"))
    sibling = beside.agent(tmp_path / "sibling", "touch", "--total-mb", "85", "--rate-mb", "60")
    agent = inside.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20")
    pod.started += [sibling, agent]
    governor = guard(inside).ready()
    assert str(pod.path) in governor.lines("protecting")[0]["limit"]
    sibling.go()
    assert sibling.stdout.readline() == "burst over\n"
    wait_for(lambda: pod.ratio() > 0.7, what="the sibling's growth")
    assert governor.lines("braked") == []
    agent.go()
    is_saved(governor, agent, pod)
    assert sibling.poll() is None
    governor.stop()


@pytest.mark.parametrize("source", ["psi", "bpf"])
def test_a_lower_limit_of_a_tools_own_memcg_is_reported_and_not_braked(
    container, guard, plain_guard, tmp_path, source
):
    pod = container(256)
    pod.write("cgroup.subtree_control", "+memory")
    inner = Container("tool", 32, parent=pod.path)
    tool = inner.agent(tmp_path / "session.jsonl", "touch")
    pod.started.append(tool)
    governor = (plain_guard(pod, "--source", "psi") if source == "psi" else guard(pod)).ready()
    tool.go()
    assert tool.wait(timeout=60) == -9
    assert "OOM killer" in governor.await_line("oom_kill")["text"]
    assert governor.lines("braked") == []
    governor.stop()
