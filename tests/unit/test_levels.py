"""Crossings decided in user space: levels, hysteresis, horizon, and how often to look."""

import pytest

from governor import levels, record
from governor.levels import Share, Track, interval_ns, level_of
from governor.record import Levels

MS, SECOND, MIB = 1_000_000, 1_000_000_000, 1 << 20
LEVELS = Levels()
CALM = LEVELS._replace(horizon_ns=0)  # levels only
LIMIT = 1000 * MIB


@pytest.mark.parametrize(
    ("ppm", "before", "level"),
    [
        (699_999, 0, 0),
        (700_000, 0, 1),
        (650_000, 1, 1),  # held down to its release level ...
        (649_999, 1, 0),
        (690_000, 0, 0),  # ... but not reached there
        (900_000, 0, 3),
        (860_000, 3, 3),
        (849_999, 3, 2),
        (100_000, 4, 0),
        (1_200_000, 1, 4),
    ],
)
def test_a_level_is_left_under_its_release_level_only(ppm, before, level):
    assert level_of(LEVELS, ppm, before) == level


def walk(track, sizes_mib, wanted=CALM, step_ns=SECOND, limit=LIMIT, ours=True):
    """(level, rising) of what each look reports, None where it reports nothing."""
    seen = []
    for i, size_mib in enumerate(sizes_mib):
        found = track.look(wanted, int(size_mib * MIB), limit, (i + 1) * step_ns, ours)
        seen.append(found and (found.level, bool(found.flags & record.RISING)))
    return seen


def test_each_crossing_is_reported_once():
    assert walk(Track(), [500, 710, 720, 680, 910, 980, 990, 960, 860, 840, 100]) == [
        *(None, (1, True), None, None, (3, True), (4, True), None, None, (3, False), (2, False), (0, False))
    ]


def test_what_stands_still_is_no_burst():
    track = Track()
    assert walk(track, [950, 950, 950]) == [None, None, None]
    assert walk(track, [951]) == [(3, True)]


def test_growth_in_steps_under_a_batch_adds_up():
    track = Track()
    quarter = levels.CHARGE_BYTES // 4
    looks = [track.look(CALM, 950 * MIB + i * quarter, LIMIT, (i + 1) * SECOND) for i in range(6)]
    assert [found is not None for found in looks] == [False, False, False, False, True, False]


def test_a_lowered_limit_moves_the_levels_at_once():
    track = Track()
    walk(track, [500, 500])
    assert walk(track, [500], limit=540 * MIB) == [(3, True)]


def test_growth_of_others_is_not_reported_until_there_is_some_of_ours():
    track = Track()
    assert walk(track, [500, 910, 920], ours=False) == [None, None, None]
    assert walk(track, [921]) == [(3, True)]


@pytest.mark.parametrize(
    ("held_mib", "part_mib", "ours"),
    [
        pytest.param([500, 910, 920], [300, 300, 301], [False] * 3, id="of others"),
        pytest.param([500, 910, 920], [300, 710, 720], [False, True, True], id="ours"),
        pytest.param([900, 900.5, 901, 901.5], [300, 300.5, 301, 301.5], [False, False, True, True], id="slow"),
        pytest.param([900, 899, 899.5, 899], [300, 299.5, 300, 299.5], [False] * 4, id="batches of who sits still"),
        pytest.param([900, 906, 905.5, 906.1], [300, 300, 299.5, 300], [False] * 4, id="which others throttled"),
        pytest.param([900, 906, 906.1, 913], [300, 306, 306, 306], [False, True, True, False], id="others go on"),
        pytest.param([900, 880, 884], [300, 280, 284], [False, False, True], id="it gave back before"),
        pytest.param([900, 906, 912, 932], [300, 301, 302, 303], [False, False, False, True], id="one of many, late"),
        pytest.param([900, 932, 940], [300, 300.5, 300], [False] * 3, id="sits still, late"),
    ],
)
def test_whose_growth_it_is(held_mib, part_mib, ours):
    share = Share()
    looks = zip(held_mib, part_mib, strict=True)
    assert [share.look(int(held * MIB), int(part * MIB), held / 1000) for held, part in looks] == ours


def test_forgotten_levels_are_reported_again_at_the_next_growth():
    track = Track()
    walk(track, [500, 910])
    track.forget()
    assert walk(track, [910, 911]) == [None, (3, True)]


def test_what_bpf_has_told_is_not_reported_again():
    track = Track()
    walk(track, [500])
    track.told(3, False)
    assert walk(track, [910, 980]) == [None, (4, True)]


def test_max_near_in_time_is_reported_once_with_rate_and_time():
    track = Track()
    track.look(LEVELS, 500 * MIB, LIMIT, 0)
    found = track.look(LEVELS, 720 * MIB, LIMIT, 50 * MS)  # 4400 MiB/s: 280 MiB in 64 ms
    assert found.flags == record.RISING | record.HORIZON
    assert found.fill_rate_bytes == 4400 * MIB
    assert 63 * MS < found.time_to_max_ns < 64 * MS
    assert track.look(LEVELS, 800 * MIB, LIMIT, 70 * MS) is None
    assert track.look(LEVELS, 801 * MIB, LIMIT, 80 * MS) is None  # far again
    assert track.look(LEVELS, 840 * MIB, LIMIT, 90 * MS).flags == record.RISING | record.HORIZON


def test_near_but_under_the_floor_is_nothing():
    track = Track()
    track.look(LEVELS, 100 * MIB, LIMIT, 0)
    assert track.look(LEVELS, 690 * MIB, LIMIT, 10 * MS) is None


def test_looks_too_close_together_do_not_make_a_rate():
    track = Track()
    track.look(LEVELS, 500 * MIB, LIMIT, 0)
    track.look(LEVELS, 501 * MIB, LIMIT, 1)
    assert track.fill_rate_bytes is None


def test_the_trend_of_growth_in_steps_is_its_mean():
    track = Track()
    looks = [(5 * i * MS, (600 + 10 * (i // 20)) * MIB) for i in range(320)]  # 10 MiB at once, ten times a second
    found = [crossing for ns, held in looks if (crossing := track.look(CALM, held, LIMIT, ns))]
    assert [crossing.level for crossing in found] == [1]
    assert found[0].fill_rate_bytes == 2000 * MIB
    assert 80 * MIB < found[0].trend_bytes < 130 * MIB


def test_growth_after_a_fall_counts_from_the_bottom():
    track = Track()
    for ns, held_mib in ((0, 880), (10, 800), (100, 801)):
        track.look(CALM, held_mib * MIB, LIMIT, ns * MS)
    assert track.look(CALM, 920 * MIB, LIMIT, 120 * MS).trend_bytes == 1000 * MIB


def test_after_forgetting_the_trend_begins_anew():
    track = Track()
    walk(track, [100, 101, 102], step_ns=SECOND)
    track.forget()
    assert track.look(LEVELS, 720 * MIB, LIMIT, 4 * SECOND).trend_bytes is None
    assert track.look(LEVELS, 920 * MIB, LIMIT, 4 * SECOND + 100 * MS).trend_bytes == 2000 * MIB


@pytest.mark.parametrize(
    ("headroom", "rate", "expected_ms"),
    [
        (256 * 10**6, 10**9, 64),
        (0, 10**9, 10),
        (-5, 10**9, 10),
        (30 * 10**6, 10**9, 10),
        (10**12, 10**9, 1000),
        (400 * 10**6, 0, 100),  # not known to be slower
        (400 * 10**6, 250 * 10**6, 100),
        (400 * 10**6, 2 * 10**9, 50),
    ],
)
def test_the_interval_is_a_quarter_of_the_time_to_max(headroom, rate, expected_ms):
    assert interval_ns(headroom, rate) == expected_ms * MS


def test_the_worst_rate_is_remembered():
    track = Track()
    walk(track, [100, 3100, 3101, 3102])
    assert track.worst_rate_bytes == 3000 * MIB
