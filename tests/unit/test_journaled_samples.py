"""Which samples are journaled: enough for a timeline, bounded in bytes, and replayed to the same decisions."""

from dataclasses import replace

import orjson
import pytest
from hypothesis import given
from story import Story
from test_ladder import MIB, braked, histories, memory, policies

from governor import replay
from governor.model import Sampled
from governor.policy import SECOND

HOUR_S = 3600


@pytest.fixture
def story(monkeypatch, tmp_path):
    return Story(monkeypatch, tmp_path)


def ratios(story):
    steps = (orjson.loads(line) for line in story.lines[1:])
    states = (line["of"]["state"] for line in steps if line["event"] in ("Sampled", "Braked"))
    return [round((state["usage_bytes"] - state["file_lru_bytes"]) / state["max_bytes"], 3) for state in states]


def test_the_sample_before_a_jump_is_kept(story):
    for _ in range(30):
        story.look(0.200)
    story.look(0.204)  # where the burst begins
    story.look(0.60)
    assert ratios(story) == [0.2, 0.204, 0.6]
    at = [orjson.loads(line)["now_ns"] for line in story.lines[1:]]
    assert (at[2] - at[1], at == sorted(at)) == (SECOND, True)


def test_the_sample_before_a_brake_is_kept(story):
    story.look(0.3)
    story.look(0.305, after_s=50)
    story.feed(braked(0.92), after_s=0.4)
    assert ratios(story) == [0.3, 0.305, 0.92]


def test_slow_growth_costs_no_line_more(story):
    for step in range(100):
        story.look(0.20 + 0.004 * step)
    assert len(ratios(story)) == 34  # every third, as they have moved by 1 % then


@pytest.mark.parametrize(
    ("what", "file_mib", "most_lines"),
    [("nothing moves", lambda second: 0, 60), ("cache comes and goes", lambda second: second % 2 * 500, 360)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_an_hour_costs_at_most(story, what, file_mib, most_lines):
    for second in range(HOUR_S):
        story.look(0.2, file_bytes=file_mib(second) * MIB)
    assert 0.8 * most_lines <= len(story.lines) - 1 <= most_lines + 1
    assert max(map(len, story.lines[1:])) < 600  # so that is 36 kB, or 216 kB


@given(histories, policies)
def test_what_is_journaled_is_decided_again(tmp_path_factory, history, policy):
    with pytest.MonkeyPatch.context() as patch:
        directory = tmp_path_factory.mktemp("story")
        story = Story(patch, directory, policy)
        for event, passed_ns in history:
            story.now_ns += passed_ns
            story.feed(replace(event, at_ns=story.now_ns) if isinstance(event, Sampled) else event)
    path = directory / "journal"
    path.write_bytes(b"".join(story.lines))
    assert all(one.recorded == one.replayed for one in replay.replay([path]))


def test_an_unreadable_memcg_is_no_jump(story):
    story.look(0.2)
    story.feed(Sampled(None, story.now_ns), after_s=1)
    story.look(0.6)
    assert ratios(story) == [0.2, 0.6]
    assert memory(0.6).unreclaimable_ratio == 0.6
