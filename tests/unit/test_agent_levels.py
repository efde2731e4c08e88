"""Statuses with hysteresis, and how often an agent looks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent.levels import INTERVAL_MAX_S, INTERVAL_MIN_S, LEAST_WORST_BYTES, Levels, Pace, Status

MIB = 1 << 20
GIB = 1 << 30


@pytest.mark.parametrize(
    ("ratios", "statuses"),
    [
        ([0.0, 0.749, 0.75, 0.85, 0.92, 1.2], "ok ok warning shedding critical critical"),
        ([0.76, 0.71, 0.699], "warning warning ok"),
        ([0.93, 0.871, 0.869, 0.801, 0.79, 0.69], "critical critical shedding shedding warning ok"),
        ([0.93, 0.1], "critical ok"),
        ([0.84, 0.81, 0.86, 0.81], "warning warning shedding shedding"),
    ],
)
def test_statuses(ratios, statuses):
    status, seen = Status.OK, []
    for ratio in ratios:
        status = Levels().status(ratio, status)
        seen.append(str(status))
    assert seen == statuses.split()


ratio = st.floats(0, 1.5)


@given(ratio, ratio, st.sampled_from(Status))
def test_more_memory_is_never_a_lower_status(lower, higher, before):
    lower, higher = sorted((lower, higher))
    assert Levels().status(lower, before) <= Levels().status(higher, before)


@given(ratio, st.sampled_from(Status))
def test_the_same_ratio_settles_at_once(at, before):
    once = Levels().status(at, before)
    assert Levels().status(at, once) is once


@given(st.floats(0, 1), st.sampled_from(Status), st.lists(st.floats(-0.024, 0.024), max_size=20))
def test_wobbling_less_than_the_hysteresis_flaps_nowhere(at, before, wobbles):
    statuses = [before]
    for wobble in [0.0, *wobbles]:
        statuses.append(Levels().status(at + wobble, statuses[-1]))
    settled = statuses[1:]
    assert settled in (sorted(settled), sorted(settled, reverse=True))  # no level is reached and left again


@pytest.mark.parametrize(
    "ratios", [{"warning_ratio": 0.9}, {"critical_ratio": 1.1}, {"warning_ratio": 0}, {"release_ratio": 0.8}]
)
def test_levels_that_make_no_sense_are_refused(ratios):
    with pytest.raises(ValueError, match="expected"):
        Levels(**ratios)


@pytest.mark.parametrize(
    ("held", "limit", "expected_s"),
    [
        (0, 256 * GIB, INTERVAL_MAX_S),
        (0.42 * GIB, GIB, 0.5),  # half a GiB to critical, a quarter of the time at 256 MiB/s
        (0.91999 * GIB, GIB, INTERVAL_MIN_S),
        (0.94 * GIB, GIB, 0.06),  # past it the room to max counts
        (2 * GIB, GIB, INTERVAL_MIN_S),
    ],
)
def test_it_looks_the_more_often_the_nearer(held, limit, expected_s):
    assert Pace(Levels()).next_s(int(held), limit, 0.0) == pytest.approx(expected_s, rel=0.01)


def test_the_worst_growth_ever_seen_counts_from_then_on():
    pace = Pace(Levels())
    calm_s = pace.next_s(0, 4 * GIB, 0.0)
    pace.next_s(1 * GIB, 4 * GIB, 0.5)
    assert pace.worst_rate_bytes == 2 * GIB
    assert pace.next_s(0, 4 * GIB, 10.0) == pytest.approx(calm_s * LEAST_WORST_BYTES / (2 * GIB))
    pace.next_s(512 * MIB, 4 * GIB, 10.001)  # over a millisecond rates are noise
    assert pace.worst_rate_bytes == 2 * GIB


def test_another_memcg_that_binds_is_no_growth():
    pace = Pace(Levels())
    pace.next_s(1 * GIB, 4 * GIB, 0.0, "/own")
    pace.next_s(20 * GIB, 40 * GIB, 0.1, "/pod")
    pace.next_s(20 * GIB + 512 * MIB, 40 * GIB, 1.1, "/pod")
    assert pace.worst_rate_bytes == 512 * MIB
