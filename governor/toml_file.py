"""Reads a TOML file whose keys are the fields of dataclasses: bounded, every fault with its line.

What a policy or a profile may say is theirs to know (`policy_file`, `profile_file`).
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governor.policy_keys import Key, Unexpected, convert, hint, shown
from governor.toml_lines import key_lines

FILE_LIMIT_BYTES = 64 << 10
# tomllib keeps every beginning of a dotted key: one of 300,000 parts took all of a machine's memory.
DOTS_LIMIT = 100
_HINT_LIMIT = 100
_AT_LINE = re.compile(r" \((?:at line (\d+), column \d+|at end of document)\)$")

Lines = dict[tuple[str, ...], int]


@dataclass(frozen=True, slots=True)
class Fault:
    """`line` from 1, 0 for the file as a whole; `key` "" where the fault is not one key's."""

    line: int
    key: str
    value: str
    expected: str

    def text(self, where: str) -> str:
        """One line for people; `where` and a path in `value` are not escaped."""
        place = f"{where}:{self.line}" if self.line else where
        found = f"{self.key} = {self.value}:" if self.key else f"found {self.value},"
        return f"{place}: {found} expected {self.expected}"


class FileError(Exception):
    """A file that cannot be used; `faults` in the file's order."""

    def __init__(self, where: str, faults: list[Fault]) -> None:
        super().__init__("; ".join(fault.text(where) for fault in faults))
        self.where = where
        self.faults = faults


def read_file(path: str) -> bytes:
    """At most one byte over the limit; never waits for a FIFO's writer. Raises FileError."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise FileError(path, [Fault(0, "", "a directory or a device", "a regular file")])
            return os.read(fd, FILE_LIMIT_BYTES + 1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FileError(path, [Fault(0, "", reason, "a file that can be read")]) from None


def read_named(name_or_path: str, shipped: dict[str, Path], what: str) -> bytes:
    """The bytes of what the package ships by that name, else of the file; `what` it is, as "preset".

    Raises FileError.
    """
    if name_or_path not in shipped and "/" not in name_or_path and not Path(name_or_path).exists():
        expected = f"a file, or a {what}: {', '.join(shipped)}{hint(name_or_path, list(shipped))}"
        raise FileError(name_or_path, [Fault(0, "", f"no such file or {what}", expected)])
    return read_file(str(shipped.get(name_or_path, name_or_path)))


def read_tree(data: bytes, where: str) -> tuple[dict[str, Any], Lines]:
    """What tomllib reads, and the line of every table and key; raises FileError."""

    def fault(line: int, value: str, expected: str) -> FileError:
        return FileError(where, [Fault(line, "", value, expected)])

    if len(data) > FILE_LIMIT_BYTES:
        raise fault(0, "a larger file", f"at most {FILE_LIMIT_BYTES} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise fault(line, f"the byte 0x{data[error.start]:02x}", f"UTF-8 ({error.reason})") from None
    for number, line_text in enumerate(text.split("\n"), 1):
        if line_text.count(".") > DOTS_LIMIT:
            raise fault(number, shown(line_text), f"at most {DOTS_LIMIT} dots on a line")
    try:
        return tomllib.loads(text), key_lines(text, 2)
    except RecursionError:
        raise fault(0, "arrays or tables within each other without end", "two levels at most") from None
    except ValueError as error:  # TOMLDecodeError is one; so is an integer of more than 4300 digits
        at = _AT_LINE.search(str(error))
        all_lines = text.rstrip("\n").split("\n")
        line = int(at[1]) if at and at[1] else len(all_lines) if at else 0
        found = shown(all_lines[line - 1]) if line else "a value"
        raise fault(line, found, f"TOML: {_AT_LINE.sub('', str(error))}") from None


def line_of(lines: Lines, path: str) -> int:
    """Where a key (as "compact.engage") is first mentioned; 0 where it is not."""
    return lines.get(tuple(path.split(".", 1)), 0)


def given_values(
    tree: dict[str, Any],
    lines: Lines,
    keys: dict[str, Key],
    others: tuple[str, ...],
    what: str,
    faults: list[Fault],
) -> dict[str, Any]:
    """The values that a file gives, in the fields' units, by the path of their key; what is wrong goes to `faults`.

    `others`: keys at the top that the caller looks after; `what`: what the file is, as "a policy".
    """
    tables = tuple(dict.fromkeys(key.table for key in keys.values() if key.table))
    given: dict[str, Any] = {}

    def take(table: str, name: str, line: int, value: Any, expected: str, known: list[str]) -> None:
        path = f"{table}.{name}" if table else name
        if path not in keys or keys[path].table != table:  # "compact.engage" in quotes is one odd key
            near = hint(name, known) if len(faults) < _HINT_LIMIT else ""
            faults.append(Fault(line, path[:100], shown(value), expected + near))
            return
        try:
            given[path] = convert(keys[path], value)
        except Unexpected as unexpected:
            faults.append(Fault(line, path, shown(value), str(unexpected)))

    top = [*others, *tables, *(path for path, key in keys.items() if not key.table)]
    for name, value in tree.items():
        line = lines.get((name,), 0)
        if name in tables and isinstance(value, dict):
            known = [key.name for key in keys.values() if key.table == name]
            for inner, inner_value in value.items():
                take(name, inner, lines.get((name, inner), 0), inner_value, f"a key of [{name}]", known)
        elif name in tables:
            faults.append(Fault(line, name, shown(value), f"a table, once: [{name}]"))
        elif name not in others:
            take("", name, line, value, f"a table or a key that {what} has", top)
    return given
