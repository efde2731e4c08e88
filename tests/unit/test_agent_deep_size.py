"""deep_size beside tracemalloc, for the shapes that an agent's data has."""

import array
import collections
import contextlib
import dataclasses
import datetime
import decimal
import enum
import gc
import json
import random
import sqlite3
import sys
import tracemalloc

import numpy as np
import pytest

from governor.agent.deep_size import deep_size

COUNT = 2000
TEXT = "the quick brown fox jumps over the lazy dog "


class Plain:
    def __init__(self, i):
        self.number, self.name, self.parts = i + 1000, f"name {i}", [float(i)]


class Many:
    def __init__(self, i):
        for letter in "abcdefghijkl":
            setattr(self, letter, f"{letter}{i}")


class Slots:
    __slots__ = ("left", "right")

    def __init__(self, i):
        self.left, self.right = f"left {i}", i + 1000


class Asked(Plain):
    """Somebody has looked at its __dict__."""

    def __init__(self, i):
        super().__init__(i)
        vars(self)["later"] = f"{i}"


@dataclasses.dataclass(frozen=True, slots=True)
class Record:
    role: str
    content: str


class Kind(enum.Enum):
    USER = "user"


class Text(str):
    pass


Pair = collections.namedtuple("Pair", "left right")


def a_turn(i):
    call = {"type": "tool_use", "id": f"toolu_{i:08}", "input": {"path": f"/src/{i}.py", "lines": [i, i * 1000]}}
    return {"role": "assistant", "content": [{"type": "text", "text": f"{i} {TEXT * (i % 40)}"}, call]}


def a_tree(depth):
    return {str(random.random()): a_tree(depth - 1) for _ in range(4)} if depth else [random.random()]


def a_ring(i):
    ring = [f"{i}"]
    ring.append({"back": ring})
    return ring


def objects(count):
    made = np.empty(count, dtype=object)
    for i in range(count):
        made[i] = f"object {i}"
    return made


SHAPES = {
    "ASCII text": lambda: [f"{i} {TEXT}" for i in range(COUNT)],
    "Latin-1 text": lambda: [f"{i} größer" * 5 for i in range(COUNT)],
    "two-byte text": lambda: [f"{i} тридцать" * 5 for i in range(COUNT)],
    "four-byte text": lambda: [f"{i} 🙂" * 5 for i in range(COUNT)],
    "one large text": lambda: TEXT * 20_000,
    "a derived text": lambda: [Text(f"{i} {TEXT}") for i in range(COUNT)],
    "bytes": lambda: [b"%d" % i * 20 for i in range(COUNT)],
    "bytearrays, grown": lambda: [bytearray(b"x" * i) for i in range(COUNT)],
    "small integers": lambda: [i % 200 for i in range(100_000)],
    "integers": lambda: [i + 1000 for i in range(COUNT)],
    "large integers": lambda: [7 ** (i + 50) for i in range(COUNT // 4)],
    "floats": lambda: [i * 1.5 for i in range(COUNT)],
    "a tuple of tuples": lambda: tuple((i + 1000, str(i)) for i in range(COUNT)),
    "named tuples": lambda: [Pair(f"{i}", i + 1000) for i in range(COUNT)],
    "dicts": lambda: [{"role": "user", "content": f"{i} {TEXT}"} for i in range(COUNT)],
    "one large dict": lambda: {f"key {i}": f"value {i}" for i in range(COUNT)},
    "a nested tree": lambda: a_tree(6),
    "turns": lambda: [a_turn(i) for i in range(COUNT)],
    "parsed JSON": lambda: json.loads(json.dumps([a_turn(i) for i in range(COUNT)])),
    "sets": lambda: [{f"{i}", f"{i + 1}"} for i in range(COUNT)],
    "a frozen set": lambda: frozenset(f"{i}" for i in range(COUNT)),
    "a deque": lambda: collections.deque(f"{i} {TEXT}" for i in range(COUNT)),
    "a bounded deque": lambda: collections.deque((f"{i}" for i in range(COUNT)), maxlen=500),
    "ordered and default dicts": lambda: [
        collections.OrderedDict(a=str(i), b=str(i + 1))
        if i % 2
        else collections.defaultdict(list, {str(i): [str(i)]})
        for i in range(COUNT)
    ],
    "a counter": lambda: collections.Counter(f"{i % 700}" for i in range(COUNT)),
    "instances": lambda: [Plain(i) for i in range(COUNT)],
    "instances of many attributes": lambda: [Many(i) for i in range(COUNT)],
    "instances whose dict was asked for": lambda: [Asked(i) for i in range(COUNT)],
    "slots": lambda: [Slots(i) for i in range(COUNT)],
    "data classes": lambda: [Record("user", f"{i} {TEXT}") for i in range(COUNT)],
    "members of an enumeration": lambda: [(Kind.USER, f"{i}") for i in range(COUNT)],
    "dates and decimals": lambda: [
        (datetime.datetime(2026, 1, 1) + datetime.timedelta(i), decimal.Decimal(i)) for i in range(COUNT)
    ],
    "arrays": lambda: [array.array("f", range(i % 200)) for i in range(COUNT)],
    "views of a buffer": lambda: [memoryview(b"x" * 5000)[i : i + 10] for i in range(COUNT // 4)],
    "NumPy's arrays": lambda: [np.full(384, i, dtype="float32") for i in range(COUNT // 4)],
    "a view of an array": lambda: np.arange(100_000, dtype="float32")[10:20],
    "an array of objects": lambda: objects(COUNT),
    "one text, referred to a thousand times": lambda: [[TEXT * 1000] * 1000 for _ in range(3)],
    "rings": lambda: [a_ring(i) for i in range(COUNT)],
    "deeper than the stack": lambda: deep(COUNT * 5),
}


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("shape", SHAPES)
def test_within_five_percent_of_tracemalloc(shape):
    if shape == "instances whose dict was asked for" and sys.version_info >= (3, 13):
        pytest.skip("there the interpreter does not tell of that dict")
    SHAPES[shape]()  # what is made once: types' caches, interned names
    gc.collect()
    tracemalloc.start()
    try:
        before_bytes = tracemalloc.get_traced_memory()[0]
        value = SHAPES[shape]()
        gc.collect()  # a test of rings leaves none behind
        traced_bytes = tracemalloc.get_traced_memory()[0] - before_bytes
    finally:
        tracemalloc.stop()
    assert deep_size(value) == pytest.approx(traced_bytes, rel=0.05)


def test_measuring_changes_nothing():
    value = Plain(1)
    sizes = {deep_size(value) for _ in range(3)}
    assert len(sizes) == 1
    assert dict not in [type(each) for each in gc.get_referents(value)]


def test_what_is_shared_is_not_counted():
    text = TEXT * 100
    assert deep_size([text], shared=[text]) == deep_size([None])
    assert deep_size([text, text]) == deep_size([text, None])


def test_takes_little_itself():
    """Where memory is short is where it is asked."""
    value = [f"{i} {TEXT}" for i in range(50_000)]
    size_bytes = deep_size(value)
    tracemalloc.start()
    try:
        deep_size(value)
        assert tracemalloc.get_traced_memory()[1] < size_bytes / 5
    finally:
        tracemalloc.stop()


def test_the_utf8_that_a_text_keeps_is_counted_once_it_is_there():
    text = "привет " * 1000
    before = deep_size([text])
    with contextlib.closing(sqlite3.connect(":memory:")) as database:
        database.execute("select ?", (text,)).fetchall()
    assert deep_size([text]) - before == len(text.encode()) + 1
