"""Rows on disk: what was added is there, also for NumPy alone, also after SIGKILL, and memory is bounded."""

import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent.accumulator import Accumulator, AccumulatorError
from tests.fakes import full_disk


@given(
    added=st.lists(st.integers(0, 40), max_size=12),
    reopened=st.sets(st.integers(0, 11)),
    buffer_bytes=st.sampled_from([1, 64, 1000]),
    begin=st.none() | st.integers(-200, 200),
    end=st.none() | st.integers(-200, 200),
    step=st.sampled_from([None, 1, 2, 7, -1, -3]),
)
def test_as_an_array_in_memory(tmp_path_factory, added, reopened, buffer_bytes, begin, end, step):
    path = tmp_path_factory.mktemp("rows") / "rows.npy"
    expected = np.arange(sum(added) * 3, dtype="float32").reshape(-1, 3)
    rows = Accumulator(path, 3, buffer_bytes=buffer_bytes)
    done = 0
    for number, count in enumerate(added):
        block = expected[done : done + count]
        rows.append(block[0] if count == 1 else block)
        done += count
        assert len(rows) == done
        if number in reopened:
            rows.close()
            rows = Accumulator(path, 3, buffer_bytes=buffer_bytes)
    key = slice(begin, end, step)
    assert np.array_equal(rows[key], expected[key])
    assert [list(row) for row in rows] == expected.tolist()
    assert sum(len(block) for block in rows.blocks(7)) == done
    if done:
        assert np.array_equal(rows[-1], expected[-1])
    with pytest.raises(IndexError):
        rows[done]
    rows.close()
    assert np.array_equal(np.load(path, mmap_mode="r"), expected)


def test_half_a_row_is_cut_off(tmp_path):
    with Accumulator(tmp_path / "rows.npy", 4, "int16") as rows:
        rows.append([[1, 2, 3, 4], [5, 6, 7, 8]])
    with (tmp_path / "rows.npy").open("ab") as file:
        file.write(b"xxxxx")
    with Accumulator(tmp_path / "rows.npy", 4, "int16") as rows:
        rows.append([9, 9, 9, 9])
        assert rows[:].tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 9, 9, 9]]


@pytest.mark.parametrize("cut", [0, 1, 5, 9, 60, 127])
def test_killed_as_it_made_the_file(tmp_path, cut):
    Accumulator(tmp_path / "rows.npy", 4).close()
    (tmp_path / "rows.npy").write_bytes((tmp_path / "rows.npy").read_bytes()[:cut])
    with Accumulator(tmp_path / "rows.npy", 4) as rows:
        rows.append([1, 2, 3, 4])
    assert np.load(tmp_path / "rows.npy").tolist() == [[1, 2, 3, 4]]


def save(value):
    return lambda path: np.save(path.open("wb"), value)


OTHERS = {
    "notes": (lambda path: path.write_text("notes " * 50), r"is no .npy file"),
    "short notes": (lambda path: path.write_text("notes"), r"is no .npy file"),
    "another width": (
        save(np.zeros((2, 5), "float32")),
        r"found shape \(2, 5\) of float32, expected rows of 4 float32",
    ),
    "another type": (save(np.zeros((2, 4), "float64")), "of float64, expected"),
    "Fortran's order": (save(np.asfortranarray(np.ones((2, 4), "float32"))), "expected rows"),
    "one axis": (save(np.zeros(4, "float32")), r"found shape \(4,\)"),
    "objects": (save(np.array([["a"] * 4], dtype=object)), "of object, expected"),
    "a directory": (lambda path: path.mkdir(), "directory"),
    "a link": (lambda path: path.symlink_to("/etc/passwd"), "symbolic links"),
    "a fifo": (os.mkfifo, "no regular file"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_another_file_stays_as_it_is(tmp_path, other):
    make, said = OTHERS[other]
    path = tmp_path / "rows.npy"
    make(path)
    before = path.read_bytes() if path.is_file() else b""
    with pytest.raises(OSError, match=said):
        Accumulator(path, 4)
    assert (path.read_bytes() if path.is_file() else b"") == before


@pytest.mark.parametrize("rows", [[1, 2], [[1, 2, 3, 4, 5]], 7, [[[1, 2, 3, 4]]]])
def test_rows_of_another_shape(tmp_path, rows):
    with Accumulator(tmp_path / "rows.npy", 4) as one, pytest.raises(ValueError, match="found shape"):
        one.append(rows)


@pytest.mark.parametrize("options", [(0, "float32"), (3, "O"), (3, "S0")])
def test_no_numbers(tmp_path, options):
    with pytest.raises(ValueError, match="expected 1 or more, and plain numbers"):
        Accumulator(tmp_path / "rows.npy", *options)


def test_rows_that_are_kept_take_no_descriptors(tmp_path):
    with Accumulator(tmp_path / "rows.npy", 4) as rows:
        rows.append([[i] * 4 for i in range(100)])
        before = len(os.listdir("/proc/self/fd"))
        kept = [rows[i] for i in range(100)]
        assert len(os.listdir("/proc/self/fd")) == before
    assert np.array_equal(kept, [[i] * 4 for i in range(100)])
    assert not kept[0].flags.writeable


ENDS = {
    "at the end of the process": "",
    "when nobody holds it": "del rows; assert len(Accumulator(sys.argv[1], 4)) == 1000",
    "not by a fork": "assert os.fork() or sys.exit(0); os.wait(); assert os.path.getsize(sys.argv[1]) == 128",
}


@pytest.mark.parametrize("end", ENDS)
def test_what_nobody_closes_is_written(tmp_path, end):
    code = "import os, sys; from governor.agent import Accumulator; rows = Accumulator(sys.argv[1], 4); "
    code += "rows.append([[1] * 4] * 1000); " + ENDS[end]
    subprocess.run([sys.executable, "-c", code, tmp_path / "rows.npy"], check=True)
    assert np.load(tmp_path / "rows.npy").shape == (1000, 4)


def test_one_writer(tmp_path):
    with Accumulator(tmp_path / "rows.npy", 4), pytest.raises(AccumulatorError, match="in use"):
        Accumulator(tmp_path / "rows.npy", 4)


@pytest.mark.parametrize("room_bytes", [0, 50, 900])
def test_a_full_disk_adds_nothing(tmp_path, monkeypatch, room_bytes):
    rows = Accumulator(tmp_path / "rows.npy", 4, buffer_bytes=160)
    rows.append(np.ones((15, 4)))
    full_disk.fill(monkeypatch, "pwrite", room_bytes)
    with pytest.raises(OSError, match="No space left"):
        rows.append(np.full((100, 4), 2))
    monkeypatch.undo()
    rows.append(np.full((1, 4), 3))
    assert rows[:].tolist() == [[1] * 4] * 15 + [[3] * 4]
    rows.close()
    assert np.load(tmp_path / "rows.npy").shape == (16, 4)


WRITER = """
import sys
from governor.agent.accumulator import Accumulator
rows = Accumulator(sys.argv[1], 64, buffer_bytes=4096)
while True:
    rows.append([[len(rows)] * 64] * 3)
    rows.flush()
    print(len(rows), flush=True)
"""


def test_killed_while_it_writes(tmp_path):
    path = tmp_path / "rows.npy"
    for _ in range(3):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
        said = [writer.stdout.readline() for _ in range(50)]
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with Accumulator(path, 64) as rows:
            assert len(rows) >= int(said[-1])  # flushed
            first = [int(row[0]) for row in rows]
            assert all((row == row[0]).all() for row in rows.blocks(1))
        assert first == sorted(first)


def test_memory_does_not_depend_on_the_size(tmp_path):
    def taken(count):
        tracemalloc.start()
        try:
            with Accumulator(tmp_path / f"{count}.npy", 1024) as rows:
                for i in range(count):
                    rows.append(np.full((8, 1024), i, dtype="float32"))
                total = sum(float(block[:, 0].sum()) for block in rows.blocks())
                assert total == sum(8 * i for i in range(count))
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    taken(10)
    assert taken(2000) < 1.1 * taken(200) < 8 << 20
