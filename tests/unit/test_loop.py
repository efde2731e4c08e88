"""loop: targets that come and go beside a real reflex; their memcgs are directories of plain files."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from governor import link, policy_file, profile_file, profile_state
from governor.actions import processes
from governor.agent_process import AgentProcess
from governor.cgroup import MemoryState
from governor.children import fork
from governor.executor import Executor
from governor.guard import Guard, with_profile
from governor.loop import Loop
from governor.model import Braked, State, Terminate, Tier, Warn
from governor.policy import Source
from governor.turns import AT_ONCE, Turn
from tests.fakes import container as containers
from tests.fakes.inhabitants import await_child
from tests.waiting import wait_for

MIB = 1 << 20


class Memcg:
    """As cgroupfs shows one with a limit of 100 MiB."""

    def __init__(self, path):
        self.path = path
        path.mkdir(parents=True)
        self.write("cgroup.procs", "")
        self.write("memory.max", 100 * MIB)
        self.write("memory.high", "max")
        self.write("cgroup.freeze", 0)
        self.write("memory.events", "oom_kill 0\n")
        self.hold(10)

    def write(self, name, value):
        (self.path / name).write_text(str(value))

    def read(self, name):
        return (self.path / name).read_text().strip()

    def hold(self, mib):
        zeros = "".join(f"{name} 0\n" for name in ("file", "inactive_file", "active_file", "slab_reclaimable"))
        self.write("memory.stat", f"anon {mib * MIB}\n{zeros}")
        self.write("memory.current", mib * MIB)


class Running:
    """A loop that is turned by hand."""

    def __init__(self, tmp_path, source=Source.POLL, bpf_refused=""):
        self.tmp_path = tmp_path
        self.loop = Loop("test-loop", str(tmp_path / "knobs"), source, bpf_refused)
        self.loop.is_lasting = True
        self.notes = []
        self.loop.note = lambda kind, text, **_: self.notes.append((kind, text))
        self.loop._keep_reflex(time.monotonic_ns())

    def add(self, name, profile=None, pid=""):
        memcg = Memcg(self.tmp_path / "fs" / "cg" / name)
        memcg.write("cgroup.procs", pid)
        guard = Guard(
            cgroup=str(memcg.path),
            instance="test-loop",
            knob_path=str(self.tmp_path / "knobs"),
            archive_directory=str(self.tmp_path / "archive"),
            journal_path=str(self.tmp_path / f"{name}.ndjson"),
            is_container=True,
        )
        slot = self.loop.knob_file.free_slot()
        policy = policy_file.load("default").policy
        policy = with_profile(policy, profile) if profile else policy
        return memcg, self.loop.add(guard, slot, policy, profile)

    def until(self, condition, what):
        wait_for(lambda: (self.loop._once(), condition())[1], 30, what)

    def journal(self, name):
        path = Path(self.tmp_path / f"{name}.ndjson")
        return path.read_text() if path.exists() else ""


@pytest.fixture
def running(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    made = Running(tmp_path)
    yield made
    made.loop._end()


def test_where_only_bpf_is_allowed_and_there_is_none_nobody_is_called_protected(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    running = Running(tmp_path, Source.BPF, "there are no programs")
    running.loop._programs.load(running.loop.children)
    running.add("a")
    heard = []
    on_reflex = running.loop._on_reflex
    running.loop._on_reflex = lambda said: (heard.append(type(said)), on_reflex(said))
    running.until(lambda: {link.Adopted, link.Alive} <= set(heard), "what reflex says")
    running.loop._end()
    assert '"protecting"' not in running.journal("a")
    assert (running.loop.status, running.loop.is_stopping) == (1, True)


def held(running, name):
    memcg, target = running.add(name)
    running.until(lambda: '"protecting"' in running.journal(name), "protection")
    memcg.hold(95)
    wait_for(lambda: memcg.read("cgroup.freeze") == "1", 30, "the brake")
    return memcg, target


def test_who_is_let_go_while_it_is_held_is_thawed(running):
    memcg, target = held(running, "a")
    running.loop.drop(target)
    running.until(lambda: memcg.read("cgroup.freeze") == "0", "the thaw")
    assert memcg.read("memory.high").startswith("max")  # over what stood there
    running.until(lambda: not list(running.loop.knob_file.slots()), "the slot")


def test_of_brakes_that_followed_each_other_while_governor_stood_still_the_last_counts(running):
    memcg, _ = held(running, "a")
    wait_for(lambda: memcg.read("cgroup.freeze") == "0", 30, "the end of the loan")
    memcg.hold(10)
    time.sleep(1.2)  # it is looked at once a second
    memcg.hold(95)
    wait_for(lambda: memcg.read("cgroup.freeze") == "1", 30, "the next brake")
    time.sleep(0.3)  # until it is confirmed
    running.until(lambda: '"event":"Braked"' in running.journal("a"), "a decision")
    assert running.journal("a").count('"kind":"braked"') == 2
    assert running.journal("a").count('"event":"Braked"') == running.journal("a").count('"Archive"') == 1


def test_archives_of_one_target_have_their_turn_with_those_of_the_others(running):
    (_, first), (_, second) = running.add("one"), running.add("two")
    begun = []

    def ask(target, who):
        def make():
            begun.append(who)
            raise OSError  # what comes of it is the children's own test

        target._actuators.children.attempt_in_turn(make, lambda ended: None, 1 << 62, "archive", lambda: None)

    blocking = [Turn(lambda: None) for _ in range(AT_ONCE)]
    for turn in blocking:
        running.loop._shared.archives.ask(turn, time.monotonic_ns())
    running.loop._shared.archives.admit(time.monotonic_ns())
    ask(second, "two")
    ask(first, "one")
    assert begun == []
    running.loop._shared.archives.end(blocking[0], time.monotonic_ns())
    assert begun == ["two", "one"]


def test_it_is_said_who_leads_and_where_a_hold_is_to_be_given(running, monkeypatch):
    _, target = running.add("a")
    assert (target.standing().inside_guard_pid, target.standing().led_from_outside) == (0, False)
    target._led._can = frozenset()
    assert target.standing().led_from_outside
    target._led._can = None
    target._actuators.inside._peer_pid, target._actuators.inside._can = 4711, frozenset({Tier.CLEAR})
    monkeypatch.setattr(target._actuators.inside, "tell", lambda *_, **__: True)
    assert target.standing().inside_guard_pid == 4711
    for what in ("clear", "terminate"):
        target._actuators.executor.carry_out(Warn(what, 0, "full"), State())
    said = [line["text"] for line in map(json.loads, running.journal("a").splitlines()) if line["kind"] == "warning"]
    assert ["on the node" in text for text in said] == [False, True]  # who clears heeds a hold in there


def test_who_comes_next_hears_nothing_of_who_was_let_go(running):
    _, target = held(running, "a")
    running.loop.drop(target)
    running.add("b")
    running.until(lambda: '"protecting"' in running.journal("b"), "protection")
    assert '"braked"' not in running.journal("b") and '"thawed"' not in running.journal("b")


def test_while_others_wait_to_be_governed_who_is_young_has_no_more_turns_than_the_rest(running):
    _, target = running.add("a")
    running.loop._turn_took_ns = 1_000_000_000
    target.turn(time.monotonic_ns())
    due_ns = {}
    for running.loop._is_pressed in (False, True):
        due_ns[running.loop._is_pressed] = target.due_ns
    assert due_ns[False] + 1_000_000_000 < due_ns[True]


def test_a_fault_beside_the_targets_is_said_and_ends_nothing(running):
    def broken(now_ns):
        raise OSError("no census")

    running.loop.on_turn = broken
    held(running, "a")
    running.until(lambda: '"braked"' in running.journal("a"), "what reflex says")
    assert any(kind == "fault" and "no census" in text for kind, text in running.notes)


def test_a_target_that_fails_at_every_turn_does_not_keep_the_loop_busy(running, monkeypatch):
    _, target = running.add("a")
    turns = []

    def broken(now_ns):
        turns.append(now_ns)
        raise OSError("again")

    monkeypatch.setattr(target, "turn", broken)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        running.loop._once()
    assert 2 <= len(turns) < 100
    monkeypatch.undo()


def test_who_cannot_be_added_leaves_nothing(running, monkeypatch):
    before = len(list(Path("/proc/self/fd").iterdir()))
    monkeypatch.setattr(running.loop.knob_file, "adopt", lambda *_: (_ for _ in ()).throw(ValueError("no text")))
    for number in range(3):
        with pytest.raises(ValueError, match="no text"):
            running.add(f"n{number}")
    assert not running.loop.targets
    running.until(lambda: not running.loop._released, "the answers")
    assert len(list(Path("/proc/self/fd").iterdir())) <= before


@pytest.mark.skipif(bool(containers.why_none()), reason=f"no containers here: {containers.why_none()}")
def test_by_its_profile_a_containers_agent_is_found_and_archived_by_its_own_files(running, monkeypatch):
    """Where its state file and sessions are the container says: nothing but `inside_read` goes there."""

    def never(*arguments):
        raise AssertionError(arguments)

    monkeypatch.setattr(profile_state, "_load", never)
    container = containers.Container(program="bash -c 'bash -c \"exec -a codex sleep 1000\"; true'")
    try:
        container.write("/home/agent/.codex/sessions/2026/rollout-1.jsonl", b"a turn\n")
        monkeypatch.setattr(AgentProcess, "_leading_pid", lambda _: container.pid)
        pids = f"{container.pid}\n{await_child(container.pid)}\n"
        memcg, target = running.add("a", profile_file.load("codex").profile, pids)
        running.until(lambda: target._agent.pid, "the agent")
        assert Path(f"/proc/{target._agent.pid}/cmdline").read_bytes().startswith(b"codex\0")
        assert target._agent.pid != container.pid and target._agent.lives_elsewhere
        running.until(lambda: '"protecting"' in running.journal("a"), "protection")
        memcg.hold(95)
        running.until(lambda: '"kind":"archived"' in running.journal("a"), "an archive")
        assert "archived 1 session files" in running.journal("a")
        assert '"fault"' not in running.journal("a")
    finally:
        container.close()


def test_in_a_dry_run_nothing_follows_an_oom_kill(running, monkeypatch):
    _, target = running.add("a")
    done = []
    monkeypatch.setattr(Executor, "_archive", lambda *_, **__: done.append("archive"))
    monkeypatch.setattr(processes, "kill_named", lambda *_: done.append("sweep") or [])
    executor = target._actuators.executor
    executor.profile = profile_file.load("codex").profile
    executor.archive_the_end(State(), "killed by the kernel")
    assert done == ["sweep", "archive"]
    executor.policy = replace(executor.policy, dry_run=True)
    executor.archive_the_end(State(), "killed by the kernel")
    assert done == ["sweep", "archive"]


def no_child(*_, **__):
    raise BlockingIOError


@pytest.mark.parametrize(
    ("killed_here", "fork"), [(500, fork), (0, fork), (0, no_child)], ids=["here", "in a child", "without one"]
)
def test_who_bursts_beside_the_agent_is_killed_before_it_is_told_to_end(running, monkeypatch, killed_here, fork):
    monkeypatch.setattr("governor.executor._KILLED_HERE", killed_here)
    monkeypatch.setattr("governor.executor.fork", fork)
    code = "b = bytearray(b'x' * (20 << 20)); print(flush=True); import time; time.sleep(600)"
    agent, burst = (subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2))
    try:
        for process in (agent, burst):
            process.stdout.readline()
        _, target = running.add("a", pid=f"{agent.pid}\n{burst.pid}\n")
        running.until(lambda: target._agent.pid == agent.pid, "the agent")
        running.until(lambda: '"protecting"' in running.journal("a"), "protection")
        held = Braked(MemoryState(95 * MIB, 100 * MIB, 0, 0, 0), None, True)
        target._actuators.executor.carry_out(Terminate("full"), State(held=held))
        running.until(lambda: '"kind":"terminating"' in running.journal("a"), "the termination")
        lines = [json.loads(line) for line in running.journal("a").splitlines()]
        told = [line["text"] for line in lines if line["kind"] in ("killed", "terminating")]
        assert f"({burst.pid}, " in told[0] and f"SIGTERM to the agent (process {agent.pid})" in told[1]
        assert (burst.wait(20), agent.wait(20)) == (-signal.SIGKILL, -signal.SIGTERM)
    finally:
        for process in (agent, burst):
            process.kill()
            process.wait()
            process.stdout.close()
