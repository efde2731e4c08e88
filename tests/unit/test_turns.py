"""Archives of a whole node: a few at a time, in the order in which they were asked for, nobody hostage to another."""

import os
import time
from types import SimpleNamespace

import pytest

from governor import inside, manifest, model, restore, turns
from governor.archiving import Archiving
from governor.children import Children, fork
from governor.policy import Policy
from governor.poller import Poller
from governor.turns import AT_ONCE, SHARE_NS, Turn, Turns
from tests.fakes import container as containers

SECOND = 1_000_000_000


class Asked:
    """Turns that some ask for, in order; a turn's begin only says so."""

    def __init__(self, count):
        self.turns, self.begun = Turns(), []
        self.all = [Turn(lambda number=number: self.begun.append(number)) for number in range(count)]
        for turn in self.all:
            self.turns.ask(turn, 0)
        assert self.begun == [0], "the others are heard before a second one begins"
        self.turns.admit(0)


def test_who_asked_first_is_first_and_no_more_begin_than_may():
    asked = Asked(30)
    assert asked.begun == list(range(AT_ONCE))
    for number in (2, 0, 3):
        asked.turns.end(asked.all[number], 1)
    assert asked.begun == list(range(AT_ONCE + 3))


def test_one_that_hangs_takes_its_share_and_no_more():
    assert Policy().archive.deadline_ns > 2 * SHARE_NS
    asked = Asked(30)
    asked.turns.admit(SHARE_NS - 1)
    assert len(asked.begun) == AT_ONCE
    asked.turns.admit(SHARE_NS)
    assert asked.begun == list(range(2 * AT_ONCE))
    asked.turns.end(asked.all[0], SHARE_NS)  # whoever was not counted any more makes no room
    assert len(asked.begun) == 2 * AT_ONCE
    asked.turns.admit(2 * SHARE_NS)
    assert len(asked.begun) == 3 * AT_ONCE


def test_who_gave_up_never_begins():
    asked = Asked(AT_ONCE + 2)
    asked.turns.end(asked.all[AT_ONCE], 0)
    asked.turns.end(asked.all[0], 0)
    asked.turns.end(asked.all[0], 0)  # twice is once
    assert asked.begun == [*range(AT_ONCE), AT_ONCE + 1]


def test_a_thousand_that_end_while_they_begin_all_have_their_turn():
    asked, ended = Turns(), []

    def ask():
        turn = Turn(lambda: (ended.append(turn), asked.end(turn, 0)))
        return turn

    blocking = [Turn(lambda: None) for _ in range(AT_ONCE)]
    for turn in (*blocking, *(ask() for _ in range(1000))):
        asked.ask(turn, 0)
    asked.admit(0)
    assert not ended
    asked.end(blocking[0], 0)
    assert len(ended) == 1000


class Node:
    """The children of many containers, on one poller."""

    def __init__(self, count):
        self.poller, self.turns = Poller(), Turns()
        self.each = [Children(self.poller, self.turns) for _ in range(count)]
        self.made, self.ended, self.let_go = [], {}, []
        self.running = self.most = 0

    def archive(self, number, work, within_s=30):
        def make():
            self.made.append(number)
            self.running += 1
            self.most = max(self.most, self.running)
            return fork(work, deadline_ns, "archive")

        def end(how):
            self.running -= how.note == ""
            self.ended[number] = how

        deadline_ns = time.monotonic_ns() + within_s * SECOND
        self.each[number].attempt_in_turn(
            make, end, deadline_ns, f"archive {number}", lambda: self.let_go.append(number)
        )

    def until(self, condition, within_s=20):
        until = time.monotonic() + within_s
        while not condition():
            assert time.monotonic() < until
            self.poller.wait(10_000_000)
            self.turns.admit(time.monotonic_ns())  # as the loop does
            for one in self.each:
                one.check_deadlines(time.monotonic_ns())


def quick():
    time.sleep(0.02)
    return b"done"


def hanging():
    time.sleep(1000)
    return b""


def test_thirty_in_trouble_at_once_are_archived_in_order_a_few_at_a_time():
    node = Node(30)
    for number in range(30):
        node.archive(number, quick)
    assert node.made == [0]
    node.turns.admit(time.monotonic_ns())
    assert node.made == list(range(AT_ONCE))
    assert node.each[29].has_work() and not node.each[29].are_none
    node.until(lambda: len(node.ended) == 30)
    assert node.made == node.let_go == list(range(30))
    assert node.most == AT_ONCE
    assert all(how.ok and how.output == b"done" for how in node.ended.values())
    assert all(one.are_none and not one.has_work() for one in node.each)


def test_containers_that_hang_delay_the_others_by_their_share_and_not_by_their_deadline(monkeypatch):
    monkeypatch.setattr(turns, "SHARE_NS", SECOND // 5)
    node = Node(12)
    for number in range(2 * AT_ONCE):
        node.archive(number, hanging)
    for number in range(2 * AT_ONCE, 12):
        node.archive(number, quick)
    node.until(lambda: len(node.ended) == 12 - 2 * AT_ONCE)
    assert set(node.ended) == set(range(2 * AT_ONCE, 12)) and all(how.ok for how in node.ended.values())
    for number in range(2 * AT_ONCE):
        assert node.each[number].abandon() == ["archive"]


def test_what_never_had_its_turn_has_failed_by_its_deadline_and_says_why():
    node = Node(AT_ONCE + 1)
    for number in range(AT_ONCE):
        node.archive(number, hanging)
    node.archive(AT_ONCE, quick, within_s=0.1)
    node.until(lambda: node.ended)
    [(number, how)] = node.ended.items()
    assert (number, how.ok) == (AT_ONCE, False) and "others" in how.why
    assert AT_ONCE not in node.made and node.let_go.count(AT_ONCE) == 1
    for one in node.each:
        one.abandon()


def test_who_is_let_go_of_makes_room_whether_it_has_begun_or_waits():
    node = Node(AT_ONCE + 3)
    for number in range(AT_ONCE):
        node.archive(number, hanging)
    for number in range(AT_ONCE, AT_ONCE + 3):
        node.archive(number, quick)
    assert node.each[AT_ONCE].abandon() == [f"archive {AT_ONCE}"]
    assert node.each[0].abandon() == ["archive"]
    node.until(lambda: len(node.ended) == 2)
    assert set(node.ended) == {AT_ONCE + 1, AT_ONCE + 2} and AT_ONCE not in node.made
    for number in range(1, AT_ONCE):
        node.each[number].abandon()
    assert sorted(node.let_go) == list(range(AT_ONCE + 3))


def test_one_that_cannot_be_made_has_failed_and_the_next_begins():
    def refuse():
        raise OSError(12, "Cannot allocate memory")

    node, refused = Node(1), []
    for _ in range(AT_ONCE + 1):
        node.each[0].attempt_in_turn(refuse, refused.append, time.monotonic_ns() + SECOND, "archive", lambda: None)
    assert len(refused) == AT_ONCE + 1 and "Cannot allocate" in refused[0].why
    node.archive(0, quick)
    node.until(lambda: node.ended)


@pytest.mark.skipif(bool(containers.why_none()), reason=f"no containers here: {containers.why_none()}")
def test_a_container_that_ended_while_its_archive_waited_is_archived_nonetheless(tmp_path):
    """The door that the agent had is closed with it, and its descriptors are other files' by then."""
    container = containers.Container()
    container.write("/home/agent/.claude/projects/p/s.jsonl", b"the session\n")
    poller, shared, noted, fed = Poller(), Turns(), [], []
    door = inside.door_to(container.pid, container.start_ticks)
    agent = SimpleNamespace(pid=container.pid, way_in=lambda: door, lives_elsewhere=True, patterns=lambda globs: [])
    children = Children(poller, shared)
    archiving = Archiving(
        cgroup="/sys/fs/cgroup/pod/c",
        directory=tmp_path,
        agent=agent,
        children=children,
        note=lambda kind, text, **fields: noted.append((kind, text)),
        say=print,
    )
    others = [Turn(lambda: None) for _ in range(AT_ONCE)]
    for other in others:
        shared.ask(other, time.monotonic_ns())
    archiving.begin(Policy().archive, "a test", model.State(), fed.append)
    assert not noted
    door.close()
    strangers = [os.open(tmp_path, os.O_RDONLY) for _ in range(40)]
    container.close()
    try:
        shared.end(others[0], time.monotonic_ns())
        until = time.monotonic() + 20
        while not fed and time.monotonic() < until:
            poller.wait(10_000_000)
            children.check_deadlines(time.monotonic_ns())
    finally:
        for fd in strangers:
            os.close(fd)
    assert fed == [True], noted
    [name] = manifest.names(tmp_path)
    assert [file.path for file in restore.verify(tmp_path, name).files] == ["/home/agent/.claude/projects/p/s.jsonl"]
