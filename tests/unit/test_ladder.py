"""The ladder, as a table of cases and as properties over arbitrary histories."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from governor import ladder, model, tiers
from governor.cgroup import MemoryState
from governor.ladder import ACTIONS, TRANSITIONS
from governor.model import (
    AgentEnded,
    Answered,
    Archive,
    Archived,
    Braked,
    Deliver,
    Growth,
    Kill,
    NothingLeft,
    Phase,
    Ready,
    Restart,
    Sampled,
    Settled,
    Shed,
    Shedded,
    Signalled,
    Squeeze,
    Stalled,
    State,
    Status,
    StillGrowing,
    Terminate,
    Thaw,
    Thawed,
    Tier,
    Vetoed,
    Withheld,
)
from governor.policy import MINUTE, SECOND, Brake, Delivery, Efficacy, Policy
from governor.policy import Terminate as TerminatePolicy

MIB = 1 << 20
POLICY = Policy()
REACHED = Policy(
    compact=Delivery(0.70, 0.65, exec=("compact",)),
    clear=Delivery(0.85, 0.80, cooldown_waived_ratio=1.0, warning_ns=5 * SECOND, exec=("clear",)),
)
RECYCLED = replace(
    REACHED,
    compact=replace(REACHED.compact, efficacy=Efficacy.USELESS),
    recycle=replace(REACHED.recycle, peak_bytes=200 * MIB),
)
NO_BRAKE = replace(REACHED, brake=Brake(enabled=False))
GENTLE = replace(REACHED, terminate=TerminatePolicy(enabled=False))
DRY = replace(REACHED, dry_run=True)


ROWS = [(t.phase, t.event, t.next, t.does) for t in TRANSITIONS]


def memory(ratio, max_bytes=1000 * MIB, file_bytes=0):
    return MemoryState(int(ratio * max_bytes) + file_bytes, max_bytes, 0, file_bytes, 0)


def braked(ratio, rate_mib=1000, frozen=True, growth=None, since_first=None):
    rate_bytes = None if rate_mib is None else rate_mib * MIB
    return Braked(memory(ratio), rate_bytes, frozen, growth, since_first=since_first)


def tool(grown_mib=300, agent_mib=0, pid=77):
    grown_bytes = grown_mib * MIB
    return Growth(pid, 1234, "make", grown_bytes, grown_bytes, agent_mib * MIB, grown_bytes, SECOND, 1.0)


class Run:
    """A history: every step's instructions, at a clock that the case moves."""

    def __init__(self, policy=POLICY, state=None):
        self.policy, self.state, self.now_ns = policy, state or State(), 1000 * SECOND
        self.told = []

    def feed(self, event):
        before = self.state.phase
        self.state, instructions = ladder.step(self.state, event, self.now_ns, self.policy)
        does = tuple(type(i) for i in instructions)
        if does or before is not self.state.phase:
            row = (before, type(event), self.state.phase, does)
            assert row in ROWS, f"{row} is not in the table"
        assert sum(isinstance(i, ACTIONS) for i in instructions) <= 1
        self.told += instructions
        return instructions

    def at(self, ratio, seconds=0.0, every=1.0, agent_mib=0, peak_mib=0):
        """Samples of this ratio, for so long."""
        for _ in range(max(1, int(seconds / every))):
            self.now_ns += int(every * SECOND)
            self.feed(Sampled(memory(ratio), self.now_ns, agent_mib * MIB, peak_mib * MIB))
        return self

    def then(self, *events):
        for event in events:
            self.feed(event)
        return self

    def names(self):
        return [type(i).__name__ for i in self.told]

    def last(self, kind):
        return next(i for i in reversed(self.told) if isinstance(i, kind))


# The brake table


def test_a_burst_without_room_is_archived_then_terminated():
    run = Run().then(braked(0.91), Archived(True), Signalled(), AgentEnded())
    assert run.names() == ["Archive", "Prolong", "Warn", "Terminate", "Thaw", "UsualLevels"]
    assert run.state.phase is Phase.WATCHING


def test_slow_growth_gets_probations_while_there_is_room_and_is_archived_again_before_the_end():
    run = Run().then(braked(0.91, 10), Archived(True), braked(0.94, 10), Archived(True), braked(0.969, 10))
    run.then(Archived(True))
    assert run.names() == ["Archive", "Thaw", "Archive", "Thaw", "Archive", "Prolong", "Warn", "Terminate"]
    assert run.state.phase is Phase.TERMINATING


def test_a_second_brake_leaves_the_agents_handler_its_room():
    assert Run().then(braked(0.956, 1), Archived(True)).state.phase is Phase.PROBATION
    run = Run().then(braked(0.91, 1), Archived(True), braked(0.956, 1), Archived(True))
    assert run.state.phase is Phase.TERMINATING


@pytest.mark.parametrize(
    "fresh, phase", [(0.948, Phase.PROBATION), (0.954, Phase.TERMINATING), (0.956, Phase.TERMINATING)]
)
def test_what_was_charged_for_a_moment_only_ends_nobody(fresh, phase):
    run = Run().then(braked(0.91, 10), Archived(True), braked(0.956, 10), Archived(True, memory(fresh)))
    assert run.state.phase is phase


@pytest.mark.parametrize("given_back_mib, phase", [(2, Phase.PROBATION), (1, Phase.TERMINATING)])
def test_what_is_given_back_was_no_growth_however_fast_it_came(given_back_mib, phase):
    full = memory(0.947, 115 * MIB)
    fast = Braked(full, 5 * MIB, True, None, 1200 * MIB)
    fresh = full._replace(usage_bytes=full.usage_bytes - given_back_mib * MIB)
    run = Run().then(braked(0.93, 1), Archived(True), fast, Archived(True, fresh))
    assert run.state.phase is phase


def test_where_nobody_is_held_memory_that_fell_a_little_is_no_room():
    run = Run(replace(POLICY, brake=Brake(enabled=False))).at(0.925, 30)
    assert run.state.phase is Phase.HELD
    assert run.then(Archived(True, memory(0.924))).state.phase is Phase.TERMINATING


@pytest.mark.parametrize("phase", [Phase.HELD, Phase.PROBATION])
def test_what_an_agent_was_held_for_is_nothing_to_the_next_in_its_place(phase):
    left = replace(Run().then(braked(0.95, 10)).state, phase=phase, probation_ns=1)
    assert ladder.resumed(left, True, SECOND).phase is Phase.PROBATION
    anew = ladder.resumed(left, False, SECOND)
    assert anew.phase is Phase.WATCHING and anew.held is None


def test_a_loan_that_ends_before_its_archive_is_followed_by_one_more_brake_only():
    run = Run().then(braked(0.91, 10), Thawed(), braked(0.94, 0))
    assert run.names()[-3:] == ["Archive", "Prolong", "Warn"]
    assert run.then(Archived(True)).state.phase is Phase.TERMINATING


def test_what_fills_at_full_speed_just_now_has_no_room_however_slow_it_was_before():
    slow, fast = braked(0.91, 10), replace(braked(0.91, 10), fill_rate_bytes=10_000 * MIB)
    assert Run().then(slow, Archived(True)).state.phase is Phase.PROBATION
    assert Run().then(fast, Archived(True)).state.phase is Phase.TERMINATING


def test_an_early_brake_is_a_probation_whatever_the_rate_and_does_not_count_as_the_first():
    run = Run(REACHED).then(braked(0.72, 50_000, growth=tool()), Archived(True))
    run.then(braked(0.91, 10, growth=tool()), Archived(True))
    assert run.names() == ["Archive", "Thaw", "Archive", "Thaw"]
    assert run.then(braked(0.94, 10, growth=tool())).names()[-1] == "Shed"


def test_probation_brakes_again_a_third_of_the_way_to_the_last_level():
    thaw = Run().then(braked(0.91, 10), Archived(True)).last(Thaw)
    assert thaw == Thaw(930_000, 930 * MIB, False, thaw.reason)


def test_a_probation_that_stays_calm_ends():
    run = Run().then(braked(0.72), Archived(True)).at(0.6, 8)
    assert run.state.phase is Phase.PROBATION
    assert run.at(0.6, 3).names()[-1] == "UsualLevels"
    assert run.state.phase is Phase.WATCHING


def test_the_tool_that_bursts_is_shed_and_the_agent_lives():
    run = Run(REACHED).then(braked(0.95, 2000, growth=tool()))
    assert run.names() == ["Archive", "Shed"]
    assert (run.last(Shed).culprit_pid, run.last(Shed).culprit_start_ticks) == (77, 1234)
    run.then(Shedded(3), Archived(True)).at(0.3)
    assert run.names()[2:] == ["Thaw"]
    assert run.state.phase is Phase.PROBATION
    run.at(0.3, 60)
    assert not {"Deliver", "Terminate", "Kill"} & set(run.names())  # nothing else is asked of the agent
    assert (run.state.phase, run.state.in_episode) == (Phase.WATCHING, False)
    assert run.state.compact.status is Status.NONE


def test_a_tool_with_room_gets_a_probation_first():
    run = Run().then(braked(0.91, 10, growth=tool()), Archived(True))
    assert run.names() == ["Archive", "Thaw"]
    assert run.then(braked(0.94, 10, growth=tool())).names()[-1] == "Shed"


NOBODYS = tool(grown_mib=0, agent_mib=2, pid=0)


@pytest.mark.parametrize("lately", [tool(grown_mib=5, agent_mib=2), NOBODYS])
@pytest.mark.parametrize(("agent_mib", "is_shed"), [(75, True), (76, False)])
def test_a_tool_that_was_held_back_between_two_brakes_is_known_by_its_growth_before_the_first(
    lately, agent_mib, is_shed
):
    run = Run().then(braked(0.91, 10, growth=tool()), Archived(True))
    run.then(braked(0.94, 10, growth=lately, since_first=tool(300, agent_mib)), Archived(True))
    assert ("Shed" in run.names()) == is_shed
    assert not is_shed or "grew by 300 MiB" in run.last(Shed).reason


@pytest.mark.parametrize(("lately_mib", "culprit_pid"), [(20, 77), (100, 78)])
def test_another_tool_is_shed_for_what_it_grew_by_since_the_last_brake_if_that_is_enough(lately_mib, culprit_pid):
    run = Run().then(braked(0.91, 10, growth=tool(300)), Archived(True))
    run.then(braked(0.94, 10, growth=tool(lately_mib, pid=78), since_first=tool(300)))
    assert run.last(Shed).culprit_pid == culprit_pid


@pytest.mark.parametrize(
    "growth",
    [
        tool(agent_mib=200),
        tool(grown_mib=10),
        replace(tool(), culprit_pid=0),
        None,
    ],
)
def test_growth_that_is_not_clearly_a_tools_is_not_shed(growth):
    assert "Shed" not in Run().then(braked(0.95, 2000, growth=growth), Archived(True)).names()


def test_of_many_tools_the_next_is_shed_where_one_was_not_enough():
    run = Run().then(braked(0.98, 2000, growth=tool(100)), Archived(True), Shedded(1, tool(60, pid=78))).at(0.93, 1.5)
    assert run.names() == ["Archive", "Shed", "Prolong", "Shed"]
    assert run.last(Shed).culprit_pid == 78
    run.then(Shedded(1, tool(20, pid=79))).at(0.91, 3)
    assert run.names()[4:] == ["Terminate"]  # what is left of the tools grew too little


def test_of_many_tools_the_next_is_shed_where_one_was_not_there_any_more_and_memory_neither():
    gone = (braked(0.95, 2000, growth=tool(100)), Shedded(0, tool(60, pid=78)), Archived(True))
    run = Run().then(*gone).at(0.95, 0.05)
    assert run.names() == ["Archive", "Shed", "Prolong", "Shed"]
    assert run.then(Shedded(1)).at(0.8).names()[-1] == "Thaw"
    assert Run().then(*gone).at(0.8, 0.05).names() == ["Archive", "Shed", "Thaw"]


def test_one_after_the_other_is_shed_for_no_more_than_a_loan():
    run = Run().then(braked(0.98, 2000, growth=tool(100)), Archived(True))
    for number in range(20):
        run.then(Shedded(1, tool(100, pid=78 + number))).at(0.97, 1)
    assert run.names().count("Shed") == 3 and "Terminate" in run.names()


def test_until_it_is_known_who_is_left_nobody_else_is_shed():
    run = Run().then(braked(0.95, 2000, growth=tool(), since_first=tool(pid=78)), Archived(True)).at(0.95, 3)
    assert run.names() == ["Archive", "Shed", "Terminate"]


@pytest.mark.parametrize(("fresh", "phase"), [(0.98, Phase.TERMINATING), (0.852, Phase.PROBATION)])
def test_what_rose_far_while_it_was_frozen_has_no_room(fresh, phase):
    assert Run().then(braked(0.849), Archived(True, memory(fresh))).state.phase is phase


@pytest.mark.parametrize(
    ("max_mib", "fresh_ratio", "phase"),
    [
        pytest.param(1000, 0.91, Phase.TERMINATING, id="it stayed"),
        pytest.param(5000, 0.91, Phase.TERMINATING, id="less, but of another limit"),
        pytest.param(1001, 0.89, Phase.PROBATION, id="given back; what the machine has left is read twice"),
        pytest.param(1000, 0.89, Phase.PROBATION, id="given back"),
    ],
)
def test_only_what_was_given_back_was_no_growth(max_mib, fresh_ratio, phase):
    fast = Braked(memory(0.91, max_mib * MIB), 0, True, None, 10_000 * MIB)
    assert Run().then(fast, Archived(True, memory(fresh_ratio))).state.phase is phase


def test_a_limit_that_was_raised_while_it_was_frozen_is_room():
    fresh = memory(0.873, 1060 * MIB)
    assert Run().then(braked(0.92, 300), Archived(True, fresh)).state.phase is Phase.PROBATION


@pytest.mark.parametrize("archived_first", [True, False])
def test_a_shed_that_does_not_help_ends_the_agent(archived_first):
    run = Run().then(braked(0.95, 2000, growth=tool()), Shedded(1))
    if archived_first:
        run.then(Archived(True)).at(0.95, 3)
    else:
        run.at(0.95, 3).then(Archived(True))
    assert run.names() == ["Archive", "Shed", "Terminate"]


def test_a_shed_that_finds_nobody_ends_the_agent():
    for events in itertools.permutations((Shedded(0), Archived(True))):
        run = Run().then(braked(0.95, growth=tool()), *events).at(0.95, 0.05)
        assert run.names() == ["Archive", "Shed", "Terminate"]


def test_what_has_fallen_by_the_time_it_is_archived_is_not_terminated():
    run = Run().then(braked(0.95), Archived(True, memory(0.5)))
    assert run.names()[-1] == "Thaw"
    assert run.state.phase is Phase.PROBATION


def test_a_failed_archive_does_not_strand():
    assert Run().then(braked(0.95), Archived(False)).names()[-1] == "Terminate"


def test_an_archive_that_nobody_answers_for_does_not_strand():
    assert Run().then(braked(0.95)).at(0.95, 61, every=0.5).names()[-1] == "Terminate"


def test_what_grows_although_frozen_is_terminated_after_the_archive():
    run = Run().then(braked(0.72), StillGrowing(), Archived(True))
    assert run.names() == ["Archive", "Squeeze", "Terminate"]
    assert run.last(Squeeze).high_bytes < 720 * MIB
    unthrottled = replace(POLICY, brake=replace(POLICY.brake, throttle=False))
    assert Run(unthrottled).then(braked(0.72), StillGrowing(), Archived(True)).names() == ["Archive", "Terminate"]


def test_a_tool_that_grows_although_frozen_is_shed_not_the_agent():
    run = Run().then(braked(0.91, 10, growth=tool()), StillGrowing(), Archived(True))
    assert run.names() == ["Archive", "Squeeze", "Shed"]
    assert run.then(Shedded(1)).at(0.4).names()[-1] == "Thaw"


def test_what_was_killed_beside_the_agent_makes_room_for_its_handler():
    run = Run().then(braked(0.98), Archived(True), Signalled(memory(0.6)))
    assert run.names()[-1] == "Thaw"


def test_what_cannot_be_frozen_has_its_grace_and_is_killed_at_the_last_level():
    run = Run().then(braked(0.93, frozen=False), Archived(True), Signalled())
    assert run.names()[-1] == "Terminate"
    assert run.at(0.95).names()[-1] == "Terminate"
    assert run.at(0.98).names()[-1] == "Kill"


def test_the_last_level_and_the_end_of_grace_kill_once():
    run = Run().then(braked(0.95), Archived(True), Signalled())
    assert run.then(braked(0.975), braked(0.98)).at(0.98, 5).names().count("Kill") == 1
    run = Run().then(braked(0.95), Archived(True), Signalled()).at(0.9, 15)
    assert run.names().count("Kill") == 1


def test_the_grace_ends_without_any_sample():
    run = Run().then(braked(0.95), Archived(True), Signalled())
    run.now_ns += 11 * SECOND
    assert run.then(Sampled(None, run.now_ns)).names()[-1] == "Kill"


def test_killed_without_a_known_agent_it_watches_again():
    run = Run().then(braked(0.95), Archived(True), Signalled(), braked(0.98)).at(0.1, 30)
    assert run.names()[-1] == "UsualLevels"
    assert run.state.phase is Phase.WATCHING


# Compact, clear, and what lies between


def test_compact_is_delivered_once_in_its_cooldown():
    run = Run(REACHED).at(0.71)
    assert run.names() == ["Deliver"]
    run.then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.75))).at(0.75, 60)
    assert run.names() == ["Deliver", "Settled"]
    assert run.at(0.75, 200).names() == ["Deliver", "Settled", "Deliver"]


def test_dwell_is_waited_for():
    policy = replace(REACHED, compact=replace(REACHED.compact, dwell_ns=10 * SECOND))
    assert Run(policy).at(0.71, 9).names() == []
    assert Run(policy).at(0.71, 5).at(0.5).at(0.71, 9).names() == []
    assert Run(policy).at(0.71, 5).at(0.66).at(0.71, 8).names() == ["Deliver"]  # above the release level all the time


def test_cooldown_outlasts_the_episode_unless_memory_is_nearly_full():
    run = Run(REACHED).at(0.75).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.75))).at(0.2, 60)
    assert not run.state.in_episode
    assert run.at(0.75, 20).names() == ["Deliver", "Settled"]
    assert run.at(0.86).names() == ["Deliver", "Settled", "Deliver"]


def test_a_jump_from_60_to_87_compacts_waits_for_its_settle_then_clears():
    run = Run(REACHED).at(0.60, 5).at(0.87)
    assert run.names() == ["Deliver"] and run.last(Deliver).tier is Tier.COMPACT
    run.then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.87))).at(0.88, 29)
    assert run.names() == ["Deliver"]
    run.at(0.88, 10)
    assert run.names() == ["Deliver", "Settled", "Warn", "Deliver"]
    assert run.last(Deliver).tier is Tier.CLEAR


def test_a_subscriber_who_can_is_asked_and_when_it_is_gone_that_is_an_attempt():
    asked = Run().then(model.Reachable(Tier.COMPACT, True)).at(0.72)
    assert asked.names() == ["Deliver"]
    assert (
        Run().then(model.Reachable(Tier.COMPACT, True), model.Reachable(Tier.COMPACT, False)).at(0.72).names() == []
    )
    resumed = ladder.resumed(Run().then(model.Reachable(Tier.COMPACT, True)).state, True, 0)
    assert not resumed.compact.reachable


def test_what_was_freed_before_the_answer_counts():
    run = Run(REACHED).at(0.75).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.3))).at(0.3, 31)
    assert run.last(Settled).freed_bytes == 450 * MIB and not run.last(Settled).useless


def test_a_second_brake_cuts_the_wait_for_compact_short():
    run = Run(REACHED).at(0.87).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.87)))
    run.then(braked(0.91, 10), Archived(True), braked(0.94, 1000), Archived(True))
    assert run.names()[-1] == "Terminate"


def test_no_clear_when_compact_has_helped():
    run = Run(REACHED).at(0.9).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.95))).at(0.87, 100)
    assert run.names() == ["Deliver", "Settled"]


def test_no_clear_five_minutes_after_compact():
    run = Run(REACHED).at(0.75).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.75))).at(0.66, 190)
    run.now_ns += 120 * SECOND
    run.at(0.87)
    assert [i.tier for i in run.told if isinstance(i, Deliver)] == [Tier.COMPACT, Tier.COMPACT]


@pytest.mark.parametrize("status", [Status.FAILED, Status.DEFERRED])
def test_failed_and_deferred_count_as_attempts_in_the_end(status):
    run = Run(REACHED).at(0.87).then(Answered(Tier.COMPACT, status))
    for _ in range(80):
        run.at(0.87)
        if run.state.compact.status is Status.RUNNING:
            run.then(Answered(Tier.COMPACT, status))
    assert Tier.CLEAR in [i.tier for i in run.told if isinstance(i, Deliver)]


def test_a_deferred_delivery_is_tried_again_but_not_once_memory_has_fallen():
    run = Run(REACHED).at(0.75).then(Answered(Tier.COMPACT, Status.DEFERRED)).at(0.75, 3)
    assert run.names() == ["Deliver", "Deliver"]
    run = Run(REACHED).at(0.75).then(Answered(Tier.COMPACT, Status.DEFERRED)).at(0.4, 30)
    assert run.names() == ["Deliver"]


def test_a_delivery_that_nobody_answers_for_has_failed():
    run = Run(REACHED).at(0.87, 100)
    assert [i.tier for i in run.told if isinstance(i, Deliver)] == [Tier.COMPACT, Tier.CLEAR]


def test_unavailable_compact_is_an_attempt_and_clear_may_follow():
    policy = replace(REACHED, compact=POLICY.compact)
    run = Run(policy).at(0.87, 10)
    assert run.names() == ["Warn", "Deliver"]
    assert run.state.compact.status is Status.UNAVAILABLE


def test_compact_warns_where_the_policy_says_so():
    policy = replace(REACHED, compact=replace(REACHED.compact, warning_ns=5 * SECOND))
    run = Run(policy).at(0.75, 8)
    assert run.names() == ["Warn", "Deliver"]


def test_a_compact_that_fails_quickly_does_not_keep_clear_away():
    compact = replace(REACHED.compact, settle_ns=SECOND, cooldown_ns=20 * SECOND)
    run = Run(replace(REACHED, compact=compact))
    for _ in range(20):
        run.at(0.87).then(Answered(Tier.COMPACT, Status.FAILED))
    assert run.names()[:3] == ["Deliver", "Warn", "Deliver"]
    assert run.told[2].tier is Tier.CLEAR


def test_a_warning_is_taken_back_when_memory_falls():
    policy = replace(REACHED, compact=POLICY.compact)
    assert Run(policy).at(0.87, 3).at(0.7, 30).names() == ["Warn"]


def test_deadlines_and_settle_time_stand_still_while_frozen():
    run = Run(REACHED).at(0.72).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.72))).at(0.72, 20)
    run.then(braked(0.74))
    run.now_ns += 20 * SECOND
    run.then(Archived(True)).at(0.72, 8)
    assert "Settled" not in run.names()
    assert "Settled" in run.at(0.72, 4).names()


def test_a_brake_queues_compact_and_the_probation_delivers_it():
    run = Run(REACHED).then(braked(0.72), Archived(True)).at(0.73)
    assert run.names() == ["Archive", "Thaw", "Deliver"]
    assert run.last(Thaw).high_bytes is None  # a throttled agent could not compact


def test_three_useless_trials_are_enough_for_a_week():
    run = Run(REACHED)
    for _ in range(3):
        run.at(0.75).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.75))).at(0.75, 31).at(0.2, 300)
    assert run.names() == ["Deliver", "Settled"] * 3
    assert all(i.useless for i in run.told if isinstance(i, Settled))
    assert run.at(0.75, 400).names() == ["Deliver", "Settled"] * 3
    assert run.state.compact.status is Status.USELESS
    run.at(0.2, 20)
    run.now_ns += tiers.TRY_AGAIN_NS
    assert run.at(0.75).names()[-1] == "Deliver"


def test_a_trial_beside_a_brake_teaches_nothing():
    run = Run(REACHED)
    for _ in range(5):
        run.at(0.75).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.75)), braked(0.76), Archived(True))
        run.at(0.75, 40).at(0.2, 300)
    assert run.state.compact.useless_trials == 0


def test_what_a_profile_knows_need_not_be_learned():
    policy = replace(REACHED, clear=replace(REACHED.clear, efficacy=Efficacy.USELESS))
    run = Run(policy).at(0.87).then(Answered(Tier.COMPACT, Status.FAILED)).at(0.87, 20)
    assert run.state.clear.status is Status.USELESS
    assert "Warn" not in run.names()


def test_a_stall_brings_compact_forward_and_nothing_else():
    assert Run(REACHED).at(0.62, 5).names() == []
    run = Run(REACHED).at(0.62).then(Stalled()).at(0.62)
    assert run.names() == ["Deliver"]
    run = Run(REACHED)
    for _ in range(200):
        run.then(Stalled(), Answered(Tier.COMPACT, Status.DELIVERED, memory(0.62))).at(0.69)
    assert {type(i) for i in run.told} == {Deliver, Settled}
    assert all(i.tier is Tier.COMPACT for i in run.told if isinstance(i, Deliver))


# Without a brake, with a veto


def test_without_a_brake_samples_lead_to_the_end_but_compact_comes_first():
    run = Run(NO_BRAKE).at(0.92, 5)
    assert run.names() == ["Deliver"]
    run.then(Answered(Tier.COMPACT, Status.FAILED)).at(0.92)
    assert run.names() == ["Deliver", "Archive", "Warn"]
    run.then(Archived(True), Signalled())
    assert run.names()[-1] == "Terminate"
    assert run.at(0.93, 15).names()[-1] == "Kill"


def test_without_a_brake_a_long_dwell_does_not_keep_the_end_away():
    policy = replace(NO_BRAKE, compact=replace(NO_BRAKE.compact, dwell_ns=10 * MINUTE))
    assert Run(policy).at(0.75, 60).names() == []
    assert Run(policy).at(0.92, 5).names() == ["Deliver"]


def test_without_a_brake_a_cooling_compact_does_not_keep_the_end_away():
    policy = replace(NO_BRAKE, compact=replace(NO_BRAKE.compact, cooldown_waived_ratio=1.0))
    run = Run(policy).at(0.75).then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.75))).at(0.2, 60)
    assert run.at(0.92, 5).names() == ["Deliver", "Settled", "Deliver"]
    assert run.then(Answered(Tier.COMPACT, Status.FAILED)).at(0.92, 2).names()[-2:] == ["Archive", "Warn"]


def test_a_missed_crossing_brakes():
    assert Run().at(0.93, 3).names() == ["HoldNow", "HoldNow"]
    assert Run().at(0.93, 0.4, every=0.4).at(0.8).names() == []


def test_a_full_agent_that_sits_still_is_not_terminated():
    run = Run().then(braked(0.92, 0), Archived(True)).at(0.92, 60)
    assert run.names() == ["Archive", "Thaw"]
    assert Run().then(braked(0.92, None), Archived(True)).names() == ["Archive", "Thaw"]


def test_a_veto_forbids_all_but_the_brake_and_ends():
    run = Run(REACHED).then(Vetoed(10 * MINUTE)).at(0.88, 60)
    assert run.names() == []
    run.then(braked(0.95, growth=tool()), Archived(True))
    assert run.names() == ["Archive", "Thaw", "NothingLeft"]
    run.then(braked(0.98), Archived(True))
    assert "Terminate" not in run.names()
    run.then(Vetoed(0), braked(0.98), Archived(True))
    assert run.names()[-1] == "Terminate"


@pytest.mark.parametrize("policy", [GENTLE, replace(GENTLE, brake=Brake(enabled=False))])
def test_a_policy_without_an_end_says_so_once_a_minute(policy):
    run = Run(policy).at(0.87, 60)
    for _ in range(300):
        for instruction in run.at(0.98).told[-2:]:
            if isinstance(instruction, model.HoldNow):
                run.then(braked(0.98), Archived(True))
    assert 1 <= run.names().count("NothingLeft") <= 12
    assert "Terminate" not in run.names()


def test_a_dry_run_decides_and_does_not_repeat_itself_every_second():
    run = Run(DRY).at(0.92).then(Answered(Tier.COMPACT, Status.FAILED))
    for _ in range(100):
        run.at(0.92)
        if run.state.phase is Phase.HELD:
            run.then(Archived(True), AgentEnded())
    assert 1 <= run.names().count("Terminate") <= 3


# Recycle


def idle(ratio, agent_mib=600):
    return Ready(memory(ratio), agent_mib * MIB)


def recycling(policy=RECYCLED, state=None):
    """A run whose agent can be recycled."""
    return Run(policy, state).then(model.Reachable(Tier.RECYCLE, True))


def restarted():
    run = recycling().at(0.8, 3, agent_mib=600).then(idle(0.8)).at(0.8, 10, agent_mib=600).then(idle(0.8))
    assert run.names() == ["Deliver", "Warn", "Deliver", "Restart"]
    return run


def test_where_compact_frees_nothing_an_idle_agent_is_warned_and_recycled_and_the_effect_is_judged():
    run = restarted().then(AgentEnded())
    assert run.state.recycle.status is Status.RESTARTING
    saved = ladder.resumed(run.state, same_agent=False, now_ns=run.now_ns)
    run = recycling(state=saved).then(Answered(Tier.RECYCLE, Status.DELIVERED, memory(0.3)))
    run.at(0.5, 2, agent_mib=280, peak_mib=300).at(0.4, 30, agent_mib=200, peak_mib=300)
    assert [type(told) for told in run.told] == [Settled]
    assert (run.last(Settled).freed_bytes >> 20, run.last(Settled).useless) == (400, False)
    assert run.state.resumed_peak_bytes == 300 * MIB
    run.at(0.4, 15)
    assert not run.state.in_episode and run.state.recycle.delivered_ns is not None
    assert run.at(0.8, 60, agent_mib=600).names() == ["Settled"]  # within its cooldown
    assert run.at(0.8, 600, agent_mib=600).names()[1:2] == ["Deliver"]


def test_it_comes_before_clear_and_clear_waits_for_it():
    run = recycling().at(0.88, 60, agent_mib=600)
    assert [(told.tier if isinstance(told, Deliver) else told) for told in run.told] == [Tier.RECYCLE]
    run.then(Answered(Tier.RECYCLE, Status.DEFERRED)).at(0.88, 40, agent_mib=600)
    run.then(Answered(Tier.RECYCLE, Status.DEFERRED)).at(0.88, 10, agent_mib=600)
    assert run.state.recycle.status is Status.EXPIRED
    assert isinstance(run.told[-1], Deliver) and run.told[-1].tier is Tier.CLEAR


@pytest.mark.parametrize(
    ("ratio", "agent_mib", "seen_mib", "why"),
    [
        (0.88, 100, 0, "beside 780 MiB of others, over 900"),
        (0.80, 215, 0, "holds 215 MiB now"),
        (0.80, 600, 750, "up to 750 MiB beside 200"),
        (0.80, 600, 590, "holds 600 MiB now"),
        (0.80, 0, 0, "not known what the agent holds"),
    ],
)
def test_an_agent_that_would_not_fit_or_give_nothing_back_is_not_recycled_and_that_is_said_once(
    ratio, agent_mib, seen_mib, why
):
    run = recycling(state=State(resumed_peak_bytes=seen_mib * MIB)).at(ratio, 5, agent_mib=agent_mib)
    assert [type(told) for told in run.told if isinstance(told, Withheld)] == [Withheld]
    assert why in run.last(Withheld).reason
    assert not any(isinstance(told, Deliver) and told.tier is Tier.RECYCLE for told in run.told)
    run = recycling().at(0.8, 3, agent_mib=600)
    assert run.then(Ready(memory(0.89), 200 * MIB)).names() == ["Deliver"]  # nor where that is so by then
    assert run.at(0.8, 10, agent_mib=600).names() == ["Deliver", "Deliver"]


def test_it_is_not_asked_for_where_nobody_can_or_compact_may_help():
    assert not Run(RECYCLED).at(0.8, 60, agent_mib=600).told
    run = recycling(replace(RECYCLED, compact=REACHED.compact)).at(0.8, agent_mib=600)
    run.then(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.8))).at(0.8, 29, agent_mib=600)
    assert run.names() == ["Deliver"]
    assert run.at(0.8, 5, agent_mib=600).names() == ["Deliver", "Settled", "Deliver"]
    assert run.last(Deliver).tier is Tier.RECYCLE
    useless = replace(RECYCLED, recycle=replace(RECYCLED.recycle, efficacy=Efficacy.USELESS))
    assert not recycling(useless).at(0.8, 60, agent_mib=600).told


def test_whoever_types_after_the_warning_is_warned_again():
    run = recycling().at(0.8, 3, agent_mib=600).then(idle(0.8)).at(0.8, 10, agent_mib=600)
    run.then(Answered(Tier.RECYCLE, Status.DEFERRED)).at(0.8, 10, agent_mib=600).then(idle(0.8))
    assert run.names() == ["Deliver", "Warn", "Deliver", "Deliver", "Warn"]


@pytest.mark.parametrize("event", [Vetoed(10 * MINUTE), braked(0.95), AgentEnded()])
def test_what_happens_while_the_agent_is_looked_at_keeps_it(event):
    run = recycling().at(0.8, 3, agent_mib=600).then(idle(0.8)).at(0.8, 10, agent_mib=600)
    assert run.then(event, idle(0.8)).names().count("Restart") == 0
    assert run.state.recycle.status in (Status.DEFERRED, Status.FAILED)


def test_after_three_restarts_for_nothing_it_is_not_tried_again():
    run, restarts = recycling(), []
    for _ in range(4000):
        run.at(0.8, agent_mib=600)
        if run.state.recycle.status is Status.RUNNING:
            run.then(idle(0.8))
        if run.state.recycle.status is Status.RESTARTING:
            restarts.append(run.now_ns)
            run.then(Answered(Tier.RECYCLE, Status.FAILED))
    assert len(restarts) == 3
    assert all(later - earlier >= 600 * SECOND for earlier, later in itertools.pairwise(restarts))
    assert run.state.recycle.status is Status.USELESS


def test_a_restart_that_is_interrupted_says_nothing_of_its_use():
    run, restarts = recycling(), 0
    for _ in range(4000):
        run.at(0.8, agent_mib=600)
        if run.state.recycle.status is Status.RUNNING:
            run.then(idle(0.8))
        if run.state.recycle.status is Status.RESTARTING:
            restarts += 1
            run.then(Answered(Tier.RECYCLE, Status.EXPIRED))
    assert (restarts > 4, run.state.recycle.useless_trials) == (True, 0)


@pytest.mark.parametrize(("grace_s", "lost_s"), [(10, 90), (240, 270)])
def test_an_agent_that_is_asked_to_end_has_its_grace_before_its_recycle_is_given_up(grace_s, lost_s):
    policy = replace(RECYCLED, terminate=replace(RECYCLED.terminate, grace_ns=grace_s * SECOND))
    run = recycling(policy).at(0.8, 3, agent_mib=600).then(idle(0.8)).at(0.8, 10, agent_mib=600).then(idle(0.8))
    assert run.at(0.8, lost_s - 1, agent_mib=600).state.recycle.status is Status.RESTARTING
    assert run.at(0.8, 2, agent_mib=600).state.recycle.status is Status.FAILED


def test_an_agent_that_stays_is_not_recycled_by_the_next_governor():
    run = restarted()
    assert ladder.resumed(run.state, same_agent=True, now_ns=run.now_ns).recycle.status is Status.FAILED


def test_a_brake_while_it_restarts_does_not_spoil_the_judgement():
    run = restarted().then(braked(0.95), Archived(True), Signalled(), AgentEnded())
    assert (run.state.recycle.status, run.state.recycle.isolated) == (Status.RESTARTING, True)


# What must not matter


def test_cache_alone_does_nothing():
    full_of_cache = MemoryState(1000 * MIB, 1000 * MIB, 0, 900 * MIB, 90 * MIB)
    run = Run(NO_BRAKE)
    for _ in range(5):
        run.then(Sampled(full_of_cache, run.now_ns))
    assert run.names() == []


@pytest.mark.parametrize("age_s", [6, -6])
def test_a_stale_sample_decides_nothing(age_s):
    run = Run(REACHED)
    assert run.then(Sampled(memory(0.95), run.now_ns - age_s * SECOND)).names() == []


def test_a_memcg_without_max_decides_nothing():
    assert Run(NO_BRAKE).then(Sampled(MemoryState(10**12, -1, 0, 0, 0), 1000 * SECOND)).names() == []


ratios = st.one_of(st.floats(0, 1.2), st.sampled_from([0.3, 0.72, 0.88, 0.95, 0.99]))
memories = st.builds(memory, ratios, st.sampled_from([1000 * MIB, 64 * MIB, -1]), st.just(0))
growths = st.one_of(st.none(), st.just(tool()), st.just(tool(agent_mib=500)), st.just(replace(tool(), culprit_pid=0)))
held_bytes = st.sampled_from([0, 100 * MIB, 700 * MIB])
events = st.one_of(
    st.builds(Sampled, st.one_of(st.none(), memories), st.just(-1), held_bytes, held_bytes),
    st.builds(Ready, st.one_of(st.none(), memories), held_bytes),
    st.builds(braked, ratios, st.one_of(st.none(), st.integers(0, 100_000)), st.booleans(), growths, growths),
    st.builds(Archived, st.booleans(), st.one_of(st.none(), memories)),
    st.builds(
        Answered,
        st.sampled_from(Tier),
        st.sampled_from([Status.DELIVERED, Status.DEFERRED, Status.FAILED, Status.EXPIRED]),
        st.one_of(st.none(), memories),
    ),
    st.builds(Shedded, st.integers(0, 2), growths),
    st.builds(model.Reachable, st.sampled_from(Tier), st.booleans()),
    st.builds(Vetoed, st.sampled_from([0, 100 * SECOND])),
    st.sampled_from([StillGrowing(), Thawed(), Signalled(), AgentEnded(), Stalled()]),
)
histories = st.lists(st.tuples(events, st.integers(-5 * SECOND, 100 * SECOND)), max_size=40)
policies = st.sampled_from([POLICY, REACHED, RECYCLED, NO_BRAKE, GENTLE, DRY])
DESTRUCTIVE = (Terminate, Kill)


def fed(history, policy):
    """A run over a history, step by step: (state before, event, instructions, run)."""
    run = Run(policy)
    for event, passed_ns in history:
        run.now_ns += passed_ns
        if isinstance(event, Sampled):
            event = replace(event, at_ns=run.now_ns)
        before = run.state
        yield before, event, run.feed(event), run


@settings(max_examples=300)
@given(histories, policies)
def test_in_any_history(history, policy):
    """Clocks may jump. Every step is in the table, has one action, and nothing dies unarchived or uncompacted."""
    archived = False
    for before, event, instructions, run in fed(history, policy):
        for instruction in instructions:
            if isinstance(instruction, Archive):
                archived = False
            if isinstance(instruction, DESTRUCTIVE):
                assert run.state.compact.status is not Status.NONE
                assert archived or isinstance(event, Archived) or run.state.archived
            if isinstance(instruction, Restart):
                assert before.recycle.status is Status.RUNNING and before.recycle.warned_ns is not None
                assert tiers.gave_nothing(run.state.compact) or before.phase is not Phase.WATCHING
                others_bytes = event.state.unreclaimable_bytes - event.agent_bytes
                peak_bytes = before.resumed_peak_bytes or policy.recycle.peak_bytes
                assert 0 < peak_bytes < 0.9 * event.state.max_bytes - others_bytes
            if isinstance(instruction, Terminate | Shed | Restart) or (
                isinstance(instruction, Deliver) and instruction.tier is Tier.CLEAR
            ):
                assert not tiers.since(run.state.veto_from_ns, run.now_ns) < run.state.veto_for_ns
            if isinstance(instruction, Kill):
                assert before.phase is Phase.TERMINATING
            if isinstance(instruction, Terminate):
                assert policy.terminate.enabled
        if isinstance(event, Archived) and before.phase is Phase.HELD:
            archived = True


@settings(max_examples=150)
@given(histories, st.sampled_from([POLICY, REACHED, RECYCLED, NO_BRAKE]), st.data())
def test_nothing_strands(history, policy, data):
    """From every state, growth to max that goes on ends in SIGKILL, a shed, or in a loud "nothing left"."""
    run = Run(policy)
    for _, _, _, run in fed(history, policy):  # noqa: B007  the last one
        pass
    run.then(AgentEnded()) if run.state.killed else None
    done = []
    for _ in range(200):
        run.now_ns += SECOND
        told = list(run.feed(Sampled(memory(0.99), run.now_ns)))
        while told:
            instruction = told.pop(0)
            done.append(type(instruction))
            match instruction:
                case model.HoldNow():
                    told += run.feed(braked(0.99))
                case Archive():
                    told += run.feed(Archived(data.draw(st.booleans(), "archived")))
                case Shed():
                    told += run.feed(Shedded(data.draw(st.integers(0, 1), "shed")))
                case Terminate():
                    told += run.feed(Signalled())
                case Deliver(tier=Tier.RECYCLE):
                    told += run.feed(Ready(memory(0.99), 700 * MIB))
                case Deliver(tier=tier):
                    answer = data.draw(st.sampled_from([Status.DELIVERED, Status.FAILED, None]), "answer")
                    if answer:
                        told += run.feed(Answered(tier, answer, memory(0.99)))
    assert {Kill, NothingLeft} & set(done)


@settings(max_examples=40)
@given(st.lists(st.sampled_from([0.66, 0.69, 0.70, 0.72, 0.81, 0.84, 0.85, 0.87, 0.89]), min_size=100, max_size=300))
def test_between_two_levels_nothing_flaps(samples):
    """One second apart and without a brake: a delivery of each tier within its cooldown, at most."""
    run = Run(REACHED)
    begun = {tier: [] for tier in Tier}
    for ratio in samples:
        run.now_ns += SECOND
        for instruction in run.feed(Sampled(memory(ratio), run.now_ns)):
            if isinstance(instruction, Deliver):
                begun[instruction.tier].append(run.now_ns)
                run.feed(Answered(instruction.tier, Status.DELIVERED, memory(ratio)))
    for times in begun.values():
        assert all(later - earlier >= 240 * SECOND for earlier, later in itertools.pairwise(times))
    assert not set(run.names()) - {"Deliver", "Settled", "Warn"}


@settings(max_examples=100)
@given(histories, policies)
def test_stalls_alone_never_lead_past_compact(history, policy):
    run = Run(policy)
    for event, passed_ns in history:
        run.now_ns += abs(passed_ns)
        if isinstance(event, Sampled):
            run.then(Stalled()).at(min(0.69, event.state.unreclaimable_ratio if event.state else 0.5))
        if isinstance(event, Answered):
            run.feed(event)
    assert not set(run.names()) - {"Deliver", "Settled"}
    assert Tier.CLEAR not in [i.tier for i in run.told if isinstance(i, Deliver)]


def test_the_table_has_no_row_twice_and_every_row_is_reached():
    """Rows that no history above can reach would be lies."""
    assert len(ROWS) == len(set(ROWS))
    missing = set(ROWS)
    for policy in (POLICY, REACHED, RECYCLED, NO_BRAKE, GENTLE, replace(GENTLE, brake=Brake(enabled=False))):
        for state in reachable_states():
            for event in sample_events():
                if any(row[:2] == (state.phase, type(event)) for row in missing):
                    after, instructions = ladder.step(state, event, 1000 * SECOND, policy)
                    missing.discard((state.phase, type(event), after.phase, tuple(type(i) for i in instructions)))
    assert not missing


def sample_events():
    now_ns = 1000 * SECOND
    levels = (0.3, 0.5, 0.72, 0.88, 0.92, 0.98)
    return [
        *[Sampled(memory(ratio), now_ns, agent_bytes) for ratio in levels for agent_bytes in (0, 600 * MIB)],
        Ready(memory(0.88), 600 * MIB),
        *[braked(ratio, rate, growth=growth) for ratio in levels for rate in (10, 9999) for growth in (None, tool())],
        Archived(True),
        Archived(True, memory(0.3)),
        Shedded(0),
        Shedded(0, tool()),
        StillGrowing(),
        Thawed(),
        Signalled(),
        AgentEnded(),
    ]


def reachable_states():
    long_ago, now_ns = 100 * SECOND, 1000 * SECOND
    compacts = [
        model.TierState(),
        model.TierState(Status.DELIVERED, at_ns=long_ago, engaged_ns=long_ago),
        model.TierState(Status.FAILED, at_ns=now_ns - 10 * SECOND, engaged_ns=long_ago),
        model.TierState(Status.USELESS, at_ns=now_ns, engaged_ns=long_ago),
    ]
    recycles = [
        model.TierState(engaged_ns=long_ago, reachable=True),
        model.TierState(Status.RUNNING, tried_ns=now_ns, engaged_ns=long_ago, reachable=True),
        model.TierState(Status.RUNNING, tried_ns=now_ns, warned_ns=long_ago, engaged_ns=long_ago, reachable=True),
    ]
    helds = [
        braked(0.72),
        braked(0.92),
        braked(0.92, 10, growth=tool()),
        braked(0.98),
        braked(0.92, frozen=False),
        braked(0.98, frozen=False),
    ]
    for phase in Phase:
        for compact in compacts:
            for held in helds:
                for flags in range(16):
                    yield State(
                        phase=phase,
                        in_episode=True,
                        compact=compact,
                        recycle=recycles[flags % 3],
                        clear=model.TierState(engaged_ns=long_ago, warned_ns=long_ago if flags & 1 else None),
                        terminate_engaged_ns=long_ago,
                        held=held if phase is not Phase.WATCHING else None,
                        held_ns=now_ns - 2 * SECOND if flags & 4 else long_ago,
                        archived=bool(flags & 2),
                        shed_ns=now_ns - 2 * SECOND if flags & 4 else None,
                        must_terminate=bool(flags & 5),
                        probation_ns=long_ago,
                        terminated_ns=long_ago,
                        killed=bool(flags & 1),
                        veto_from_ns=now_ns - 1 if flags & 8 else None,
                        veto_for_ns=MINUTE,
                    )
