"""agent_process: what a profile means by name, and comes long after whoever starts it."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from governor import agent_process
from governor.agent_process import AgentProcess
from governor.profile import Match
from tests.waiting import wait_for

SECOND = 1_000_000_000
IN_PLACE = "read x; exec -a late-agent sleep 60"
AN_AGENT = ["bash", "-c", "exec -a an-agent sleep 60"]
BESIDE = "read x; bash -c 'exec -a late-agent sleep 60' & wait"


@pytest.fixture
def wrapper(monkeypatch, tmp_path):
    """A shell that waits for a line before it starts an agent, and has run for long."""
    monkeypatch.setattr(agent_process, "_STARTING_S", 0)
    started = []

    def start(script):
        started.append(subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, start_new_session=True))
        return started[-1]

    yield start
    for process in started:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.wait()


@pytest.mark.parametrize("at_once", [1000, 1], ids=["all are read", "in turn"])
@pytest.mark.parametrize("script", [IN_PLACE, BESIDE], ids=["in place", "beside"])
def test_an_agent_that_comes_late_takes_the_place_of_what_stood_in_for_it(
    wrapper, tmp_path, monkeypatch, governor_is_elsewhere, script, at_once
):
    monkeypatch.setattr(agent_process, "_READ_AT_ONCE", at_once)
    shell = wrapper(script)
    listed = tmp_path / "cgroup.procs"
    listed.write_text(f"{shell.pid}\n")
    agent = AgentProcess(str(tmp_path), shell.pid, match=Match(("late-*",)), only_wanted=True)
    assert agent.find() and agent.pid == shell.pid
    assert not agent.is_stand_in(10 * SECOND)
    with monkeypatch.context() as patch:  # nobody is new: nothing but /proc/PID/stat is read
        patch.setattr(agent_process, "find_agent", None)
        assert not agent.is_stand_in(20 * SECOND)

    shell.stdin.write(b"go\n")
    shell.stdin.flush()
    late_pid = wait_for(lambda: late_below(shell.pid))
    listed.write_text(f"{shell.pid}\n{late_pid}\n")
    assert not agent.is_stand_in(24 * SECOND)  # it looks again after 5 s
    assert agent.is_stand_in(25 * SECOND)
    agent.let_go()
    assert agent.find()
    assert agent.pid == late_pid and agent.known
    assert not agent.is_stand_in(40 * SECOND)
    agent.forget()


@pytest.mark.parametrize(
    ("command", "ends"),
    [
        (AN_AGENT, True),
        (["bash", "-c", "bash -c 'exec -a an-agent sleep 60'; sleep 60"], False),
        (["timeout", "60", *AN_AGENT], True),
        (["timeout", "60", "bash", "-c", "bash -c 'exec -a an-agent sleep 60'; sleep 60"], False),
        ([sys.executable, "-c", f"import subprocess; subprocess.run({AN_AGENT}); input()"], False),
    ],
    ids=["itself", "shell", "wrapper", "shell in a wrapper", "anybody"],
)
def test_only_one_whose_end_ends_what_was_started_is_the_last(tmp_path, monkeypatch, command, ends):
    monkeypatch.setattr(agent_process, "_STARTING_S", 0)
    with subprocess.Popen(["setsid", *command], env={"PATH": "/bin:/usr/bin"}) as started:
        agent = AgentProcess(str(tmp_path), started.pid, match=Match(("an-agent",)), only_wanted=True)
        try:
            wait_for(lambda: agent.find() and (agent.known or agent.let_go()))
            assert agent.ends_all is ends
        finally:
            agent.forget()
            os.killpg(started.pid, signal.SIGKILL)


def late_below(pid):
    """The late agent: the shell itself or its child; 0 while it is not there."""
    with open(f"/proc/{pid}/task/{pid}/children") as children:
        candidates = [pid, *map(int, children.read().split())]
    for candidate in candidates:
        with open(f"/proc/{candidate}/cmdline", "rb") as cmdline:
            if cmdline.read().startswith(b"late-agent"):
                return candidate
    return 0


def test_who_becomes_a_governor_run_only_stood_in_for_its_agent(tmp_path, governor_is_elsewhere):
    """As the command line of `governor run` is, until it has read its options."""
    code = """if True:
        import os, sys, time
        sys.stdin.readline()
        open("/proc/self/comm", "w").write("governor-run")
        if not os.fork():
            open("/proc/self/comm", "w").write("agent")
            os.write(1, b"%d\\n" % os.getpid())
        time.sleep(600)
    """
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    run = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    listed = tmp_path / "cgroup.procs"
    listed.write_text(f"{run.pid}\n")
    agent = AgentProcess(str(tmp_path))
    try:
        wait_for(lambda: agent.find(), what="somebody")
        assert agent.pid == run.pid and not agent.is_stand_in(10 * SECOND)
        run.stdin.write(b"go\n")
        run.stdin.flush()
        pid = int(run.stdout.readline())
        listed.write_text(f"{run.pid}\n{pid}\n")
        assert not agent.is_stand_in(14 * SECOND) and agent.is_stand_in(15 * SECOND)
        agent.let_go()
        assert agent.find() and agent.pid == pid
        assert not agent.is_stand_in(20 * SECOND)
        agent.forget()
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.stdin.close()
        run.stdout.close()
        run.wait()


def test_of_a_crowd_all_are_read_in_turn(wrapper, tmp_path, monkeypatch):
    monkeypatch.setattr(agent_process, "_READ_AT_ONCE", 2)
    shells = [wrapper("read line; exec -a late sleep 60") for _ in range(5)]
    pids = [shell.pid for shell in shells]
    (tmp_path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))
    agent = AgentProcess(str(tmp_path))
    assert [agent._has_news(0) for _ in range(5)] == [True, True, True, False, False]
    shells[4].stdin.write(b"go\n")
    shells[4].stdin.flush()
    wait_for(lambda: Path(f"/proc/{pids[4]}/comm").read_text() == "sleep\n")
    assert any(agent._has_news(0) for _ in range(3))
