"""poller and schedule: who is called when, and who is due."""

import os

from hypothesis import given
from hypothesis import strategies as st

from governor.poller import Poller
from governor.schedule import Schedule


def test_the_owner_of_what_is_ready_is_called():
    poller, heard = Poller(), []
    quiet, loud = os.pipe(), os.pipe()
    for read_fd, _ in (quiet, loud):
        poller.register(read_fd, heard.append)
    assert not poller.wait(0)
    os.write(loud[1], b"x")
    assert poller.wait(10**9)
    assert heard == [loud[0]]


def test_what_an_owner_gives_up_in_its_turn_is_not_called():
    poller, heard = Poller(), []
    first, second = os.pipe(), os.pipe()

    def give_up_both(fd):
        heard.append(fd)
        for read_fd, _ in (first, second):
            poller.unregister(read_fd)

    for read_fd, write_fd in (first, second):
        poller.register(read_fd, give_up_both)
        os.write(write_fd, b"x")
    poller.wait(10**9)
    assert len(heard) == 1
    assert not poller.wait(0)


@given(st.lists(st.tuples(st.integers(0, 5), st.one_of(st.none(), st.integers(0, 50)))), st.integers(0, 60))
def test_each_is_due_once_at_the_time_given_last(given_times, now_ns):
    schedule, latest = Schedule(), {}
    for number, at_ns in given_times:
        if at_ns is None:
            schedule.drop(number)
            latest.pop(number, None)
        else:
            schedule.set(number, at_ns)
            latest[number] = at_ns
    assert schedule.next_ns() == min(latest.values(), default=None)
    due = list(schedule.due(now_ns))
    assert sorted(due) == sorted(number for number, at_ns in latest.items() if at_ns <= now_ns)
    assert [latest[number] for number in due] == sorted(latest[number] for number in due)
    assert schedule.next_ns() == min((at for at in latest.values() if at > now_ns), default=None)
