"""Killing a tree: exactly the tree, verified, and never the agent, what is above it, or governor."""

import os
import signal
import subprocess
import sys
import time

import pytest

from governor import subtree
from governor.actions import processes

# Makes a chain of processes, each the child of the one before, and says their pids.
CHAIN = """
import os, sys, time
for _ in range(int(sys.argv[1])):
    os.write(1, b"%d\\n" % os.getpid())
    if pid := os.fork(): break
time.sleep(60)
"""


class Chains:
    def __init__(self, directory):
        self.path = str(directory)
        self.procs = directory / "cgroup.procs"
        self.started = []
        self.pids = []

    def start(self, length):
        process = subprocess.Popen([sys.executable, "-c", CHAIN, str(length)], stdout=subprocess.PIPE)
        self.started.append(process)
        pids = [int(process.stdout.readline()) for _ in range(length)]
        self.pids += pids
        return pids

    def hold(self, *pids):
        self.procs.write_text("".join(f"{pid}\n" for pid in pids))

    def close(self):
        for pid in self.pids:
            processes.send(pid, signal.SIGKILL)
        for process in self.started:
            process.kill()
            process.wait()
            process.stdout.close()


@pytest.fixture
def chains(tmp_path):
    made = Chains(tmp_path)
    yield made
    made.close()


def start_of(pid):
    return processes.read_process(pid).start_ticks


def dies(pid):
    until = time.monotonic() + 10
    while (found := processes.read_process(pid)) and found.rss_bytes and time.monotonic() < until:
        time.sleep(0.005)
    return found is None or not found.rss_bytes


def lives(*pids):
    time.sleep(0.05)
    return all((found := processes.read_process(pid)) and found.rss_bytes for pid in pids)


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_a_tree_dies_and_nobody_else(chains):
    agent, tool, compiler, linker = chains.start(4)
    (other,) = chains.start(1)
    chains.hold(agent, tool, compiler, linker, other)
    hit = processes.kill_tree(chains.path, tool, start_of(tool), {agent})
    assert {process.pid for process in hit} == {tool, compiler, linker}
    assert all(dies(pid) for pid in (tool, compiler, linker))
    assert lives(agent, other)


def test_a_root_above_the_agent_loses_only_the_rest(chains):
    top, agent, tool = chains.start(3)
    chains.hold(top, agent, tool)
    assert processes.kill_tree(chains.path, top, start_of(top), {agent}) == []
    assert lives(top, agent, tool)


def test_governor_and_what_is_above_it_are_never_hit(chains):
    (child,) = chains.start(1)
    own, parent = os.getpid(), os.getppid()
    chains.hold(1, parent, own, child)
    remembered = {(pid, start_of(pid)) for pid in (1, own)}
    assert processes.kill_tree(chains.path, parent, start_of(parent), (), remembered) == []
    assert lives(child)


def test_another_process_of_that_pid_lives(chains):
    (tool,) = chains.start(1)
    chains.hold(tool)
    assert processes.kill_tree(chains.path, tool, start_of(tool) - 1, ()) == []
    assert lives(tool)


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_what_moved_away_lives(chains):
    tool, compiler = chains.start(2)
    chains.hold(tool)
    assert [process.pid for process in processes.kill_tree(chains.path, tool, start_of(tool), ())] == [tool]
    assert dies(tool) and lives(compiler)


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_what_moves_away_at_the_last_moment_lives(chains, monkeypatch):
    tool, compiler = chains.start(2)
    chains.hold(tool, compiler)
    real = os.pidfd_open

    def moved(pid):
        chains.hold(tool)
        return real(pid)

    monkeypatch.setattr(os, "pidfd_open", moved)
    processes.kill_tree(chains.path, tool, start_of(tool), ())
    monkeypatch.undo()
    assert dies(tool) and lives(compiler)


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_the_remembered_die_with_what_descends_from_them(chains):
    adopted, inner = chains.start(2)
    chains.hold(adopted, inner)
    hit = processes.kill_tree(chains.path, 999_999_999, 1, (), {(adopted, start_of(adopted))})
    assert {process.pid for process in hit} == {adopted, inner}


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_without_a_root_the_remembered_are_the_tree(chains):
    agent, tool = chains.start(2)
    (other,) = chains.start(1)
    chains.hold(agent, tool, other)
    hit = processes.kill_tree(chains.path, 0, 0, (), {(agent, start_of(agent))}, agent)
    assert {process.pid for process in hit} == {agent, tool}
    assert dies(agent) and dies(tool) and lives(other)


def test_a_memcg_dies_whole(chains, tmp_path):
    (one,), (two,) = chains.start(1), chains.start(1)
    chains.hold(one, two)  # no cgroup.kill here: one by one
    (tmp_path / "cgroup.kill").mkdir()
    processes.kill_memcg(chains.path)
    assert dies(one) and dies(two)


def test_an_open_memcg_is_killed_not_what_has_its_path_now(chains, tmp_path):
    (newcomer,) = chains.start(1)
    old = tmp_path / "pod"
    old.mkdir()
    fd = os.open(old, os.O_RDONLY | os.O_DIRECTORY)
    old.rename(tmp_path / "gone")
    old.mkdir()
    (old / "cgroup.procs").write_text(f"{newcomer}\n")
    processes.kill_memcg(f"/proc/self/fd/{fd}")
    os.close(fd)
    assert lives(newcomer)


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_by_name_only_its_own_die_or_all_of_a_memcg_that_is_governors(chains):
    (mine,), (theirs,), (other,) = chains.start(1), chains.start(1), chains.start(1)
    chains.hold(mine, theirs)
    name = processes.read_process(mine).comm
    own = {(mine, start_of(mine)), (other, start_of(other)), (theirs, start_of(theirs) + 1)}
    assert processes.kill_named(str(chains.path), ("codex*",), own) == []
    assert [each.pid for each in processes.kill_named(str(chains.path), (name[:3] + "*",), own)] == [mine]
    assert dies(mine) and lives(theirs, other)
    chains.hold(theirs)
    assert [each.pid for each in processes.kill_named(str(chains.path), ("x", name), None)] == [theirs]
    assert dies(theirs) and lives(other)


@pytest.mark.usefixtures("governor_is_elsewhere")
def test_many_die_a_few_at_a_time(chains, monkeypatch):
    monkeypatch.setattr(processes, "_BATCH", 2)
    pids = chains.start(5)
    chains.hold(*pids)
    hit = processes.kill_tree(chains.path, pids[0], start_of(pids[0]), ())
    assert {each.pid for each in hit} == set(pids)
    assert all(dies(pid) for pid in pids)


def test_who_leads_is_looked_for_among_the_first(chains, monkeypatch):
    monkeypatch.setattr(processes, "_LED_AMONG", 2)
    first, inner = chains.start(2)
    (later,) = chains.start(1)
    chains.hold(inner, first, later)
    assert processes.leader(chains.path).pid == first
    chains.hold(inner, later, first)  # whoever has a parent in there leads nothing, read or not
    assert processes.leader(chains.path).pid == later
    monkeypatch.setattr(processes, "_LED_AMONG", 1)
    assert processes.leader(chains.path).pid == first


def test_of_a_long_chain_the_nearest_are_known(chains, monkeypatch):
    monkeypatch.setattr(subtree, "DEPTH_LIMIT", 3)
    pids = chains.start(5)
    assert subtree.ancestors(pids[-1]) == pids[:1:-1]
