"""The picture of `governor watch`, as text: golden at 80 and 120 columns, and never wider than asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from governor import watch_picture
from governor.attribution import Held
from governor.cgroup import MemoryState
from governor.watch_all import Row
from governor.watch_model import Entry, Model
from governor.watch_overview import Overview
from governor.watch_picture import ASCII, BLOCKS
from governor.watch_sample import Sample
from governor.watch_target import Target
from tests.unit.watch_fixture import MIB, NOON_S, SECOND, governed_burst, sample, standing

GOLDEN = Path(__file__).parent / "golden"


def drawn(lines):
    return "".join(f"{line.plain.rstrip()}\n" for line in lines)


def ungoverned():
    model = Model("agent.service", "/sys/fs/cgroup/system.slice/agent.service")
    model.source = "bpf (fentry), programs of its own"
    for second in range(1, 90):
        model.see(sample(second, 30, limit_mib=0))
    return model


def overview():
    rows = [
        Row(Target("/x/1", "agents", "claude-0", "agent"), 118 * MIB, 9 * MIB, None, standing()),
        Row(Target("/x/2", "agents", "a-pod-with-a-name-that-is-rather-long-0", "agent"), 90 * MIB, 0, None, standing(
            phase="watching", in_episode=False, frozen_for_ms=None,
            memory={"unreclaimable_ratio": 0.31, "max_bytes": 256 * MIB, "unreclaimable_bytes": 80 * MIB},
        )),
        Row(Target("/x/mysql.service"), 900 * MIB, -MIB, MemoryState(900 * MIB, -1, 0, 0, 0), None),
        Row(Target("/x/cron.service"), 2 * MIB, 0, MemoryState(2 * MIB, 64 * MIB, 0, 0, 0), None),
    ]  # fmt: skip
    log = (Entry(NOON_S, "decided", "agents/claude-0/agent: archive: braked at 90.0 % of max"),)
    return Overview(NOON_S, "governor 4242", "all memcgs", "412", tuple(rows), 1, "usage", log)


PICTURES = {
    "small": lambda width, glyphs: watch_picture.one(governed_burst().picture(NOON_S + 10), width, 24, glyphs),
    "burst": lambda width, glyphs: watch_picture.one(governed_burst().picture(NOON_S + 10), width, 30, glyphs),
    "calm": lambda width, glyphs: watch_picture.one(ungoverned().picture(NOON_S), width, 24, glyphs, True),
    "all": lambda width, glyphs: watch_picture.many(overview(), width, 14, glyphs),
}
CASES = [(name, width, BLOCKS) for name in PICTURES for width in (80, 120)] + [("burst", 80, ASCII)]


@pytest.mark.parametrize(
    ("name", "width", "glyphs"), CASES, ids=lambda value: "ascii" if value is ASCII else str(value)[:5]
)
def test_golden(name, width, glyphs):
    """After a change that is meant: delete the file, run this twice, and look at what git says has changed."""
    text = drawn(PICTURES[name](width, glyphs))
    golden = GOLDEN / f"watch-{name}-{width}{'-ascii' if glyphs is ASCII else ''}.txt"
    if not golden.exists():
        golden.write_text(text)
        pytest.fail(f"{golden} was not there: look at it")
    assert text == golden.read_text()


def test_ascii_is_ascii():
    assert drawn(PICTURES["burst"](80, ASCII)).isascii()


texts = st.text(max_size=40)


@given(texts, texts, texts, st.integers(20, 200), st.integers(3, 60))
def test_whatever_it_is_called_it_fits_and_steers_no_terminal(name, comm, text, width, height):
    model = Model(name, f"/sys/fs/cgroup/{name}")
    model.source = text
    processes = [Held(1, comm, MIB, 2 * MIB, False, False)]
    for second in (1, 2):
        model.see(sample(second, 100), processes)
    model.govern(standing(policy=text, tiers={"compact": text}, decided={"what": comm, "reason": text, "ago_s": 3}))
    model.note(Entry(NOON_S, comm, text))
    lines = watch_picture.one(model.picture(NOON_S), width, height, BLOCKS)
    rows = (Row(Target("/x", name, comm, text), MIB), Row(Target(f"/{text}"), MIB, 0, None, standing(phase=comm)))
    many = watch_picture.many(replace(overview(), rows=rows, title=name), width, height, BLOCKS)
    for picture in (lines, many):
        assert len(picture) <= height
        for line in picture:
            assert cell_len(line.plain) <= width, line.plain
            assert line.plain.isprintable()


@pytest.mark.parametrize("selected", [0, 9, 29])
def test_who_is_selected_is_shown(selected):
    rows = tuple(Row(Target(f"/x/unit-{number}"), MIB) for number in range(30))
    lines = watch_picture.many(replace(overview(), rows=rows, selected=selected), 80, 16, BLOCKS)
    [chosen] = [line.plain for line in lines if line.plain.startswith(BLOCKS.chosen)]
    assert f"unit-{selected} " in chosen


def test_levels_that_a_policy_never_reaches_have_no_mark():
    model = governed_burst()
    model.govern(standing(levels={"compact": 0.6}))
    picture = drawn(watch_picture.one(model.picture(NOON_S), 80, 30, BLOCKS))
    assert "compact 60" in picture
    assert picture.count(BLOCKS.mark) == 1


GIB = MIB << 10
MACHINE = Sample(SECOND, MemoryState(8 * GIB, 23 * GIB, 3515 * MIB, 4665 * MIB, 0), limit="the machine's")


def test_figures_of_different_size_keep_their_units_and_are_not_cut_off():
    model = Model("memory", "/sys/fs/cgroup/memory")
    model.see(MACHINE)
    text = drawn(watch_picture.one(model.picture(NOON_S), 80, 24, BLOCKS))
    assert "unreclaimable 3527.0 MiB of 23.0 GiB, 15.0 %" in text
    assert "· free to max 15.0 GiB\n" in text


def test_no_line_of_the_log_begins_in_its_middle():
    model = ungoverned()
    for number in range(3):
        model.note(Entry(NOON_S + number, "source", f"entry {number}: " + "a reason of many words " * 3))
    for height in range(8, 24):
        text = drawn(watch_picture.one(model.picture(NOON_S), 60, height, BLOCKS))
        assert all(f"source: entry {number}" in text for number in range(3) if f"12:00:0{number} " in text)
        log = text.partition("next ")[2].splitlines()[2:-1]
        assert not log or not log[0].strip() or log[0].startswith("12:00:0"), text


def test_of_an_id_the_beginning_is_shown_which_target_takes():
    container_id = "3f2a9c" + "0" * 58
    names = (container_id, f"cri-containerd-{container_id}.scope", "a-service-of-a-name-that-goes-on-and-on.service")
    rows = tuple(Row(Target(f"/x/{name}"), MIB) for name in names)
    text = drawn(watch_picture.many(replace(overview(), rows=rows), 80, 14, BLOCKS))
    assert "  3f2a9c0000" in text
    assert "▶ cri-containerd-3f2a9c0" in text
    assert "and-on.service" in text
