"""Whose growth is it, asked of real processes that grow, fork, exec, die and are adopted."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from governor import attribution
from governor.attribution import Attribution

MIB = 1 << 20
SECOND = 1_000_000_000
# Listens on DIRECTORY/PID; obeys one word and one number a connection: grow MIB, spawn (fork and exec), fork, die.
PUPPET = r"""
import os, signal, socket, subprocess, sys
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
kept, directory, this = [], sys.argv[1], sys.argv[2]
def serve():
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{directory}/{os.getpid()}.new")
    listener.listen()
    os.rename(f"{directory}/{os.getpid()}.new", f"{directory}/{os.getpid()}")
    while True:
        connection, _ = listener.accept()
        word, number = connection.recv(100).split()
        answer = 0
        if word == b"grow": kept.append(bytearray(b"x" * (int(number) << 20)))
        if word == b"spawn": answer = subprocess.Popen([sys.executable, "-c", this, directory, this]).pid
        if word == b"fork" and not (answer := os.fork()): return
        connection.send(b"%d" % answer)
        if word == b"die": os._exit(0)
        connection.close()
while True: serve()
"""


class Puppets:
    """Processes that do what they are told, and a directory with the one file of a memcg that matters here."""

    def __init__(self, directory):
        self.directory = directory
        self.pids = []
        self.started = []

    def start(self):
        argv = [sys.executable, "-c", PUPPET, str(self.directory), PUPPET]
        self.started.append(subprocess.Popen(argv))
        return self.ready(self.started[-1].pid)

    def ready(self, pid):
        until = time.monotonic() + 20
        while not (self.directory / str(pid)).exists():
            assert time.monotonic() < until
            time.sleep(0.005)
        self.pids.append(pid)
        return pid

    def tell(self, pid, word, number=0):
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(str(self.directory / str(pid)))
            connection.send(b"%s %d" % (word.encode(), number))
            answer = int(connection.recv(100))
        return self.ready(answer) if answer else 0

    def hold(self, *pids):
        (self.directory / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))

    def wait_gone(self, pid):
        until = time.monotonic() + 20
        while (found := attribution.read_process(pid)) and found.rss_bytes:
            assert time.monotonic() < until
            time.sleep(0.005)
        self.pids.remove(pid)

    def close(self):
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()


@pytest.fixture
def puppets(tmp_path):
    made = Puppets(tmp_path)
    yield made
    made.close()


@pytest.fixture
def family(puppets):
    """The agent, its tool, and the tool's compiler, all seen once."""
    agent = puppets.start()
    tool = puppets.tell(agent, "spawn")
    compiler = puppets.tell(tool, "spawn")
    puppets.hold(agent, tool, compiler)
    looked = Attribution(str(puppets.directory), agent)
    looked.look(0, SECOND)
    return agent, tool, compiler, looked


def test_growth_of_the_agent_itself(puppets, family):
    agent, _, _, looked = family
    puppets.tell(agent, "grow", 40)
    grown = looked.growth(2 * SECOND, agent, SECOND)
    assert grown.culprit_pid == 0
    assert 36 * MIB < grown.agent_grown_bytes < 100 * MIB
    assert grown.others_grown_bytes < MIB
    assert grown.window_ns == 2 * SECOND and grown.known_ratio == 1.0


def test_what_is_told_twice_within_a_second_adds_up_to_what_has_grown(puppets, family):
    _, tool, _, looked = family
    puppets.tell(tool, "grow", 40)
    first = looked.growth(2 * SECOND, tool, SECOND)
    puppets.tell(tool, "grow", 20)
    looked.look(2 * SECOND + SECOND // 4, SECOND)
    second = looked.growth(2 * SECOND + SECOND // 2, tool, SECOND)
    assert first.grown_bytes > 36 * MIB
    assert 16 * MIB < second.grown_bytes < 36 * MIB
    assert second.window_ns == SECOND // 2


def test_growth_of_a_grandchild_is_its_tree(puppets, family):
    agent, tool, compiler, looked = family
    puppets.tell(agent, "grow", 5)
    puppets.tell(compiler, "grow", 40)
    grown = looked.growth(2 * SECOND, compiler, SECOND)
    assert grown.culprit_pid == tool
    assert {pid for pid, _ in grown.members} == {tool, compiler}
    assert grown.grown_bytes > 36 * MIB > 20 * MIB > grown.agent_grown_bytes
    assert grown.held_bytes >= grown.grown_bytes
    assert {pid for pid, _ in looked.descendants()} == {tool, compiler}


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_a_process_that_no_look_had_time_for_has_grown_since_it_was_born(puppets, family):
    agent, tool, compiler, looked = family
    time.sleep(0.02)  # a clock tick
    later = puppets.tell(agent, "spawn")
    for number in range(1, 5):  # without it: as if the budget had ended each
        looked.look(number * SECOND, SECOND)
    puppets.tell(later, "grow", 40)
    puppets.hold(agent, tool, compiler, later)
    grown = looked.growth(5 * SECOND, later, SECOND)
    assert grown.culprit_pid == later
    assert grown.grown_bytes > 40 * MIB


def test_a_process_started_since_held_nothing_before(puppets, family):
    agent, tool, compiler, looked = family
    later = puppets.tell(agent, "spawn")
    puppets.tell(later, "grow", 40)
    puppets.hold(agent, tool, compiler, later)
    grown = looked.growth(SECOND // 2, 0, SECOND)
    assert grown.culprit_pid == later
    assert grown.grown_bytes > 40 * MIB  # with what its interpreter needs
    assert grown.grown_bytes == grown.held_bytes


def test_a_fork_is_not_blamed_for_what_it_shares_with_its_parent(puppets):
    agent = puppets.start()
    puppets.tell(agent, "grow", 60)
    puppets.hold(agent)
    looked = Attribution(str(puppets.directory), agent)
    looked.look(0, SECOND)
    worker = puppets.tell(agent, "fork")
    puppets.hold(agent, worker)
    grown = looked.growth(2 * SECOND, worker, SECOND)
    assert grown.others_grown_bytes < 8 * MIB
    puppets.tell(worker, "grow", 30)
    grown = looked.growth(2 * SECOND + 1, worker, SECOND)
    assert grown.culprit_pid == worker and 25 * MIB < grown.grown_bytes < 60 * MIB


def test_growth_since_before_the_first_of_a_run_of_brakes(puppets, family):
    agent, tool, compiler, looked = family
    puppets.tell(tool, "grow", 30)
    first = looked.growth(2 * SECOND, tool, SECOND)
    assert looked.since_first(2 * SECOND) == first
    later = puppets.tell(agent, "spawn")
    puppets.hold(agent, tool, compiler, later)
    puppets.tell(later, "grow", 10)
    looked.growth(5 * SECOND, later, SECOND)
    since = looked.since_first(5 * SECOND)
    assert since.culprit_pid == tool and since.grown_bytes == first.grown_bytes
    assert since.others_grown_bytes > first.grown_bytes + 9 * MIB
    puppets.tell(tool, "grow", 5)
    puppets.tell(later, "grow", 2)
    assert looked.growth(8 * SECOND, 0, SECOND).grown_bytes < 20 * MIB
    since = looked.since_first(8 * SECOND)
    assert since.culprit_pid == tool and 34 * MIB < since.grown_bytes < 60 * MIB
    assert since.window_ns == 8 * SECOND and since.agent_grown_bytes < MIB
    looked.shed(since.members)
    left = looked.since_first(8 * SECOND)
    assert left.culprit_pid == later and left.others_grown_bytes == left.grown_bytes
    puppets.tell(later, "grow", 4)
    assert looked.growth(100 * SECOND, later, SECOND) == looked.since_first(100 * SECOND)


def test_an_adopted_grandchild_stays_in_its_tree(puppets, family):
    agent, tool, compiler, looked = family
    puppets.tell(tool, "die")
    puppets.wait_gone(tool)
    puppets.hold(agent, compiler)
    puppets.tell(compiler, "grow", 40)
    late = puppets.tell(compiler, "spawn")
    puppets.hold(agent, compiler, late)
    grown = looked.growth(2 * SECOND, 0, SECOND)
    assert grown.culprit_pid == compiler  # the root is gone: the largest of its tree
    assert {pid for pid, _ in grown.members} == {compiler, late}
    assert {pid for pid, _ in looked.descendants()} == {compiler, late}


def test_what_died_or_moved_away_counts_no_longer(puppets, family):
    agent, tool, compiler, looked = family
    puppets.tell(tool, "grow", 40)
    puppets.tell(agent, "grow", 5)
    looked.look(SECOND, SECOND)
    puppets.hold(agent, compiler)
    grown = looked.growth(2 * SECOND, 0, SECOND)
    assert grown.culprit_pid == 0 and grown.others_grown_bytes < MIB
    assert {pid for pid, _ in looked.descendants()} == {compiler}


def test_a_pid_that_was_used_again_is_another_process(puppets, family, monkeypatch):
    _, tool, compiler, looked = family
    real = attribution.read_process

    def reused(pid):
        found = real(pid)
        return replace(found, start_ticks=found.start_ticks + 1_000_000) if pid == compiler else found

    monkeypatch.setattr(attribution, "read_process", reused)
    grown = looked.growth(2 * SECOND, 0, SECOND)
    assert grown.culprit_pid == tool and grown.grown_bytes > MIB  # all that the newcomer holds is new
    assert (compiler, reused(compiler).start_ticks) in grown.members


def test_growth_is_against_a_look_a_second_old_not_the_first(puppets, family):
    _, tool, _, looked = family
    puppets.tell(tool, "grow", 40)
    for tenth in range(1, 30):
        looked.look(tenth * SECOND // 10, SECOND)
    puppets.tell(tool, "grow", 10)
    grown = looked.growth(3 * SECOND, 0, SECOND)
    assert grown.culprit_pid == tool and 8 * MIB < grown.grown_bytes < 30 * MIB
    assert grown.window_ns == SECOND


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_a_look_goes_on_where_the_budget_ended_it(puppets, family):
    agent, tool, _, looked = family
    sleepers = [subprocess.Popen(["sleep", "60"]) for _ in range(8)]
    try:
        puppets.hold(agent, tool, *(process.pid for process in sleepers))
        ratios = []
        for number in range(20):
            looked.look(number, 0)
            ratios.append(looked.growth(number, tool, 0).known_ratio)
        assert max(ratios) <= 0.3  # of ten: the agent, who was charged, one more
        assert {pid for pid, _ in looked.descendants()} == {tool}
        assert len(looked._seen) == 10  # in the end
        alone = Attribution(str(puppets.directory))
        alone._agent_pid = alone._given_pid = 1  # not there: everybody is equal
        for number in range(9):
            alone.look(number, 0)
        assert len(alone._seen) == 9
    finally:
        for process in sleepers:
            process.kill()
            process.wait()


@pytest.mark.parametrize("charging, culprit", [("tool", "tool"), ("agent", None), ("nobody", None)])
def test_what_proc_cannot_show_is_put_to_whom_was_charged(puppets, family, charging, culprit):
    agent, tool, compiler, _ = family
    pids = {"tool": compiler, "agent": agent, "nobody": 0}
    stat = puppets.directory / "memory.stat"
    stat.write_text("anon 5\nshmem 1000000\nslab_unreclaimable 0\n")
    looked = Attribution(str(puppets.directory), agent)
    looked.look(0, SECOND)
    stat.write_text("anon 5\nshmem 50000000\nslab_unreclaimable 9000000\n")
    grown = looked.growth(2 * SECOND, pids[charging], SECOND)
    assert grown.culprit_pid == (tool if culprit else 0)
    assert grown.grown_bytes >= (58_000_000 if culprit else 0)
    assert (grown.agent_grown_bytes >= 58_000_000) == (charging == "agent")
    assert looked.since_first(2 * SECOND) == grown
    stat.write_text("anon 5\nshmem 1000000\nslab_unreclaimable 0\n")  # a file on tmpfs is removed
    looked.look(3 * SECOND, SECOND)
    since = looked.since_first(3 * SECOND)
    assert since.grown_bytes == since.agent_grown_bytes == 0


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_a_thread_stands_for_its_process(puppets):
    agent = puppets.start()
    tool = subprocess.Popen(
        [sys.executable, "-c", "import threading, time; threading.Thread(target=time.sleep, args=(60,)).start();"
         "print(threading.enumerate()[1].native_id, flush=True)"], stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        thread = int(tool.stdout.readline())
        puppets.hold(agent, tool.pid)
        grown = Attribution(str(puppets.directory), agent).growth(0, thread, SECOND)
        assert thread != tool.pid and grown.culprit_pid == tool.pid
        assert grown.window_ns == 0 and grown.grown_bytes == 0  # a hint, no more: there is nothing to compare with
    finally:
        tool.kill()
        tool.wait()
        tool.stdout.close()


def test_without_an_agent_it_is_who_leads(puppets, family):
    agent, tool, compiler, _ = family
    looked = Attribution(str(puppets.directory))
    looked.look(0, SECOND)
    assert {pid for pid, _ in looked.descendants()} == {tool, compiler}
    puppets.tell(agent, "grow", 20)
    assert looked.growth(2 * SECOND, 0, SECOND).agent_grown_bytes > 18 * MIB


def test_a_memcg_that_is_gone_shows_nobody(tmp_path):
    grown = Attribution(str(tmp_path / "none"), 1).growth(0, 1)
    assert grown.culprit_pid == 0 and grown.members == ()


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_of_more_than_can_be_followed_it_is_the_first_and_who_is_charged(puppets, family, monkeypatch):
    monkeypatch.setattr(attribution, "SEEN_LIMIT", 3)
    agent, tool, compiler, looked = family
    looked.look(SECOND // 2, SECOND)
    calm, later = puppets.tell(tool, "spawn"), puppets.tell(tool, "spawn")
    puppets.hold(agent, tool, compiler, calm, later)
    looked.look(SECOND, SECOND)
    assert {one.pid for one in looked.held()} == {agent, tool, compiler}
    puppets.tell(later, "grow", 80)
    grown = looked.growth(2 * SECOND, later, SECOND)
    assert {one.pid for one in looked.held()} == {agent, tool, compiler, later}
    assert grown.culprit_pid == tool and 70 * MIB < grown.grown_bytes < 110 * MIB
    assert later in [pid for pid, _ in grown.members]
