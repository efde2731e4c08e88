"""Journals read for a report: torn and foreign lines are counted, whatever they hold; times are put on one clock."""

import random
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story import EPOCH_NS, Story
from test_ladder import braked

from governor import report_html, report_json, report_markdown, report_read, report_words
from governor.policy import SECOND

BURST = (Path(__file__).parent.parent / "journals" / "burst.ndjson").read_bytes().splitlines(keepends=True)
HEAD = b'{"time":"2026-01-01T00:00:00+00:00","monotonic_ns":5,"target":"/x",'
FIELDS = ("ktime_ns", "cgroup_id", "kind", "flags", "valid", "level", "pid", "tid", "usage_pages", "bound_pages")
FIELDS += ("max_pages", "charged_pages", "fill_rate_pages", "time_to_max_ns", "stall_ns", "trend_pages")
CROSSING = orjson.dumps(dict.fromkeys(FIELDS, 1))
TORN = [
    b"",
    b"\n",
    b"{",
    b'{"time":"2026',
    b"[]",
    b"7",
    b"null",
    b"\xff\xfe",
    b"[" * 5000,
    b'{"a":NaN}',
    b'"\\ud800"',
]
FOREIGN = [
    b"{}",
    HEAD + b'"kind":7}',
    HEAD + b'"kind":"x","text":7}',
    HEAD + b'"kind":"step"}',
    HEAD + b'"kind":"step","event":"Dreamt","of":{},"now_ns":1,"phase":"watching","rule":"","instructions":[]}',
    HEAD + b'"kind":"step","event":"Sampled","of":[],"now_ns":1,"phase":"watching","rule":"","instructions":[]}',
    HEAD + b'"kind":"step","event":"AgentEnded","of":{},"now_ns":1,"phase":"asleep","rule":"","instructions":[]}',
    HEAD
    + b'"kind":"step","event":"AgentEnded","of":{},"now_ns":1,"phase":"held","rule":"","instructions":[{"X":{}}]}',
    HEAD + b'"kind":"step","event":"AgentEnded","of":{"x":1},"now_ns":1,"phase":"held","rule":"","instructions":[]}',
    HEAD + b'"kind":"begin","policy":{"engage":1}}',
    HEAD + b'"kind":"begin","policy":{},"facts":7}',
    HEAD + b'"kind":"crossing","record":{"kind":1}}',
    HEAD + b'"kind":"crossing","record":[]}',
    HEAD + b'"kind":"braked","text":"x","crossed_ns":-9,"frozen_ns":1,"state":{}}',
    HEAD + b'"kind":"archived","name":7}',
    HEAD + b'"kind":"archived","name":"--to","directory":"/","base":"","files":1,"skipped":0,"new":true}',
    HEAD + b'"kind":"begin","policy":{"brake":{"engage_ratio":1e308}}}',
    HEAD + b'"kind":"begin","policy":{"brake":{"engage_ratio":-1.0}}}',
    HEAD + b'"kind":"crossing","record":' + CROSSING.replace(b'"level":1', b'"level":-10') + b"}",
    HEAD + b'"kind":"crossing","record":' + CROSSING.replace(b'"level":1', b'"level":5') + b"}",
    HEAD + b'"kind":"killed","text":"x","pids":7}',
    HEAD + b'"kind":"killed","text":"x","pids":[1.5]}',
    HEAD.replace(b"+00:00", b"") + b'"kind":"x"}',  # a time of nowhere
    HEAD.replace(b"2026", b"9999") + b'"kind":"x"}',
    HEAD.replace(b"2026", b"0001") + b'"kind":"x"}',
    HEAD.replace(b'"/x"', b"7") + b'"kind":"x"}',
    HEAD.replace(b'"/x"', b'["\\n"]') + b'"kind":"x"}',
    HEAD.replace(b":5,", b":5e99,") + b'"kind":"x"}',
    HEAD + b'"kind":"x\\n","deep":' + b"[" * 900 + b"]" * 900 + b"}",
]


@pytest.mark.parametrize("line", TORN, ids=lambda line: repr(line[:20]))
def test_a_torn_line_is_counted(line):
    read = report_read.read([*BURST, line])
    assert (read.lines, read.torn, read.foreign) == (len(BURST) + 1, 1, 0)
    assert read.histories == report_read.read(BURST).histories


@pytest.mark.parametrize("line", FOREIGN, ids=lambda line: repr(line[62:120]))
def test_a_foreign_line_is_counted_and_leaves_nothing(line):
    read = report_read.read([*BURST, line])
    assert (read.lines, read.torn, read.foreign) == (len(BURST) + 1, 0, 1)
    assert read.histories == report_read.read(BURST).histories


def test_a_journal_of_a_real_burst_is_understood_whole():
    read = report_read.read(BURST)
    (history,) = read.histories
    assert (read.lines, read.torn, read.foreign) == (len(BURST), 0, 0)
    kinds = [orjson.loads(line)["kind"] for line in BURST]
    assert len(history.holds) == kinds.count("braked") > 0
    assert len(history.crossings) == kinds.count("crossing") > 0
    assert len(history.saved) == kinds.count("archived") > 0
    assert all(hold.to_ns and hold.to_ns >= hold.from_ns for hold in history.holds)
    assert all(hold.took_ns is None or hold.took_ns < SECOND for hold in history.holds)
    times = [one.at_ns for one in (*history.looks, *history.crossings, *history.steps)]
    assert history.first_ns - SECOND < min(times) and max(times) <= history.last_ns


def cut(lines, seed):
    """The lines with bytes changed, cut out or doubled."""
    dice, told = random.Random(seed), bytearray(b"".join(lines))
    for _ in range(dice.randint(1, 40)):
        at = dice.randrange(len(told))
        match dice.randrange(4):
            case 0:
                told[at] = dice.randrange(256)
            case 1:
                del told[at : at + dice.randrange(200)]
            case 2:
                told[at:at] = told[at : at + dice.randrange(300)]
            case 3:
                told[at : at + 1] = str(dice.choice([-10, -1, 0, 1 << 61, 1 << 63, 1e308])).encode()
    return bytes(told).splitlines(keepends=True)


@settings(max_examples=30)
@given(st.integers(0, 1 << 30))
def test_no_damage_of_a_journal_keeps_it_from_being_told(seed):
    told = report_words.document(report_read.read(cut(BURST, seed)))
    assert report_html.render(told).endswith("</html>")
    assert orjson.loads(report_json.render(told))["version"] == report_json.VERSION
    assert report_markdown.render(told).startswith("# governor report")


def forged(line):
    """The journal, with what a line is like that governor would never write."""
    found = orjson.loads(line)
    match found["kind"]:
        case "crossing":
            found["record"] |= {"fill_rate_pages": 1 << 61, "bound_pages": 1 << 63, "valid": 0xFFFF}
        case "begin":
            found |= {"facts": {"kernel": "NESTED"}, "guard": {"program": "NESTED"}}
    return orjson.dumps(found).replace(b'"NESTED"', b"[" * 1000 + b"]" * 1000)


def test_no_forged_journal_keeps_it_from_being_told():
    told = report_words.document(report_read.read(map(forged, BURST)))
    for form in (report_html, report_json, report_markdown):
        assert len(form.render(told).encode()) > 1000


@settings(max_examples=200)
@given(st.binary(max_size=300))
def test_no_bytes_are_raised_on(data):
    assert report_read.read(data.splitlines(keepends=True)).histories == ()


def test_every_time_is_on_the_wall_clock(monkeypatch, tmp_path):
    story = Story(monkeypatch, tmp_path)
    story.look(0.2)
    story.look(0.204)  # journaled a second late, with the jump
    story.look(0.75)
    story.now_ns += SECOND
    story.brake(braked(0.92))
    story.thaw(0.5)
    (history,) = report_read.read(story.lines).histories
    at_s = [(look.at_ns - EPOCH_NS) / SECOND - 1000 for look in history.looks]
    assert at_s == pytest.approx([1, 2, 3, 4], abs=1e-3)
    (hold,) = history.holds
    assert (hold.to_ns - hold.from_ns, hold.took_ns) == (pytest.approx(SECOND / 2, abs=1e6), 1_000_000)


def test_text_is_escaped_where_it_comes_in():
    said = (
        report_read.read([HEAD + '"kind":"told","text":"a\\u001b[2J\\u202e b\x7f\u200b"}'.encode()]).histories[0].said
    )
    assert [one.text for one in said] == ["a\\x1b[2J\\u202e b\\x7f\\u200b"]


def test_targets_that_share_a_journal_are_told_apart(monkeypatch, tmp_path):
    one, other = (Story(monkeypatch, tmp_path, target=name) for name in ("/a", "/b"))
    lines = []
    for story in (one, other):
        story.now_ns += SECOND
        story.brake(braked(0.92))
        lines += story.lines
    random.Random(1).shuffle(lines)
    assert sorted(history.target for history in report_read.read(lines).histories) == ["/a", "/b"]
