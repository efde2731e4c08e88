"""Where each key of a TOML text stands: tomllib tells the values and not the lines.

Only for text that tomllib has accepted; so a token is known by how it begins, and nothing is checked again.
"""

from __future__ import annotations

import re
import tomllib
from bisect import bisect_left
from collections.abc import Callable

Path = tuple[str, ...]

_SPACE = re.compile(r"(?:[ \t\r\n]+|#[^\n]*)*")
_BLANK = re.compile(r"[ \t]*")
_KEY = re.compile(r"""[A-Za-z0-9_-]+|"(?:\\.|[^"\\])*"|'[^']*'""")
_SCALAR = re.compile(
    r'"{3}(?:\\.|[^\\])*?"{3,5}'  # up to two quotes may stand before the three that close
    r"|'{3}.*?'{3,5}"
    r'|"(?:\\.|[^"\\])*"'
    r"|'[^']*'"
    r"|[^,\]}#\n]+",
    re.DOTALL,
)


def key_lines(text: str, depth: int) -> dict[Path, int]:
    """Line, from 1, of the first mention of every table and key down to `depth`, inline tables included."""
    newlines = [match.start() for match in re.finditer("\n", text)]
    lines: dict[Path, int] = {}

    def note(path: Path, at: int) -> None:
        for length in range(1, min(len(path), depth) + 1):
            lines.setdefault(path[:length], bisect_left(newlines, at) + 1)

    table: Path = ()
    at = _after(_SPACE, text, 0)
    while at < len(text):
        if text[at] == "[":
            brackets = 2 if text.startswith("[[", at) else 1
            table, end = _key(text, at + brackets)
            note(table, at)
            at = end + brackets
        else:
            path, end = _key(text, at)
            note(table + path, at)
            at = _value(text, end + 1, table + path, note)
        at = _after(_SPACE, text, at)
    return lines


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    match = pattern.match(text, at)
    return match.end() if match else at


def _key(text: str, at: int) -> tuple[Path, int]:
    """A key, dotted or not, and the position of what stands after it (`=` or `]`)."""
    parts: list[str] = []
    while True:
        at = _after(_BLANK, text, at)
        end = _after(_KEY, text, at)
        raw = text[at:end]
        parts.append(tomllib.loads(f"key = {raw}")["key"] if raw[:1] in ('"', "'") else raw)
        at = _after(_BLANK, text, end)
        if not text.startswith(".", at):
            return tuple(parts), at
        at += 1


def _value(text: str, at: int, path: Path, note: Callable[[Path, int], None]) -> int:
    """Position after a value; arrays and tables may nest deeper than Python recurses."""
    open_brackets: list[tuple[str, Path]] = []
    key_expected = False
    while True:
        at = _after(_SPACE, text, at)
        char = text[at : at + 1]
        if char in ("]", "}"):
            open_brackets.pop()
            key_expected = False
            at += 1
        elif key_expected:
            inner, end = _key(text, at)
            path = open_brackets[-1][1] + inner
            note(path, at)
            key_expected = False
            at = end + 1
            continue
        elif char in ("[", "{"):
            open_brackets.append((char, path))
            key_expected = char == "{"
            at += 1
        elif char == ",":
            key_expected = open_brackets[-1][0] == "{"
            at += 1
        else:
            at = _after(_SCALAR, text, at)
        if not open_brackets:
            return at
