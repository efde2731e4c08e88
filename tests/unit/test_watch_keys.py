"""The keys of `governor watch`, as terminals send them."""

import os
import pty
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.watch_keys import Key, Keyboard, Modes, parse

PRESSED = [
    (b"q", [Key.QUIT], b""),
    (b" s", [Key.HOLD, Key.SORT], b""),
    (b"\r\n", [Key.OPEN, Key.OPEN], b""),
    (b"\x1b[A\x1b[B", [Key.UP, Key.DOWN], b""),
    (b"\x1bOA\x1bOD", [Key.UP, Key.BACK], b""),
    (b"\x1b[5~q", [Key.QUIT], b""),  # page up is no key of ours
    (b"\x1b[1;5Aq", [Key.QUIT], b""),
    (b"\x1bq", [], b""),  # Alt-Q
    (b"\x1b", [], b"\x1b"),
    (b"q\x1b[", [Key.QUIT], b"\x1b["),
    (b"\xc3\xa9x", [], b""),
    (b"\x1b[?62;22c", [], b""),  # what a terminal answers
]


@pytest.mark.parametrize(("data", "keys", "left"), PRESSED)
def test_what_bytes_mean(data, keys, left):
    assert parse(data) == (keys, left)


@given(st.lists(st.sampled_from([data for data, _, left in PRESSED if not left])), st.data())
def test_where_a_read_ends_does_not_matter(pressed, data):
    whole = b"".join(pressed)
    at = data.draw(st.integers(0, len(whole)))
    first, left = parse(whole[:at])
    assert first + parse(left + whole[at:])[0] == parse(whole)[0]


@given(st.binary())
def test_any_bytes_are_read(data):
    parse(data)


def test_an_escape_alone_goes_back():
    reader, writer = os.pipe()
    keyboard = Keyboard(reader)
    os.write(writer, b"\x1b")
    assert keyboard.read() == []
    assert keyboard.awaits
    assert keyboard.settle() == [Key.BACK]
    assert not keyboard.awaits
    os.close(writer)
    with pytest.raises(EOFError):
        keyboard.read()
    os.close(reader)


def test_the_terminal_is_as_it_was():
    ours, theirs = pty.openpty()
    before = termios.tcgetattr(theirs)
    modes = Modes(theirs)
    modes.enter()
    assert not termios.tcgetattr(theirs)[3] & (termios.ICANON | termios.ECHO)
    assert termios.tcgetattr(theirs)[3] & termios.ISIG  # Ctrl-C and Ctrl-Z stay
    modes.leave()
    assert termios.tcgetattr(theirs) == before
    os.close(ours)
    os.close(theirs)
