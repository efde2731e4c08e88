"""Which words of its command line an agent is given again when its session is resumed: options, never a prompt.

A profile names the options as the agent's own --help does: "--verbose" is a flag, "--model <name>" takes a value,
"--add-dir <path...>" takes values up to the next option, "-d, --debug [filter]" may take one, and names beside each
other mean the same. Words are read as commander and its like read them. Where a value may be left out, the next word
may as well be a prompt: it is kept only where it is attached ("--debug=api"). Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from enum import Enum

PLACE = "{options}"  # the word of an argv that stands for the words that are kept
_NAME = r"-[^\s,=<>\[\]]+"
_OPTION = re.compile(rf"({_NAME}(?:, ?{_NAME})*)(?: (<[^<>\[\]]+>|\[[^<>\[\]]+\]))?")


class Takes(Enum):
    """How many values an option has."""

    NOTHING = "nothing"
    MAYBE = "maybe"  # [value]
    ONE = "one"  # <value>
    MANY = "many"  # <value...>


def parse(options: Iterable[str]) -> dict[str, Takes]:
    """What each name takes; raises ValueError with the option that is none, or whose name an earlier one has."""
    found: dict[str, Takes] = {}
    for option in options:
        match = _OPTION.fullmatch(option)
        names = re.split(", ?", match[1]) if match else []
        if not match or set(names) & ({"-", "--"} | found.keys()):
            raise ValueError(option)
        value = match[2] or ""
        takes = Takes.MAYBE if value.startswith("[") else Takes.MANY if value.endswith("...>") else Takes.ONE
        found |= dict.fromkeys(names, takes if value else Takes.NOTHING)
    return found


def places(options: Iterable[str], program: str, command: Sequence[str]) -> list[int]:
    """Where in an agent's command line the words stand that are kept; none before the word that names `program`."""
    known = parse(options)
    kept: list[int] = []
    at = next((at for at, word in enumerate(command) if _last(word) == _last(program)), len(command)) + 1
    while at < len(command) and command[at] != "--":
        word, end = command[at], at + 1
        name = word.partition("=")[0] if word.startswith("--") else word[:2]
        takes = known.get(name)
        if takes in (Takes.ONE, Takes.MANY) and word == name:
            end += 1
            while takes is Takes.MANY and end < len(command) and not _is_option(command[end]):
                end += 1
        if takes and end <= len(command) and (word == name or takes is not Takes.NOTHING):
            kept += range(at, end)
        at = end
    return kept


def _is_option(word: str) -> bool:
    return word.startswith("-") and word != "-"


def _last(path: str) -> str:
    return path.rpartition("/")[2]
