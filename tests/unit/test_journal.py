"""The journal's lines: JSON that says what it was given, and steers no terminal that shows it."""

import orjson
from hypothesis import given
from hypothesis import strategies as st

from governor.journal import Journal, encode

STEERING = "\x1b[2J\x07\x7f\x9b31m\u202e\u2028\U000e0001\U0001f600ü"


def test_what_could_steer_a_terminal_is_escaped_and_nothing_else_is():
    data = encode({"pod": STEERING})
    assert data.decode().isprintable() and "\U0001f600ü" in data.decode()
    assert orjson.loads(data) == {"pod": STEERING}


@given(st.recursive(st.text() | st.integers(-9, 9), lambda inner: st.dictionaries(st.text(), inner, max_size=3)))
def test_any_text_is_read_back_as_it_was(value):
    data = encode(value)
    assert data.decode().isprintable() and orjson.loads(data) == value


def test_what_comes_after_a_line_that_a_kill_cut_off_begins_one_of_its_own(tmp_path):
    path = tmp_path / "j.ndjson"
    path.write_bytes(b'{"kind":"step","ev')
    for kind in ("begin", "step"):
        journal = Journal(path, "node")
        journal.write(kind)
        journal.close()
    torn, *lines = path.read_bytes().splitlines()
    assert torn == b'{"kind":"step","ev'
    assert [orjson.loads(line)["kind"] for line in lines] == ["begin", "step"]


def test_a_line_of_the_file_is_one_line(tmp_path):
    journal = Journal(tmp_path / "j.ndjson", "node")
    journal.write("governed", text=STEERING, container={"name": STEERING})
    journal.close()
    [line, rest] = (tmp_path / "j.ndjson").read_text().split("\n")
    assert line.isprintable() and not rest
    assert orjson.loads(line)["container"] == {"name": STEERING}
