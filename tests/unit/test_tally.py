"""What is counted: driven by what reflex sends and by what the ladder decides, not by figures made up for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import ladder, link, model, record, tally
from governor.cgroup import MemoryState
from governor.model import AgentEnded, Answered, Archived, Braked, Growth, Phase, Sampled, Shedded, Signalled, State
from governor.policy import SECOND, Delivery, Policy
from governor.record import Record
from governor.tally import OTHER, OUTCOMES, Tally

MIB, MS = 1 << 20, 1_000_000
NAMES = ("shop", "agent-0", "agent")
POLICY = Policy(compact=Delivery(0.70, 0.65, exec=("compact",)))


def memory(ratio):
    return MemoryState(int(ratio * 1000 * MIB), 1000 * MIB, 0, 0, 0)


def said(message):
    """A message as it comes over the link."""
    return link.decode_from_reflex(message.encode())


def crossing(pid=77, ktime_ns=1000):
    found = Record(ktime_ns, 1, record.CROSSING, record.RISING, 1, 3, pid, pid, 9, 9, 10, 0, 0, 0, 0, 0)
    return link.decode_from_reflex(link.encode_record(found.encode(), ktime_ns + 300_000))


def a_brake(frozen=True, pid=77, frozen_ns=2 * MS):
    return said(link.Braked(0, MS, frozen_ns if frozen else 0, memory(0.9), -1, -1, pid, frozen, False))


class Ladder:
    """Steps of the ladder of slot 0, at a clock that the case moves."""

    def __init__(self, policy=POLICY):
        self.policy, self.state, self.now_ns, self.tally = policy, State(), 1000 * SECOND, Tally()
        self.tally.adopt(0, NAMES, 0)

    def feed(self, *events, dry_run=False):
        for event in events:
            before = self.state
            self.state, instructions = ladder.step(before, event, self.now_ns, self.policy)
            self.tally.stepped(0, event, before, self.state, instructions, self.now_ns, dry_run)
        return self

    def sample(self, ratio, seconds=1):
        self.now_ns += int(seconds * SECOND)
        return self.feed(Sampled(memory(ratio), self.now_ns))

    @property
    def counted(self):
        return {" ".join(key): count for key, count in self.tally.actions.items() if count}


def a_tool():
    return Growth(77, 1234, "make", 300 * MIB, 300 * MIB, 0, 300 * MIB, SECOND, 1.0)


# What reflex says


def test_a_crossing_that_the_kernel_stamped_is_timed_and_one_that_was_polled_is_not():
    counted = Tally()
    for heard in (crossing(), crossing(pid=0)):
        counted.heard(heard.record, heard.called_back_ns)
    assert counted.to_callback.sum_ns == 300_000
    assert counted.to_callback.counts[3] == 1  # 250 to 500 us
    assert sum(counted.to_callback.counts) == 1


@pytest.mark.parametrize(
    ("brake", "timed", "brakes", "not_held"),
    [
        (a_brake(), 1, 1, 0),
        (a_brake(pid=0), 0, 1, 0),
        (a_brake(frozen=False), 0, 0, 1),
    ],
)
def test_brakes(brake, timed, brakes, not_held):
    counted = Tally()
    counted.adopt(0, NAMES, 0)
    counted.braked(0, brake)
    assert (sum(counted.to_frozen.counts), counted.series_of(0).brakes, counted.not_held) == (timed, brakes, not_held)
    assert counted.to_frozen.sum_ns == timed * MS


def test_brake_time_counts_while_it_is_held_and_once_it_is_over_whoever_ends_it():
    counted = Tally()
    counted.adopt(0, NAMES, 0)
    counted.braked(0, a_brake(frozen_ns=2 * MS))
    assert counted.frozen_ns(5 * MS) == {NAMES: 3 * MS}
    assert counted.frozen_for_ns(0, 5 * MS) == 3 * MS
    thawed = said(link.Thawed(0, 6 * MS, link.LOAN_OVER))
    counted.thawed(0, thawed.at_ns, thawed.reason)
    counted.braked(0, a_brake(frozen_ns=10 * MS))
    counted.released_all(11 * MS)
    counted.braked(0, a_brake(frozen_ns=20 * MS))
    series = counted.series_of(0)
    counted.release(0, 22 * MS)
    assert (series.braked_ns, counted.frozen_ns(30 * MS), counted.false_alarms) == (7 * MS, {}, 0)


def test_a_false_alarm_is_no_brake():
    counted = Tally()
    counted.adopt(0, NAMES, 0)
    thawed = said(link.Thawed(0, 6 * MS, link.FALSE_ALARM))
    counted.thawed(0, thawed.at_ns, thawed.reason)
    assert (counted.false_alarms, counted.series_of(0).brakes, counted.series_of(0).braked_ns) == (1, 0, 0)


def test_a_slot_that_nobody_governs_is_no_error():
    counted = Tally()
    counted.braked(7, a_brake())
    counted.thawed(7, 5)
    counted.stepped(7, AgentEnded(), State(), State(), (), 0, False)
    counted.oom_killed(7)
    counted.release(7, 0)
    assert (counted.oom_kills, counted.frozen_for_ns(7, 1), counted.decided(7), counted.series(0)) == (
        1,
        None,
        None,
        [],
    )


# What the ladder decides


def test_a_compact_that_helps():
    run = Ladder().sample(0.75).sample(0.75, 20)
    run.feed(Answered(model.Tier.COMPACT, model.Status.DELIVERED, memory(0.75))).sample(0.40, 60)
    assert run.counted == {"compact begun": 1, "compact delivered": 1, "compact of_use": 1}
    assert run.tally.freed_bytes["compact"] == pytest.approx(350 * MIB, rel=0.01)
    assert run.tally.series_of(0).episodes == 1
    assert run.tally.series_of(0).actions == {"compact": 1}
    assert run.tally.decided(0).what == "compact"
    assert "75" in run.tally.decided(0).reason


def test_a_shed_and_what_it_frees():
    run = Ladder().feed(Braked(memory(0.95), 3000 * MIB, True, a_tool()), Archived(True), Shedded(2))
    run.sample(0.30, 0.1)
    assert not run.tally.freed_bytes["shed"]  # it is not all given back yet
    run.sample(0.20, 3).sample(0.10)
    assert run.tally.freed_bytes["shed"] == pytest.approx(750 * MIB, rel=0.01)
    assert run.counted == {"archive begun": 1, "archive done": 1, "shed begun": 1, "shed done": 1}


def test_a_termination_and_an_archive_that_fails():
    run = Ladder().feed(Braked(memory(0.91), 1000 * MIB, True), Archived(False), Signalled())
    assert run.state.phase is Phase.TERMINATING
    run.feed(AgentEnded()).sample(0.10, 3)
    assert run.counted == {"archive begun": 1, "archive failed": 1, "terminate begun": 1, "terminate done": 1}
    assert run.tally.freed_bytes["terminate"] == pytest.approx(810 * MIB, rel=0.01)


def test_an_agent_that_ends_by_itself_was_not_terminated():
    assert Ladder().sample(0.3).feed(AgentEnded()).counted == {}


def test_a_dry_run_counts_what_it_would_have_done_and_nothing_else():
    run = Ladder().feed(Braked(memory(0.91), 1000 * MIB, True), Archived(True), Signalled(), dry_run=True)
    assert run.counted == {"archive dry_run": 1, "terminate dry_run": 1}
    assert not run.tally.series_of(0).actions
    assert run.tally.decided(0).what == "terminate (dry_run)"


events = st.one_of(
    st.builds(lambda ratio: Sampled(memory(ratio), 0), st.floats(0, 1)),
    st.builds(lambda ratio, grown: Braked(memory(ratio), 100 * MIB, True, grown), st.floats(0, 1), st.just(a_tool())),
    st.builds(Archived, st.booleans()),
    st.builds(
        Answered,
        st.sampled_from(model.Tier),
        st.sampled_from(
            [model.Status.DELIVERED, model.Status.DEFERRED, model.Status.FAILED, model.Status.UNAVAILABLE]
        ),
    ),
    st.builds(Shedded, st.integers(0, 2)),
    st.builds(Signalled),
    st.builds(AgentEnded),
)


@given(st.lists(st.tuples(events, st.floats(0, 30)), max_size=40), st.booleans())
def test_whatever_happens_is_counted_as_an_outcome_that_is_exported(history, dry_run):
    run = Ladder()
    for event, seconds in history:
        run.now_ns += int(seconds * SECOND)
        run.feed(event, dry_run=dry_run)
    assert all(outcome in OUTCOMES[action] for action, outcome in run.tally.actions)
    assert all(freed >= 0 for freed in run.tally.freed_bytes.values())
    assert set(run.tally.series_of(0).actions) <= set(tally.ACTIONS)


# Series


def names(number):
    return ("shop", f"pod-{number}", "agent")


def test_what_is_over_the_limit_shares_one_series_that_never_falls():
    counted = Tally(series_limit=2)
    for slot in range(4):
        counted.adopt(slot, names(slot), 0)
        counted.braked(slot, a_brake())
    assert [one.names for one in counted.series(0)] == [names(0), names(1), OTHER]
    assert counted.other.brakes == counted.other.members == 2
    counted.release(2, 1)
    counted.release(3, 1)
    assert (counted.series(10 * tally.GRACE_NS)[-1].names, counted.other.brakes) == (OTHER, 2)


def test_a_series_outlasts_its_container_for_a_while():
    counted = Tally()
    counted.adopt(0, NAMES, 0)
    counted.release(0, 100)
    assert [one.names for one in counted.series(tally.GRACE_NS)] == [NAMES]
    assert counted.series(100 + tally.GRACE_NS) == []


def test_a_container_that_comes_again_goes_on_with_its_series():
    counted = Tally()
    for slot in (0, 5):
        counted.adopt(slot, NAMES, 0)
        counted.braked(slot, a_brake())
        counted.release(slot, 1)
    counted.adopt(6, NAMES, 2)
    assert [(one.names, one.brakes, one.members) for one in counted.series(3)] == [(NAMES, 2, 1)]


def test_room_is_made_by_the_one_that_went_first():
    counted = Tally(series_limit=2)
    for slot in (1, 0):
        counted.adopt(slot, names(slot), 0)
        counted.release(slot, 10 - slot)
    counted.adopt(2, names(2), 20)
    assert [one.names for one in counted.series(20)] == [names(0), names(2)]


def test_names_that_are_known_later_are_another_series():
    counted = Tally()
    counted.adopt(0, ("", "uid", "c0ffee"), 0)
    counted.adopt(0, NAMES, 5)
    counted.adopt(0, NAMES, 6)
    assert {one.names: one.members for one in counted.series(7)} == {("", "uid", "c0ffee"): 0, NAMES: 1}


def test_a_container_that_is_called_other_is_among_the_others():
    counted = Tally()
    counted.adopt(0, OTHER, 0)
    assert [one.names for one in counted.series(0)] == [OTHER]
