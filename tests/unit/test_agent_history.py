"""BoundedHistory: what stays, what goes, what is on disk; and its spill, however its writer ended."""

import asyncio
import enum
import gc
import os
import random
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent import history as history_module
from governor.agent.history import BoundedHistory, HistoryFull
from governor.agent.history_spill import Spill, SpillError
from tests.fakes import full_disk

KIB = 1 << 10


def numbers(turns):
    return [turn.number for turn in turns]


def texts(history):
    return [turn.content for turn in history]


def is_result(turn):
    return turn.role == "tool" or isinstance(turn.content, list)


def a_result(text):
    return [{"type": "tool_result", "tool_use_id": "toolu_1", "content": text}]


# What is appended (role, content), with at most six turns and room made for as few as possible; what is left.
TALKS = {
    "nothing has to go": ("u1 a1 u2 a2", "u1 a1 u2 a2"),
    "a whole exchange goes": ("u1 a1 u2 a2 u3 a3 u4", "u2 a2 u3 a3 u4"),
    "with its tools": ("u1 a1 t1 a2 u2 a3 u3", "u2 a3 u3"),
    "the system turn stays": ("s0 u1 a1 u2 a2 u3 a3", "s0 u2 a2 u3 a3"),
    "so does a pinned one, alone": ("u1 a1! u2 a2 u3 a3 u4 a4", "a1! u3 a3 u4 a4"),
    "a pinned call, with its results": ("u1 a1! t1 t2 u2 a2 u3 a3", "a1! t1 t2 u2 a2 u3 a3"),
    "a pinned question": ("u1! a1 u2 a2 u3 a3 u4", "u1! u2 a2 u3 a3 u4"),
    "one long task keeps its question": ("u1 a1 t1 a2 t2 a3 t3 a4", "u1 a2 t2 a3 t3 a4"),
    "and the call that waits for a result": ("u1 a1 t1 t2 t3 a2 t4", "u1 a2 t4"),
    "results as blocks of the user": ("u1 a1 r1 a2 r2 a3 r3 a4", "u1 a2 r2 a3 r3 a4"),
    "earlier exchanges before the task's steps": ("u1 a1 u2 a2 t2 a3 t3 a4", "u2 a2 t2 a3 t3 a4"),
    "without a question": ("a1 a2 a3 a4 a5 a6 a7 a8", "a3 a4 a5 a6 a7 a8"),
}
ROLES = {"u": "user", "a": "assistant", "t": "tool", "s": "system", "r": "user"}


def say(history, word):
    content = a_result(word) if word[0] == "r" else word
    history.append(ROLES[word[0]], content, pinned=word.endswith("!"))


@pytest.mark.parametrize("talk", TALKS)
def test_what_stays(talk):
    said, left = TALKS[talk]
    words = said.split()
    limit = max(6, len(left.split()))
    with BoundedHistory(max_turns=limit, release_ratio=1) as history:
        for word in words:
            say(history, word)
        assert [t if isinstance(t, str) else t[0]["content"] for t in texts(history)] == left.split()
        assert len(history) == len(left.split())


@pytest.mark.parametrize(
    ("ratio", "left"),
    [(1, "a1 u2 a2 u3 a3"), (0.5, "a1 u2 a2 u3 a3"), (0.4, "u2 a2 u3 a3"), (0.2, "u3 a3"), (0, "u3 a3")],
)
def test_shrink(ratio, left):
    """No further than asked for, and never the question that is being answered, nor its last step."""
    history = BoundedHistory(max_turns=10)
    for word in ["a1", "u2", "a2", "u3", "a3"]:
        say(history, word)
    history.shrink(ratio)
    assert texts(history) == left.split()


class Role(enum.StrEnum):
    SYSTEM = "system"
    USER = "user"


class Named(str, enum.Enum):  # noqa: UP042  as written before Python 3.11; its str() is "Named.USER"
    USER = "user"


def test_roles_may_be_an_enum_s(tmp_path):
    with BoundedHistory(max_turns=3, release_ratio=1, spill=tmp_path / "spill") as history:
        history.append(Role.SYSTEM, "s0")
        for role in (Role.USER, Named.USER, "user"):
            history.append(role, "u")
        assert [message["role"] for message in history.messages()] == ["system", "user", "user"]
        assert {type(turn.role) for turn in history} == {str}
        assert [turn.role for turn in history.spilled()] == ["user"]
    with pytest.raises(TypeError, match="requires a 'str' object but received a 'int'"):
        BoundedHistory(max_turns=3).append(1, "one")


def test_full_says_what_stays_and_changes_nothing():
    history = BoundedHistory(8 * KIB)
    history.append("system", "x" * 3000)
    history.append("user", "y" * 3000, pinned=True)
    before = list(history)
    with pytest.raises(HistoryFull, match=r"a turn of 4,\d+ bytes, 1 turns.* expected at most 8,192 bytes"):
        history.append("user", "z" * 4000)
    assert list(history) == before
    history.append("user", "z" * 400)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "max_bytes, max_turns or max_tokens"),
        ({"max_turns": 0}, "more than 0"),
        ({"max_tokens": 5}, "go together"),
        ({"max_turns": 5, "count_tokens": len}, "go together"),
        ({"max_turns": 5, "release_ratio": 0}, "release_ratio 0"),
        ({"max_turns": 5, "release_ratio": 1, "summarise": print}, "below 1 with summaries"),
    ],
)
def test_options_that_mean_nothing(options, said):
    with pytest.raises(ValueError, match=said):
        BoundedHistory(**options)


def test_tokens_by_the_counter_that_is_given():
    history = BoundedHistory(max_tokens=10, count_tokens=lambda _role, content: len(content.split()), release_ratio=1)
    for text in ("a b c", "d e f", "g h", "i j k"):
        history.append("user", text)
    assert (texts(history), history.tokens) == (["d e f", "g h", "i j k"], 8)


def test_pinned_later_and_no_longer():
    history = BoundedHistory(max_turns=3, release_ratio=1)
    for i in range(3):
        history.append("user", f"u{i}")
    history.pin(0)
    history.append("user", "u3")
    assert texts(history) == ["u0", "u2", "u3"]
    history.pin(0, False)
    history.append("user", "u4")
    assert texts(history) == ["u2", "u3", "u4"]
    with pytest.raises(KeyError, match="turn 0 is not here"):
        history.pin(0)


@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.parametrize("result", [("tool", "r"), ("user", a_result("r"))])
def test_what_is_unpinned_goes_with_what_belongs_to_it(at, result):
    """A result without its call, or a call without its result, no model's API takes."""
    history = BoundedHistory(max_turns=6)
    for number, (role, content) in enumerate([("user", "u"), ("assistant", "call"), result]):
        history.append(role, content, pinned=number == at)
    for i in range(6):
        history.append("user", f"u{i}")
    assert numbers(history)[:2] == [1, 2]
    history.pin(at, False)
    for i in range(6):
        history.append("user", f"v{i}")
    assert numbers(history)[0] > 2
    assert (len(history), history.size_bytes) == (len(list(history)), sum(turn.size_bytes for turn in history))


def test_numbers_go_on_although_an_old_turn_went_last(tmp_path):
    with BoundedHistory(max_turns=4, spill=tmp_path / "spill", release_ratio=1) as history:
        history.append("user", "pinned", pinned=True)
        for i in range(6):
            history.append("user", f"u{i}")
        history.pin(0, False)
        history.shrink(0.75)
        assert numbers(history.spilled()) == [1, 2, 3, 0]
    with BoundedHistory(max_turns=4, spill=tmp_path / "spill") as history:
        assert history.append("user", "new").number == 4


def test_the_size_is_what_it_holds():
    def talk():
        history = BoundedHistory(1 << 20)
        for i in range(5000):
            history.append("assistant" if i % 2 else "user", f"{i} {'word ' * (i % 100)}")
        return history

    talk()
    gc.collect()
    tracemalloc.start()
    try:
        before_bytes = tracemalloc.get_traced_memory()[0]
        history = talk()
        gc.collect()
        held_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
    finally:
        tracemalloc.stop()
    assert history.size_bytes == pytest.approx(held_bytes, rel=0.05)
    assert history.size_bytes <= 1 << 20


@pytest.mark.parametrize("roles", [["user", "assistant"], ["assistant"], ["user"], ["assistant", "tool", "tool"]])
def test_a_turn_costs_the_same_however_many_came_before(monkeypatch, roles):
    looked = []
    real = history_module._pinned
    monkeypatch.setattr(history_module, "_pinned", lambda step: looked.append(1) or real(step))

    def looks(count):
        looked.clear()
        history = BoundedHistory(max_turns=200, release_ratio=1)
        history.append("user", "the task")
        for i in range(50):
            history.append("user", f"pinned {i}", pinned=True)
        for i in range(count):
            history.append(roles[i % len(roles)], "x")
        return len(looked)

    assert looks(4000) < 5 * 4000
    assert looks(8000) < 2.2 * looks(4000)


# Summaries


def joined(before, turns):
    return "; ".join([before] * bool(before) + [turn.content for turn in turns])


def test_a_summary_takes_the_place_of_what_goes():
    history = BoundedHistory(max_turns=4, summarise=joined, release_ratio=0.5)
    history.append("system", "s")
    for i in range(8):
        history.append("user", f"u{i}")
        assert len(history) <= 4
    assert texts(history) == ["s", "u0; u1; u2; u3; u4; u5; u6", "u7"]
    assert [turn.role for turn in history] == ["system", "user", "user"]


def test_an_asynchronous_summariser():
    async def slowly(before, turns):
        assert len(history) <= 4
        with pytest.raises(RuntimeError, match="append_async"):
            history.append("user", "in between")
        await asyncio.sleep(0.01)
        return joined(before, turns)

    async def talk():
        await asyncio.gather(*(history.append_async("user", f"u{i}") for i in range(6)))
        await history.shrink_async(0.6)

    history = BoundedHistory(max_turns=4, summarise=slowly)
    asyncio.run(talk())
    assert texts(history) == ["u0; u1; u2; u3; u4", "u5"]
    history.append("user", "u6")
    history.append("user", "u7")
    with pytest.raises(TypeError, match="append_async"):
        history.append("user", "u8")
    assert texts(history) == ["u0; u1; u2; u3; u4", "u5", "u6", "u7"]


@pytest.mark.parametrize("fails", ["raises", "too long"])
def test_a_summary_that_fails_changes_nothing(tmp_path, fails):
    def summarise(_before, _turns):
        if fails == "raises":
            raise ConnectionError("the model is overloaded")
        return "x" * 10_000

    with BoundedHistory(8 * KIB, summarise=summarise, spill=tmp_path / "spill") as history:
        with pytest.raises((ConnectionError, HistoryFull)):
            for i in range(100):
                history.append("user", f"{i} " + "x" * 500)
        assert len(history) == int(texts(history)[-1].split()[0]) + 1
        assert not list(history.spilled())


# On disk


def test_what_was_dropped_is_read_back_after_a_restart_too(tmp_path):
    contents = [f"größer \ud800 {i}\n" for i in range(10)] + [a_result("x"), [{"type": "text", "text": "🙂"}]]
    for _ in range(2):
        with BoundedHistory(max_turns=2, release_ratio=1, spill=tmp_path / "deep" / "spill") as history:
            for content in contents:
                history.append("assistant", content)
            history.shrink(0.5)
    read = BoundedHistory(max_turns=2, spill=tmp_path / "deep" / "spill")
    assert [turn.content for turn in read.spilled()] == contents[:11] + contents[:11]
    assert numbers(read.spilled()) == [*range(11), *range(11, 22)]
    assert (tmp_path / "deep" / "spill").stat().st_mode & 0o777 == 0o600


DEEP = []
for _ in range(100_000):
    DEEP = [DEEP]


@pytest.mark.parametrize("content", [[b"bytes"], DEEP, [Path()]])
def test_what_cannot_be_written_is_refused_when_it_comes(tmp_path, content):
    said = r"found content that is no JSON \(.*, expected text, or .*model_dump"
    with BoundedHistory(max_turns=2, spill=tmp_path / "spill") as history, pytest.raises(TypeError, match=said):
        history.append("user", content)


def test_a_whole_message_as_the_content(tmp_path):
    """What OpenAI's API has beside the content stays with it, and a result with its call."""
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "t1", "function": {"name": "f"}}]}
    result = {"role": "tool", "tool_call_id": "t1", "content": "42"}
    blocks = {"role": "user", "content": a_result("43")}
    with BoundedHistory(max_turns=4, release_ratio=1, spill=tmp_path / "spill") as history:
        for message in (call, result, blocks, {"role": "user", "content": "u"}):
            history.append(message["role"], message)
        assert history.messages() == [call, result, blocks, {"role": "user", "content": "u"}]
        history.append("assistant", "a")
        assert history.messages() == [{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}]
        assert [turn.content for turn in history.spilled()] == [call, result, blocks]


def test_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    history = BoundedHistory(max_turns=4, spill=tmp_path / "spill", release_ratio=0.5)
    for i in range(4):
        history.append("user", f"u{i}")
    size_bytes = history._spill.size_bytes
    full_disk.fill(monkeypatch, "write", 70)
    with pytest.raises(OSError, match="No space left"):
        history.append("user", "u4")
    monkeypatch.undo()
    assert (texts(history), history._spill.size_bytes) == (["u0", "u1", "u2", "u3"], size_bytes)
    history.append("user", "u4")
    assert numbers(history.spilled()) == [0, 1, 2]


def test_one_writer(tmp_path):
    with BoundedHistory(max_turns=1, spill=tmp_path / "spill"), pytest.raises(SpillError, match="in use"):
        Spill(tmp_path / "spill")
    Spill(tmp_path / "spill").close()


def test_who_forgets_to_close_holds_nobody_up(tmp_path):
    def session():
        BoundedHistory(max_turns=1, spill=tmp_path / "spill").append("user", "u")

    session()
    session()


@pytest.mark.parametrize("what", ["link", "fifo", "directory", "another file"])
def test_what_is_no_spill_is_left_alone(tmp_path, what):
    path, other = tmp_path / "spill", tmp_path / "notes"
    other.write_text("notes of somebody, without a newline")
    if what == "link":
        path.symlink_to(other)
    elif what == "fifo":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    else:
        path = other
    with pytest.raises(OSError, match=r"symbolic links|no regular file|directory|name another file"):
        Spill(path)
    assert other.read_text() == "notes of somebody, without a newline"


records = st.lists(
    st.recursive(
        st.none() | st.integers() | st.text(), lambda t: st.lists(t) | st.dictionaries(st.text(), t), max_leaves=5
    )
)


@given(kept=records, torn=records, cut=st.floats(0, 1), garbage=st.sampled_from([b"", b"\0" * 50, b"\0\n", b"x\n"]))
def test_torn_anywhere(tmp_path_factory, kept, torn, cut, garbage):
    """What was whole before the write that was cut is there, and what comes after follows it."""
    path = tmp_path_factory.mktemp("torn") / "spill"
    spill = Spill(path)
    spill.write(kept)
    whole_bytes = spill.size_bytes
    spill.write(torn)
    spill.close()
    data = path.read_bytes()
    end = whole_bytes + int(cut * (len(data) - whole_bytes))
    path.write_bytes(data[:end] + garbage)
    spill = Spill(path)
    read = list(spill)
    assert read == (kept + torn)[: len(read)]
    assert len(read) >= len(kept)
    assert spill.last() == (read[-1] if read else None)
    spill.write(["after"])
    assert list(spill) == [*read, "after"]
    spill.close()


@given(cut=st.integers(0, 18))
def test_torn_before_the_first_line_is_whole(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("torn") / "spill"
    Spill(path).close()
    path.write_bytes(path.read_bytes()[:cut])
    spill = Spill(path)
    spill.write([1])
    assert list(spill) == [1]


def test_after_closing_nothing_is_written_anywhere(tmp_path):
    history = BoundedHistory(max_turns=1, spill=tmp_path / "spill")
    history.append("user", "u0")
    history.close()
    history.close()
    with (
        (tmp_path / "other").open("w"),
        pytest.raises(OSError, match="Bad file descriptor"),
    ):  # it has that number now
        history.append("user", "u1")
    assert (tmp_path / "other").read_bytes() == b""


def test_damage_in_the_middle_is_said(tmp_path):
    spill = Spill(tmp_path / "spill")
    spill.write(["first", "second", "third"])
    spill.close()
    data = (tmp_path / "spill").read_bytes()
    (tmp_path / "spill").write_bytes(data.replace(b"second", b"sec0nd"))
    reader = iter(Spill(tmp_path / "spill"))
    assert next(reader) == "first"
    with pytest.raises(SpillError, match=r"is damaged at byte 36"):
        next(reader)


WRITER = """
import sys
from governor.agent.history import BoundedHistory
history = BoundedHistory(64 << 10, spill=sys.argv[1])
print("ready", flush=True)
while True:
    turn = history.append("user", "x" * 3000)
    print(turn.number, flush=True)
"""


def test_killed_while_it_writes(tmp_path):
    """Again and again by SIGKILL, at any moment: nothing whole is lost, nothing is there twice."""
    chance, begun = random.Random(7), 0
    for _ in range(5):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path / "spill"], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        lines = [writer.stdout.readline() for _ in range(chance.randint(30, 200))]
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        assert lines[0] == "ready\n"
        spill = Spill(tmp_path / "spill")
        found = [record["number"] for record in spill]
        spill.close()
        assert found == list(range(len(found)))
        assert len(found) >= begun + len(lines) - 25  # what a cap of 64 KiB still holds
        begun = len(found)


roles = st.sampled_from(["user", "assistant", "assistant", "tool", "system", "result"])


@given(
    options=st.fixed_dictionaries(
        {
            "max_bytes": st.integers(2000, 20_000),
            "max_turns": st.none() | st.integers(2, 12),
            "release_ratio": st.sampled_from([0.3, 0.75, 0.99]),
            "summarise": st.sampled_from([None, lambda before, turns: f"{before}{len(turns)}."[-40:]]),
        }
    ),
    talk=st.lists(st.tuples(roles, st.integers(0, 3000), st.integers(0, 9)), max_size=60),
)
def test_any_conversation(tmp_path_factory, options, talk):
    said, pinned = {}, set()
    with BoundedHistory(**options, spill=tmp_path_factory.mktemp("talk") / "spill") as history:
        for role, size, chance in talk:
            content = a_result("x" * size) if role == "result" else "x" * size
            before = list(history)
            try:
                if chance == 9:
                    history.shrink(0.5)
                turn = history.append("user" if role == "result" else role, content, pinned=chance == 0)
            except HistoryFull:
                assert chance == 9 or list(history) == before
                continue
            said[turn.number] = turn
            pinned |= {turn.number} if chance == 0 or role == "system" else set()
            here = list(history)
            own = [each for each in here if each.number in said and each is said[each.number]]
            gone = list(history.spilled())
            # The caps hold, what is counted is what is there.
            assert history.size_bytes <= options["max_bytes"] and len(here) <= (options["max_turns"] or 1 << 60)
            assert (history.size_bytes, len(history)) == (sum(each.size_bytes for each in here), len(here))
            # Order; the newest; what has to stay; nothing lost, nothing twice.
            assert numbers(here) == sorted(set(numbers(here)))
            assert turn in own and pinned <= set(numbers(own))
            assert sorted(numbers(own) + numbers(gone)) == sorted(said)
            assert [(g.role, g.content) for g in gone] == [
                (said[g.number].role, said[g.number].content) for g in gone
            ]
            # No result without the turn that it answered.
            for each in own:
                if is_result(each) and each.number - 1 in said and said[each.number - 1].role == "assistant":
                    assert each.number - 1 in numbers(own)
