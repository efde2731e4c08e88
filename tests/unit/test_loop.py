"""loop: targets that come and go beside a real reflex; their memcgs are directories of plain files."""

import time
from pathlib import Path

import pytest

from governor import policy_file
from governor.guard import Guard
from governor.loop import Loop
from governor.policy import Source
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

    def __init__(self, tmp_path):
        self.tmp_path = tmp_path
        self.loop = Loop("test-loop", str(tmp_path / "knobs"), Source.POLL)
        self.loop.is_lasting = True
        self.notes = []
        self.loop.note = lambda kind, text, **_: self.notes.append((kind, text))
        self.loop._keep_reflex(time.monotonic_ns())

    def add(self, name):
        memcg = Memcg(self.tmp_path / "fs" / "cg" / name)
        guard = Guard(
            cgroup=str(memcg.path),
            instance="test-loop",
            knob_path=str(self.tmp_path / "knobs"),
            archive_directory=str(self.tmp_path / "archive"),
            journal_path=str(self.tmp_path / f"{name}.ndjson"),
            is_container=True,
        )
        slot = self.loop.knob_file.free_slot()
        return memcg, self.loop.add(guard, slot, policy_file.load("default").policy, None)

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


def test_who_comes_next_hears_nothing_of_who_was_let_go(running):
    _, target = held(running, "a")
    running.loop.drop(target)
    running.add("b")
    running.until(lambda: '"protecting"' in running.journal("b"), "protection")
    assert '"braked"' not in running.journal("b") and '"thawed"' not in running.journal("b")


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
