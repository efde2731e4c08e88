"""JSON item by item: what comes out, what is refused, where it stops, and how little memory it takes."""

import asyncio
import io
import json
import os
import subprocess
import sys
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent import extras, spool
from governor.agent.payloads import PayloadError, batches, batches_async, items, items_async
from governor.agent.stopping import StoppedByPressure

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63) + 1, 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.fixture(autouse=True)
def own_spool(tmp_path, monkeypatch):
    """Nothing of a test is left where others look."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f"governor-agent-{os.geteuid()}"


def encoded(value, *, ascii_only=False):
    return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")


async def stream(data, sizes):
    begin = 0
    while begin < len(data):
        size = next(sizes)
        yield data[begin : begin + size]
        begin += size
        await asyncio.sleep(0)


def cycle(sizes):
    while True:
        yield from sizes


async def listed(source):
    return [item async for item in source]


@given(
    array=st.lists(values, max_size=8),
    sizes=st.lists(st.integers(1, 9), min_size=1),
    ascii_only=st.booleans(),
    spooled=st.booleans(),
)
def test_borders_anywhere(array, sizes, ascii_only, spooled):
    """Inside a character, an escape, a number: what comes out is what went in."""
    data = encoded(array, ascii_only=ascii_only)
    assert asyncio.run(listed(items_async(stream(data, cycle(sizes)), spool=spooled))) == array


@pytest.mark.parametrize("kind", ["path", "text path", "bytes", "file"])
def test_from_wherever(tmp_path, kind):
    path = tmp_path / "export.json"
    path.write_bytes(b"\xef\xbb\xbf" + encoded({"meta": [0], "data": {"rows": [{"a": 1.5}, "ü", None]}}))
    with path.open("rb") as file:
        source = {"path": path, "text path": str(path), "bytes": path.read_bytes(), "file": file}[kind]
        assert list(items(source, "data.rows.item")) == [{"a": 1.5}, "ü", None]
        file.seek(0)
        assert asyncio.run(listed(items_async(source, "data.rows.item"))) == [{"a": 1.5}, "ü", None]


def test_a_chunk_of_the_byte_order_mark_alone():
    assert asyncio.run(listed(items_async(stream(b"\xef\xbb\xbf[1]", iter([3, 3])), spool=False))) == [1]


def test_documents_one_after_the_other():
    assert list(items(b'{"a": 1}\n{"a": 2}\n\n[3]\n', "", documents=True)) == [{"a": 1}, {"a": 2}, [3]]


def test_batches():
    data = encoded(list(range(7)))
    assert list(batches(data, 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert asyncio.run(listed(batches_async(data, 3))) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(batches(b"[]", 3)) == []
    with pytest.raises(ValueError, match="batch size of 0"):
        list(batches(data, 0))


BAD = {
    "cut off": (b'[1, 2, {"a"', [1, 2], "in the 11 bytes until here: it ends too early"),
    "nothing at all": (b"", [], "it ends too early"),
    "no JSON": (b"[1, <html>", [1], "lexical error"),
    "no UTF-8": (b'[1, "\xff"]', [1], "invalid bytes in UTF8"),
    "rubbish after it": (b"[1] x", [1], "trailing garbage"),
    "an integer without end": (b"[1, " + b"1" * 6000 + b"]", [1], "overflow"),
    "brackets without end": (b"[" * 300_000, [], "found 65,536 levels and"),
    "keys without end": (b'{"' + b'{"'.join([b"k" * 9000 + b'": '] * 400), [], "levels and a key of 9,000 bytes"),
    "a long key that begins as an item ends": (
        b'["item", {"' + b"k" * 60_000 + b'": ' + b" " * 70_000 + b"[" * 2000 + b" " * 70_000,
        ["item"],
        r"found \d,\d+ levels and a key of 60,000 bytes",
    ),
    "a little, as deep as that is much": (
        b'[{"k":' + b'{"k":' * 2000 + b"1",
        [],
        r"found 2,\d+ levels and a key of 1 bytes",
    ),
    "long keys, in many chunks": (
        b"[" + b'{"'.join([b"", *[b"k" * 1_000_000 + b'": '] * 40]) + b"1" + b"}" * 40 + b"]",
        [],
        r"found \d levels and a key of 1,000,000 bytes",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_what_is_refused(bad):
    """After the last item that is whole, without what it claims to be being built."""
    data, before, said = BAD[bad]
    found = []
    tracemalloc.start()
    try:
        with pytest.raises(PayloadError, match=said):
            for item in items(data, item_limit_bytes=4 << 20):
                found.append(item)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    assert found == before


def test_brackets_in_texts_are_none():
    array = ['{[\\"' * 20_000, {"a\\": "]" * 70_000}, '\\"[' * 30_000] * 3
    assert list(items(encoded(array))) == array


@pytest.mark.parametrize("sizes", [[1 << 16], [1], [7, 1]])
def test_a_long_text_is_no_path(sizes):
    """It is a value, wherever chunks end: however large, it may be as deep as others."""
    long = "x" * (3 << 20 if sizes[0] > 7 else 20_000)
    array = [[[[{"a": {"b": [long, {"c": long}]}}]]]] * 2
    options = {"item_limit_bytes": 64 << 20 if sizes[0] > 7 else 50_000, "spool": False}
    data = json.dumps(array, separators=(" , ", " : ")).encode()
    assert asyncio.run(listed(items_async(stream(data, cycle(sizes)), **options))) == array


def test_an_item_too_large():
    data = encoded(["small", "x" * 300_000])
    with pytest.raises(PayloadError, match=r"found no item in 3\d\d,\d+ bytes.*is the path right"):
        list(items(data + b" " * 200_000, "nothing.here", item_limit_bytes=300_000))
    assert len(list(items(data, item_limit_bytes=400_000))) == 2


@pytest.mark.parametrize("ratios", [[0.1, 0.1, 0.9], [0.85]])
def test_stops_at_the_pressure_asked(ratios):
    data = encoded(["x" * 1000] * 1000)
    found, asked = [], iter(ratios)
    with pytest.raises(StoppedByPressure) as stopped:
        for item in items(data, pressure=lambda: next(asked)):
            found.append(item)
    assert stopped.value.done_bytes == (len(ratios) - 1) * 65_536
    assert len(found) == stopped.value.done_bytes // 1004
    assert stopped.value.ratio == ratios[-1]


def test_a_stream_stops_while_it_is_spooled(own_spool):
    class Pressure:
        ratio = 0.7

    async def endless():
        for _ in range(100):
            yield b"[" + b"1," * 1000
        Pressure.ratio = 0.95
        yield b"1"
        raise AssertionError("it goes on")

    with pytest.raises(StoppedByPressure):
        asyncio.run(listed(items_async(endless(), pressure=Pressure(), stop_at=0.9)))
    assert list(own_spool.iterdir()) == []


def test_the_spool_is_bounded_and_gone(own_spool):
    async def endless():
        while True:
            yield b" " * 60_000

    with spool.Spool(limit_bytes=1 << 20) as own:
        with pytest.raises(spool.SpoolError, match="1,048,576 bytes, the spool's limit"):
            asyncio.run(listed(items_async(endless(), spool=own)))
        assert own.size_bytes > 1_000_000
        assert list(own_spool.iterdir()) == [own.path]
    assert list(own_spool.iterdir()) == []


def test_who_stops_early_leaves_no_file(own_spool):
    async def first():
        async for item in items_async(stream(encoded(list(range(1000))), cycle([100]))):
            assert len(list(own_spool.iterdir())) == 1
            return item
        return None

    assert asyncio.run(first()) == 0
    assert list(own_spool.iterdir()) == []


def peak_bytes(size):
    class Rows(io.RawIOBase):
        """An array as large as asked for, never there as a whole."""

        def __init__(self):
            self.left, self.begun = size, False

        def read(self, _size=-1):
            if self.left <= 0:
                return b""
            self.left -= 66_000
            begin, self.begun = b"," if self.begun else b"[", True
            return begin + b",".join([b'{"text": "' + b"x" * 600 + b'"}'] * 100) + (b"]" if self.left <= 0 else b"")

    tracemalloc.start()
    try:
        count = sum(1 for _ in items(Rows()))
        return count, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_does_not_depend_on_the_size():
    few, little = peak_bytes(2 << 20)
    many, much = peak_bytes(20 << 20)
    assert many > 9 * few
    assert much < 1.2 * little < 2 << 20


def test_without_ijson():
    code = "import sys; sys.modules['ijson'] = None\nfrom governor.agent.payloads import items\nlist(items(b'[]'))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.endswith(
        "found no ijson, which this needs: pip install '.[json]' in a checkout of governor\n"
    )
    with pytest.raises(extras.MissingExtra, match=r"pip install '\.\[arrays\]'"):
        extras.load("no_such_package", "arrays")


def test_nothing_is_imported_before_it_is_used():
    code = """
import sys
from governor.agent import accumulator, deep_size, history, history_spill, payloads, profiling, spool, streaming
from governor.agent import leak, partial, stopping, stream_text
own = {name for name in sys.modules if name.startswith("governor") and not name.startswith("governor.agent")}
assert own == {"governor"}, own
heavy = {"httpx", "ijson", "numpy", "h11", "anyio"} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
