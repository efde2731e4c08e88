"""Parsers of memcg files, and the knobs over a fake cgroup directory."""

import errno
import os
from unittest.mock import Mock

import pytest

from governor import cgroup
from governor.brake import KnobFile
from governor.loan import Loan

STAT = b"anon 100\nfile 999\nshmem 7\ninactive_file 30\nactive_file 20\nslab_reclaimable 10\nodd line here\n"


def make(path, **files):
    values = {
        "memory.current": "1000",
        "memory.max": "2000",
        "memory.stat": STAT.decode(),
        "memory.high": "max",
        "cgroup.freeze": "0",
    }
    path.mkdir(exist_ok=True)
    for name, text in (values | files).items():
        (path / name.replace("_", ".")).write_text(text + "\n")
    return str(path)


def test_unreclaimable_leaves_cache_and_slab_out():
    state = cgroup.memory_state(b"1000\n", b"2000\n", STAT)
    assert state.unreclaimable_bytes == 1000 - 50 - 10
    assert state.unreclaimable_ratio == pytest.approx(0.47)


def test_no_limit_is_no_ratio():
    state = cgroup.memory_state(b"1000\n", b"max\n", b"")
    assert state.max_bytes == cgroup.UNLIMITED
    assert state.unreclaimable_ratio == 0.0


@pytest.mark.parametrize("junk", [b"", b"\n\n", b"anon\n", b"anon -5\n", b"\xff\xfe 1 2\n"])
def test_flat_keyed_survives_junk(junk):
    assert all(value >= 0 for value in cgroup.parse_flat_keyed(junk).values())


def test_a_memcg_that_is_gone_is_a_value(tmp_path):
    path = make(tmp_path / "a")
    memcg = cgroup.Memcg(path)
    assert memcg.memory_state().usage_bytes == 1000
    (tmp_path / "a" / "memory.current").write_text("")
    assert memcg.memory_state() is None
    memcg.close()
    with pytest.raises(OSError, match="No such file"):
        cgroup.Memcg(str(tmp_path / "none"))


class Tree:
    """A fake memcg with a slot in a knob file."""

    def __init__(self, tmp_path, **files):
        self.path = tmp_path / "memcg"
        make(self.path, **files)
        self.file_path = str(tmp_path / "knobs")
        self.file = KnobFile(self.file_path)
        self.file.adopt(0, str(self.path), os.stat(self.path).st_ino)
        self.knobs = self.file.knobs(0)

    def read(self, name):
        return (self.path / name).read_text().strip()


def test_what_one_process_turned_another_undoes(tmp_path):
    tree = Tree(tmp_path)
    assert tree.knobs.freeze() and tree.knobs.set_high(10_000)
    assert tree.read("cgroup.freeze") == "1"
    assert tree.read("memory.high").startswith("8192")  # whole pages
    (tree.path / "memory.high").write_text("8192\n")
    told = KnobFile(tree.file_path).restore_all()
    assert told == [f"{tree.path}: memory.high lifted, thawed"]
    assert tree.read("cgroup.freeze") == "0"
    assert tree.read("memory.high").startswith("max")
    assert KnobFile(tree.file_path).restore_all() == []


def test_never_thaws_what_somebody_else_froze(tmp_path):
    tree = Tree(tmp_path, cgroup_freeze="1")
    assert not tree.knobs.freeze()
    assert not tree.knobs.thaw()
    assert tree.file.restore_all() == []
    assert tree.read("cgroup.freeze") == "1"


@pytest.mark.parametrize("theirs", ["4096", "0"])
def test_never_replaces_somebody_elses_high(tmp_path, theirs):
    tree = Tree(tmp_path, memory_high=theirs)
    assert not tree.knobs.set_high(8192)
    assert not tree.knobs.lift_high()
    assert tree.read("memory.high") == theirs


def test_high_changed_by_somebody_else_meanwhile_stays(tmp_path):
    tree = Tree(tmp_path)
    assert tree.knobs.set_high(8192)
    (tree.path / "memory.high").write_text("4096\n")
    assert not tree.knobs.lift_high()
    assert tree.read("memory.high") == "4096"


def test_a_high_that_the_kernel_refuses_leaves_the_one_before_to_be_lifted(tmp_path, monkeypatch):
    tree = Tree(tmp_path)
    assert tree.knobs.set_high(8192)
    (tree.path / "memory.high").write_text("8192\n")
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", Mock(side_effect=OSError(errno.EINVAL, "")))
        assert not tree.knobs.set_high(4096)
    assert tree.knobs.lift_high()
    assert tree.read("memory.high").startswith("max")


def test_a_high_that_the_other_process_sets_while_one_is_lifted_stays_governors(tmp_path, monkeypatch):
    tree = Tree(tmp_path)
    assert tree.knobs.set_high(4096)
    (tree.path / "memory.high").write_text("4096\n")
    write = os.pwrite

    def meanwhile(fd, data, at):
        monkeypatch.setattr(os, "pwrite", write)
        (tree.path / "memory.high").write_text("max\n")
        KnobFile(tree.file_path).knobs(0).set_high(8192)
        (tree.path / "memory.high").write_text("8192\n")
        return len(data)

    monkeypatch.setattr(os, "pwrite", meanwhile)
    tree.knobs.lift_high()
    assert tree.knobs.high_set_by_us
    assert tree.knobs.lift_high()


def test_another_memcg_of_the_same_name_is_not_touched(tmp_path):
    tree = Tree(tmp_path)
    tree.knobs.freeze()
    tree.path.rename(tmp_path / "old")
    make(tree.path, cgroup_freeze="1")
    assert KnobFile(tree.file_path).restore_all() == []
    assert tree.read("cgroup.freeze") == "1"


@pytest.mark.parametrize("content", [b"", b"garbage" * 700, bytes(4096)])
def test_a_knob_file_of_garbage_restores_nothing(tmp_path, content):
    path = tmp_path / "knobs"
    path.write_bytes(content)
    assert KnobFile(str(path)).restore_all() == []


SECOND = 1_000_000_000


def test_a_loan_is_two_seconds_and_five_in_a_minute():
    loan = Loan()
    now, lent = 100 * SECOND, []
    for _ in range(4):
        loan.begin(now)
        lent.append((loan.deadline_ns - now) / SECOND)
        now = loan.deadline_ns
        loan.end(now)
        now += SECOND
    assert lent == [2, 2, 1, 0.2]  # the last is what it takes to decide
    loan.begin(now + 60 * SECOND)
    assert loan.deadline_ns == now + 62 * SECOND


def test_a_decision_prolongs_only_a_loan_that_runs():
    loan = Loan()
    loan.prolong(5)
    assert loan.deadline_ns is None
    loan.begin(0)
    loan.prolong(30 * SECOND)
    assert loan.deadline_ns == 30 * SECOND
