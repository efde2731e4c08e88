"""The ladder, as a table of cases and as properties over arbitrary histories."""

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from governor import ladder
from governor.cgroup import MemoryState
from governor.ladder import (
    AgentEnded,
    Archive,
    Archived,
    Attempt,
    Brake,
    Braked,
    Compact,
    Compacted,
    Kill,
    Phase,
    Sampled,
    Signalled,
    State,
    StillGrowing,
    Terminate,
    Thaw,
    Thawed,
    UsualLevels,
)
from governor.policy import SECOND, Policy

MIB = 1 << 20
POLICY = Policy()
COMPACTING = Policy(compact_argv=("compact",))


def memory(ratio, max_bytes=1000 * MIB, file_bytes=0):
    return MemoryState(int(ratio * max_bytes) + file_bytes, max_bytes, 0, file_bytes, 0)


def braked(ratio, rate_mib=1000, frozen=True):
    return Braked(memory(ratio), None if rate_mib is None else rate_mib * MIB, frozen)


def run(*events, policy=POLICY, state=None, seconds_apart=0.0):
    """The names of all instructions of a history, and the last state."""
    state, now_ns, names = state or State(), 10 * SECOND, []
    for event in events:
        state, instructions = ladder.step(state, event, now_ns, policy)
        names += [type(instruction).__name__ for instruction in instructions]
        now_ns += int(seconds_apart * SECOND)
    return names, state


def test_a_burst_without_room_is_archived_then_terminated():
    names, state = run(braked(0.91), Archived(True), Signalled(), AgentEnded())
    assert names == ["Archive", "Hold", "Terminate", "Thaw", "UsualLevels"]
    assert state.phase is Phase.WATCHING and not state.in_episode


def test_slow_growth_gets_a_probation_and_is_archived_again_before_the_end():
    names, state = run(braked(0.91, rate_mib=10), Archived(True), braked(0.94, rate_mib=10), Archived(True))
    assert names == ["Archive", "Thaw", "Archive", "Hold", "Terminate"]
    assert state.phase is Phase.TERMINATING


def test_an_early_brake_is_a_probation_whatever_the_rate():
    names, state = run(braked(0.72, rate_mib=50_000), Archived(True))
    assert names == ["Archive", "Thaw"]
    assert state.phase is Phase.PROBATION


def test_probation_brakes_again_a_third_of_the_way_to_the_last_level():
    state, _ = ladder.step(State(), braked(0.91, 10), 0, POLICY)
    _, (thaw,) = ladder.step(state, Archived(True), 0, POLICY)
    assert thaw == Thaw(930_000, 930 * MIB, False, thaw.reason)


def test_a_probation_that_stays_calm_ends():
    _, state = run(braked(0.72), Archived(True), Sampled(memory(0.6)))
    assert state.phase is Phase.PROBATION
    names, state = run(Sampled(memory(0.6)), state=replace(state, probation_until_ns=0))
    assert names == ["UsualLevels"]
    assert state.phase is Phase.WATCHING


def test_a_failed_archive_does_not_strand():
    assert run(braked(0.95), Archived(False))[0] == ["Archive", "Hold", "Terminate"]


def test_what_grows_although_frozen_is_terminated_after_the_archive():
    names, _ = run(braked(0.72), StillGrowing(), Archived(True))
    assert names == ["Archive", "Terminate"]


def test_what_cannot_be_frozen_is_killed_after_the_archive():
    names, _ = run(braked(0.93, frozen=False), Archived(True), Signalled())
    assert names == ["Archive", "Hold", "Terminate", "Kill"]


def test_the_last_level_and_the_end_of_grace_kill_once():
    history = (braked(0.95), Archived(True), Signalled())
    assert run(*history, braked(0.975), braked(0.98), Sampled(memory(0.98)))[0].count("Kill") == 1
    names, _ = run(*history, *[Sampled(memory(0.9))] * 3, seconds_apart=6)
    assert names.count("Kill") == 1


def test_compact_is_delivered_once_and_before_the_brake():
    names, state = run(Sampled(memory(0.71)), Sampled(memory(0.75)), Compacted(True), policy=COMPACTING)
    assert names == ["Compact"]
    assert state.compact is Attempt.DELIVERED


def test_compact_cools_down_and_comes_again_in_the_next_episode():
    high, low = Sampled(memory(0.75)), Sampled(memory(0.2))
    assert run(high, Compacted(True), low, high, policy=COMPACTING)[0] == ["Compact"]
    assert run(high, Compacted(True), low, high, policy=COMPACTING, seconds_apart=100)[0] == ["Compact", "Compact"]


def test_a_brake_counts_compact_as_attempted_and_a_probation_delivers_it():
    names, _ = run(braked(0.72), Archived(True), Sampled(memory(0.73)), policy=COMPACTING)
    assert names == ["Archive", "Thaw", "Compact"]
    state, _ = ladder.step(State(), braked(0.72), 0, COMPACTING)
    _, (thaw,) = ladder.step(state, Archived(True), 0, COMPACTING)
    assert thaw.high_bytes is None  # a throttled agent could not compact


def test_a_missed_crossing_brakes():
    assert run(*[Sampled(memory(0.93))] * 2, seconds_apart=1)[0] == ["Brake"]
    assert run(Sampled(memory(0.93)), Sampled(memory(0.8)), Sampled(memory(0.93)), seconds_apart=1)[0] == []


def test_a_full_agent_that_sits_still_is_not_terminated():
    names, state = run(braked(0.92, rate_mib=0), Archived(True), *[Sampled(memory(0.92))] * 30, seconds_apart=1)
    assert names == ["Archive", "Thaw"]
    assert run(braked(0.92, rate_mib=None), Archived(True))[0] == ["Archive", "Thaw"]
    assert state.phase is Phase.PROBATION


def test_cache_alone_does_nothing():
    full_of_cache = MemoryState(1000 * MIB, 1000 * MIB, 0, 900 * MIB, 90 * MIB)
    assert run(*[Sampled(full_of_cache)] * 5)[0] == []


ratios = st.floats(0, 1.2)
events = st.one_of(
    st.builds(Sampled, ratios.map(memory)),
    st.builds(braked, ratios, st.one_of(st.none(), st.integers(0, 100_000)), st.booleans()),
    st.builds(Archived, st.booleans()),
    st.builds(Compacted, st.booleans()),
    st.sampled_from([StillGrowing(), Thawed(), Signalled(), AgentEnded()]),
)
histories = st.lists(st.tuples(events, st.integers(-5 * SECOND, 100 * SECOND)), max_size=40)
policies = st.sampled_from([POLICY, COMPACTING])
DESTRUCTIVE = (Terminate, Kill)


@settings(max_examples=500)
@given(histories, policies)
def test_in_any_history(history, policy):
    """Clocks may jump. Never two destructive instructions in a step; nothing dies unarchived or uncompacted."""
    state, now_ns, archived = State(), 10 * SECOND, False
    for event, passed_ns in history:
        now_ns += passed_ns
        before = state
        state, instructions = ladder.step(state, event, now_ns, policy)
        assert sum(isinstance(i, DESTRUCTIVE) for i in instructions) <= 1
        assert sum(isinstance(i, Compact | Brake | Thaw | Terminate | Kill) for i in instructions) <= 1
        for instruction in instructions:
            if isinstance(instruction, Archive):
                archived = False
            if isinstance(instruction, DESTRUCTIVE):
                assert state.compact is not Attempt.NONE
                assert archived or isinstance(event, Archived)
            if isinstance(instruction, Kill):
                assert before.phase is Phase.TERMINATING
        if isinstance(event, Archived) and before.phase is Phase.HELD:
            archived = True
        if isinstance(event, AgentEnded):
            assert instructions == (UsualLevels(),)


@settings(max_examples=300)
@given(histories, policies)
def test_nothing_strands(history, policy):
    """From every state, growth that goes on ends in SIGKILL at the latest."""
    state, now_ns = State(), 10 * SECOND
    for event, passed_ns in history:
        now_ns += passed_ns
        state, _ = ladder.step(state, event, now_ns, policy)
    killed = state.killed
    for _ in range(12):
        now_ns += 15 * SECOND
        for event in (Sampled(memory(0.99)), braked(0.99), Archived(True), Signalled()):
            state, instructions = ladder.step(state, event, now_ns, policy)
            killed = killed or any(isinstance(i, Kill) for i in instructions)
    assert killed


def test_hold_lasts_longer_than_an_archive_may():
    _, instructions = ladder.step(State(), braked(0.95), 0, POLICY)
    assert instructions[1].for_ns > POLICY.archive_deadline_ns
