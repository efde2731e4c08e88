"""What `governor watch` makes of samples, standings and events."""

import pytest

from governor.watch_model import (
    DEFAULT_LEVELS,
    NOT_TOLD,
    Entry,
    Model,
    as_levels,
    decided_between,
    level_of,
    short_bytes,
    short_time,
    what_comes_next,
)
from governor.watch_sample import parse_pressure
from tests.unit.watch_fixture import MIB, NOON_S, governed_burst, sample, standing

AT = {"calm": 60, "compact": 91, "clear": 110, "brake": 117, "kill": 125, "full": 128}
NEXT = [
    ("nobody", "calm", None, {}, "nobody governs it"),
    ("calm", "calm", {"phase": "watching"}, {}, "compact at 70 % (in 29.6 MiB, in 3.0 s at this rate)"),
    ("due", "compact", {"phase": "watching"}, {}, "clear at 85 %"),
    ("running", "compact", {"phase": "watching"}, {"compact": "running"}, "compact is under way (running)"),
    ("asked", "compact", {"phase": "watching"}, {"compact": "delivered"}, "compact was delivered"),
    ("useless", "compact", {"phase": "watching"}, {"compact": "useless"}, "clear at 85 %"),
    (
        "impossible",
        "clear",
        {"phase": "watching"},
        {"compact": "unavailable", "clear": "unavailable"},
        "brake: frozen",
    ),
    ("held", "brake", {"phase": "held"}, {}, "the archive, then a thaw"),
    ("probation", "brake", {"phase": "probation"}, {}, "held again if it grows on; SIGKILL, at 97 %"),
    ("terminating", "brake", {"phase": "terminating"}, {}, "SIGKILL at 97 %, or when the agent's grace is over"),
    ("nothing", "full", {"phase": "watching"}, {}, "nothing is left to do"),
    ("dry", "calm", {"phase": "watching", "dry_run": True}, {}, "(dry run, nothing is done) compact"),
]


@pytest.mark.parametrize(
    ("at", "told", "tiers", "words"), [case[1:] for case in NEXT], ids=[case[0] for case in NEXT]
)
def test_what_comes_next(at, told, tiers, words):
    seen = sample(1, AT[at])
    said = what_comes_next(told and {**told, "tiers": tiers}, "", DEFAULT_LEVELS, seen, 10 * MIB)
    assert said.startswith(words)


def test_what_is_frozen_and_not_decided_on_yet():
    seen = sample(1, 116, frozen=True)
    assert what_comes_next({"phase": "watching"}, "", DEFAULT_LEVELS, seen, 0).startswith("frozen just now")


def test_what_is_not_told_or_gone():
    assert what_comes_next(None, NOT_TOLD, DEFAULT_LEVELS, sample(1, 60), 0) == NOT_TOLD
    assert what_comes_next(standing(), "", DEFAULT_LEVELS, None, 0) == "nothing: the memcg is gone"


def test_crossings_are_seen_once_each_way_and_with_hysteresis():
    model = Model("x", "/x")
    crossed = [model.see(sample(second, held)) for second, held in enumerate((60, 92, 95, 88, 110, 117, 126, 60), 1)]
    expected = ("compact", True), None, None, ("arm", True), ("brake", True), ("last", True), ("below", False)
    assert crossed == [None, *expected]


def test_levels_of_a_policy_count():
    model = Model("x", "/x")
    model.govern(standing(levels={"compact": 0.3}))
    assert [model.see(sample(1, 30)), model.see(sample(2, 50)), model.see(sample(3, 127))] == [
        None,
        ("compact", True),
        None,
    ]
    assert model.picture(0).levels == {"compact": 0.3}
    assert as_levels(DEFAULT_LEVELS).engage_ppm == Model("y", "/y").levels.engage_ppm


@pytest.mark.parametrize(
    ("ratio", "level"), [(0, "below"), (0.7, "compact"), (0.89, "arm"), (0.9, "brake"), (2, "last")]
)
def test_levels(ratio, level):
    assert level_of(DEFAULT_LEVELS, ratio) == level


def test_rates_and_time_to_max():
    model = Model("x", "/x")
    model.see(sample(1, 60))
    assert model.picture(0).fill_rate_bytes == 0
    assert model.picture(0).time_to_max_s is None
    model.see(sample(2, 64))
    assert model.picture(0).fill_rate_bytes == 4 * MIB
    assert model.picture(0).time_to_max_s == 16.0
    model.see(sample(4, 60))
    assert model.picture(0).fill_rate_bytes == -2 * MIB


def test_the_kinds_add_up_to_the_usage():
    seen = sample(1, 60, shmem_bytes=30 * MIB)
    assert seen.anon_bytes + seen.kernel_bytes + seen.cache_bytes == seen.memory.usage_bytes
    assert seen.kernel_bytes == 0  # more anonymous memory than there is unreclaimable: the counters lag


def test_summary():
    summary = governed_burst().summary()
    assert (summary.first_bytes, summary.last_bytes, summary.peak_bytes) == (30 * MIB, 120 * MIB, 120 * MIB)
    assert summary.worst_rate_bytes == 10 * MIB
    assert summary.crossings == 1
    assert summary.events == {"braked": 1, "warning": 1}
    assert summary.changes == {"max": 8}
    assert summary.freed_bytes == {"shed": 210 * MIB}
    assert summary.grew_most == "python3 (4822)"
    assert Model("x", "/x").summary().samples == 0


def decided(ago_s, what="compact"):
    return standing(decided={"what": what, "reason": "why", "ago_s": ago_s})


def test_a_decision_is_told_once():
    assert decided_between(decided(3), decided(4)) is None
    assert decided_between(decided(30), decided(0)) == Entry(0.0, "decided", "compact: why")
    assert decided_between(decided(3), decided(0, "clear")) == Entry(0.0, "decided", "clear: why")
    assert decided_between(standing(decided=None), decided(0)) == Entry(0.0, "decided", "compact: why")
    assert decided_between(decided(3), standing(decided=None)) is None


def test_one_second_is_one_step_of_the_sparkline():
    model = Model("x", "/x")
    for quarter in range(8):
        model.see(sample(1 + quarter / 4, 60 + quarter))
    assert model.picture(NOON_S).history == (63 / 128, 67 / 128)


TIMES = [(0.0851, "85 ms"), (1.25, "1.2 s"), (42, "42 s"), (840, "14 min"), (7200, "2.0 h"), (1e9, "over a day")]


@pytest.mark.parametrize(("seconds", "text"), TIMES)
def test_short_times(seconds, text):
    assert short_time(seconds) == text


def test_short_bytes():
    assert [short_bytes(size) for size in (0, 5 * MIB, 2048 * MIB, 20480 * MIB)] == [
        *("0.0 MiB", "5.0 MiB", "2048.0 MiB", "20.0 GiB")
    ]


@pytest.mark.parametrize(
    "data", [b"", b"some avg10=x total=1\n", b"some avg10=1.0 total=1\n", b"\xff", b"some\nfull\n"]
)
def test_no_pressure(data):
    assert parse_pressure(data) is None
