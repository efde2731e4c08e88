"""agent_look: a container whose processes let whoever reads their arguments and environment wait, and the others."""

import os
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_loop import Running

from governor import agent_look, agent_process, inside_read, ladder, profile_file, state_file
from governor.agent_look import AgentLook
from governor.agent_process import AgentProcess
from governor.children import Children, fork
from governor.model import State
from governor.policy import SECOND
from governor.poller import Poller
from governor.profile import Match
from governor.state_file import Saved
from governor.subtree import comm_of, read_stat
from tests.fakes import container as containers
from tests.fakes.locked_map import SERVER_S, LockedMap
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(bool(containers.why_none()), reason=f"no containers here: {containers.why_none()}")


@pytest.fixture
def running(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Running(tmp_path)
    yield made
    made.loop._end()


@pytest.fixture
def hostile(tmp_path):
    if not Path("/dev/fuse").exists():
        pytest.skip("no FUSE here")
    made = LockedMap(tmp_path / "fuse")
    yield made
    made.close()


def archived(running):
    return "".join(path.read_text() for path in (running.tmp_path / "archive").glob("*/manifest.json"))


@pytest.mark.parametrize("profile", [None, "claude-code"])
def test_who_lets_readers_wait_is_governed_and_others_are_meanwhile(running, hostile, monkeypatch, profile):
    monkeypatch.setattr(agent_process, "_STARTING_S", 0)
    monkeypatch.setattr(agent_process, "_SETTLED_NS", 0)
    monkeypatch.setattr(agent_look, "_DEADLINE_NS", SECOND)
    monkeypatch.setattr(inside_read, "_SILENCE_S", 1.0)
    hostile.lock()
    known = profile_file.load(profile).profile if profile else None
    memcg, target = running.add("hostile", known, pid=hostile.pid)
    other_memcg, _ = running.add("other")
    running.until(lambda: '"protecting"' in running.journal("other"), "the other's protection")
    other_memcg.hold(95)
    running.until(lambda: '"braked"' in running.journal("other"), "the other's brake")
    # With a profile it is not known which of its processes is meant: whoever leads it is.
    running.until(lambda: target._agent.pid == hostile.pid, "the agent")
    memcg.hold(95)
    running.until(lambda: "search inside the container was cut short" in archived(running), "its archive")
    running.loop.drop(target)
    running.until(lambda: memcg.read("cgroup.freeze") == "0", "the thaw")
    assert hostile.is_served, "nobody has waited for it"


class Looked:
    """An agent in a container, as its target follows it; `turn` is what the target does."""

    def __init__(self, top, container, match=None):
        self.poller, self.heard = Poller(), []
        look = AgentLook(self.poller, lambda: self.heard.append(True))
        (top / "cgroup.procs").write_text(str(container.pid))
        self.agent = AgentProcess(str(top), match=match, lives_elsewhere=True, look=look)

    def ask(self):
        """The kernel may say for a moment that nothing of a small process is resident: then nobody leads yet."""
        wait_for(lambda: self.agent.find() or self.agent._is_asking, what="a look")
        assert not self.agent.pid
        self.until(lambda: self.heard, "an answer")

    def turn(self, now_ns=0):
        self.poller.wait(20_000_000)
        self.agent.check_deadlines(now_ns)

    def until(self, condition, what):
        wait_for(lambda: (self.turn(), condition())[1], 30, what)


@pytest.fixture
def container():
    made = containers.Container(program="bash -c 'HOME=/var/lib exec -a the-agent sleep 1000'")
    wait_for(lambda: comm_of(made.pid) == "sleep", what="its exec")
    yield made
    made.close()


def test_its_home_is_known_after_its_end(tmp_path, container):
    """As after an OOM kill: the environment goes with the process."""
    container.write("/var/lib/one.jsonl", b"one\n")
    looked = Looked(tmp_path, container)
    wait_for(looked.agent.find, what="the agent")
    looked.agent.follow(1)
    looked.turn()
    assert looked.agent.way_in().home == "", "most that come end before anybody need know"
    looked.agent.follow(10 * SECOND)
    looked.until(lambda: looked.agent.way_in().home == "/var/lib", "its HOME")
    container.end()
    found = [*inside_read.find_inside(looked.agent.way_in(), ("~/*.jsonl",), ())]
    assert [each.path for each in found] == ["/var/lib/one.jsonl"]
    os.close(found[0].fd)
    looked.agent.forget()


def test_whom_a_profile_means_is_found_by_a_child(tmp_path, container):
    looked = Looked(tmp_path, container, Match(("the-agent",)))
    looked.ask()
    wait_for(looked.agent.find, what="the agent")
    assert looked.agent.known.pid == container.pid
    looked.agent.forget()


def test_it_is_looked_for_again_once_somebody_is_new(tmp_path, monkeypatch, governor_is_elsewhere):
    monkeypatch.setattr(agent_process, "_STARTING_S", 3600)
    with subprocess.Popen(["bash", "-c", "read x; exec sleep 60"], stdin=subprocess.PIPE) as shell:
        try:
            wait_for(lambda: comm_of(shell.pid) == "bash")
            looked = Looked(tmp_path, shell, Match(("another",)))
            looked.ask()
            for _ in range(3):
                assert not looked.agent.find() and not looked.agent._is_asking
            shell.stdin.write(b"go\n")
            shell.stdin.flush()
            wait_for(lambda: comm_of(shell.pid) == "sleep")
            wait_for(lambda: looked.agent.find() or looked.agent._is_asking, what="another look")
            looked.agent.forget()
        finally:
            shell.kill()


def test_who_lets_a_look_hang_is_looked_at_ever_more_seldom(hostile, monkeypatch):
    now_ns = time.monotonic_ns()
    monkeypatch.setattr(agent_look.time, "monotonic_ns", lambda: now_ns)
    hostile.lock()
    poller, ended = Poller(), []
    look = AgentLook(poller, lambda: ended.append(True))
    hangs_s = []
    for seconds in range(100):
        now_ns += SECOND
        look.agent(Match(("x",)), hostile.pid)
        hangs_s += [seconds] if look.is_open and not ended else []
        look.check_deadlines(now_ns)
        ended.clear()
    assert 10 <= len(hangs_s) <= 30, "5 s each, then 10, 20, 40 s nothing"
    assert hostile.is_served
    look.close()


def test_nobody_is_taken_for_one_that_was_looked_at_before(tmp_path, container):
    looked = Looked(tmp_path, container, Match(("the-agent",)))
    looked.ask()
    looked.agent._look._answers = [replace(looked.agent._look._answers[0], start_ticks=1)]
    wait_for(lambda: looked.agent.find() or not looked.agent._is_asking, what="the answer's use")
    assert not looked.agent.pid
    looked.agent.forget()


@pytest.mark.parametrize("lives", [True, False])
def test_an_agent_that_is_not_found_yet_is_the_one_before_if_that_lives(running, container, monkeypatch, lives):
    path = running.tmp_path / "fs/cg/one"
    before = (container.pid, container.start_ticks if lives else 1)
    state_file.save(state_file.path_for(str(path)), Saved(str(path), before, State()))
    told = []
    monkeypatch.setattr(ladder, "resumed", lambda state, same_agent, now_ns: told.append(same_agent) or state)
    running.add("one", profile_file.load("claude-code").profile, pid=container.pid)
    assert told == [lives]


def test_a_child_that_cannot_be_killed_keeps_nobody_waiting(hostile):
    """A file system holds it in the kernel; it is waited for once it dies."""
    poller, ended = Poller(), []
    children = Children(poller)
    child = fork(lambda: os.write(os.open(hostile.file, os.O_RDWR), b"x") and b"", 0, "a test")
    children.start(child, ended.append)
    hostile.await_write()
    begun_s = time.monotonic()
    children.check_deadlines(1)
    assert [how.over_deadline for how in ended] == [True] and children.are_none
    assert read_stat(child.pid).state == "D" and hostile.is_served
    assert time.monotonic() - begun_s < SERVER_S / 2
    hostile.close()
    wait_for(lambda: (poller.wait(20_000_000), read_stat(child.pid) is None)[1], 30, "its end")
    assert child.pidfd == -1
