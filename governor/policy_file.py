"""Reads a policy from TOML: a preset of the package or a file; every fault at once, with its line.

What keys there are and how their values are written is in `policy_keys`; here is what a file may say, and the rules
from one key to another.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governor.policy import Policy
from governor.policy_keys import KEYS, NAME, TABLES, Unexpected, build, convert, flatten, hint, shown, written
from governor.toml_lines import key_lines

FILE_LIMIT_BYTES = 64 << 10
# tomllib keeps every beginning of a dotted key: one of 300,000 parts took all of a machine's memory.
DOTS_LIMIT = 100
_HINT_LIMIT = 100
_PRESETS = Path(__file__).parent / "presets"
_AT_LINE = re.compile(r" \((?:at line (\d+), column \d+|at end of document)\)$")

# Left, comparison, right; each a key, or a value in the unit of the other side's key.
RULES: tuple[tuple[str | float, str, str | float], ...] = (
    # Levels. The kernel programs need theirs ascending, and something to fall below.
    *((0, "<", f"{tier}.release") for tier in ("compact", "clear", "terminate", "brake")),
    *((f"{tier}.release", "<", f"{tier}.engage") for tier in ("compact", "clear", "terminate", "brake")),
    ("compact.engage", "<", "clear.engage"),
    ("clear.engage", "<=", "terminate.engage"),
    ("clear.engage", "<=", "brake.engage"),
    ("terminate.engage", "<=", "terminate.last"),
    ("brake.engage", "<", "terminate.last"),
    ("terminate.last", "<", 1),
    ("brake.early", "<=", "brake.engage"),
    ("brake.early", "<=", "brake.probation_below"),
    ("brake.probation_below", "<=", "brake.engage"),
    ("brake.probation_below", "<=", "brake.unknown_rate"),
    ("brake.unknown_rate", "<=", "terminate.last"),
    ("signals.stalled_compact", "<=", "compact.engage"),  # it brings compact forward
    ("compact.engage", "<=", "compact.cooldown_waived"),  # waived from the start, there is no cooldown
    ("clear.engage", "<=", "clear.cooldown_waived"),
    (0, "<", "terminate.throttle"),
    # Times. Where compact may not be tried within clear_after_compact, clear could never follow it.
    ("compact.cooldown", "<", "clear_after_compact"),
    ("compact.settle", "<", "clear_after_compact"),
    *((0, "<", f"{tier}.{time}") for tier in ("compact", "clear") for time in ("deadline", "retry")),
    (0, "<", "brake.probation"),
    (0, "<", "signals.interval"),
    (0, "<", "signals.raised_interval"),
    ("signals.raised_interval", "<=", "signals.interval"),
    (0, "<", "signals.stale"),
    (0, "<", "archive.deadline"),
    # What is kept: the last archive at least.
    (0, "<", "archive.limit"),
    ("archive.limit", "<=", "archive.keep"),
    (0, "<", "archive.keep_count"),
)
_WORDS = {"<": ("less than", "more than"), "<=": ("at most", "at least")}


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


class PolicyError(Exception):
    """A policy that cannot be used; `faults` in the file's order."""

    def __init__(self, where: str, faults: list[Fault]) -> None:
        super().__init__("; ".join(fault.text(where) for fault in faults))
        self.where = where
        self.faults = faults


@dataclass(frozen=True, slots=True)
class Loaded:
    """A policy, and for every key ("compact.engage") where its value comes from: built-in, preset seed, FILE:12."""

    policy: Policy
    sources: dict[str, str]


def presets() -> dict[str, Path]:
    """The policies that come with the package, by name."""
    return {path.stem: path for path in sorted(_PRESETS.glob("*.toml"))}


def load(name_or_path: str) -> Loaded:
    """A preset by its name or a file by its path; raises PolicyError."""
    known = presets()
    if name_or_path in known:
        return _preset(name_or_path)
    names = ", ".join(known)
    if "/" not in name_or_path and not Path(name_or_path).exists():
        expected = f"a file, or a preset: {names}{hint(name_or_path, list(known))}"
        raise PolicyError(name_or_path, [Fault(0, "", "no such file or preset", expected)])
    return parse(_read(name_or_path), name_or_path)


def _preset(name: str) -> Loaded:
    return _parse(_read(str(presets()[name])), f"preset {name}", name, is_preset=True)


def _read(path: str) -> bytes:
    """At most one byte over the limit; never waits for a FIFO's writer."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise PolicyError(path, [Fault(0, "", "something else", "a regular file")])
            return os.read(fd, FILE_LIMIT_BYTES + 1)
        finally:
            os.close(fd)
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise PolicyError(path, [Fault(0, "", reason, "a file that can be read")]) from None


def parse(data: bytes, where: str) -> Loaded:
    """The policy that a file's bytes say; `where` is the file's name; raises PolicyError."""
    return _parse(data, where, Path(where).stem, is_preset=False)


def _parse(data: bytes, where: str, stem: str, is_preset: bool) -> Loaded:
    tree, lines = _tree(data, where)
    faults: list[Fault] = []
    base = _base(tree, stem if is_preset else "", lines, faults)
    given = _given(tree, lines, faults)
    policy, sources = (base.policy, dict(base.sources)) if base else (Policy(), {})
    values = flatten(policy) | given
    for path in given:
        sources[path] = where if is_preset else f"{where}:{_line(lines, path)}"
    if "name" not in tree and NAME.fullmatch(stem):
        values["name"], sources["name"] = stem, where
    faulty = {fault.key for fault in faults}
    # Without its base a file can only be held against itself.
    sure = {path: values[path] for path in (KEYS if base else given) if path not in faulty}
    faults += _against_rules(sure, sources, lines)
    if faults:
        raise PolicyError(where, sorted(faults, key=lambda fault: fault.line))
    return Loaded(build(values), sources)


def _tree(data: bytes, where: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    def fault(line: int, value: str, expected: str) -> PolicyError:
        return PolicyError(where, [Fault(line, "", value, expected)])

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


def _line(lines: dict[tuple[str, ...], int], path: str) -> int:
    return lines.get(tuple(path.split(".", 1)), 0)


def _base(
    tree: dict[str, Any], own_name: str, lines: dict[tuple[str, ...], int], faults: list[Fault]
) -> Loaded | None:
    """What the file extends; None, and a fault, where there is no such preset."""
    if own_name == "default":
        return Loaded(Policy(), dict.fromkeys(KEYS, "built-in"))
    name = tree.get("extends", "default")
    known = list(presets())
    if isinstance(name, str) and name in known:
        return _preset(name)
    near = hint(name, known) if isinstance(name, str) else ""
    faults.append(Fault(_line(lines, "extends"), "extends", shown(name), f"a preset: {', '.join(known)}{near}"))
    return None


def _given(tree: dict[str, Any], lines: dict[tuple[str, ...], int], faults: list[Fault]) -> dict[str, Any]:
    """The values that the file gives, in the fields' units; what is wrong by itself goes to `faults`."""
    given: dict[str, Any] = {}

    def take(table: str, name: str, line: int, value: Any, expected: str, known: list[str]) -> None:
        path = f"{table}.{name}" if table else name
        if path not in KEYS or KEYS[path].table != table:  # "compact.engage" in quotes is one odd key
            near = hint(name, known) if len(faults) < _HINT_LIMIT else ""
            faults.append(Fault(line, path[:100], shown(value), expected + near))
            return
        try:
            given[path] = convert(KEYS[path], value)
        except Unexpected as unexpected:
            faults.append(Fault(line, path, shown(value), str(unexpected)))

    top = ["extends", *TABLES, *(path for path, key in KEYS.items() if not key.table)]
    for name, value in tree.items():
        line = lines.get((name,), 0)
        if name in TABLES and isinstance(value, dict):
            known = [key.name for key in KEYS.values() if key.table == name]
            for inner, inner_value in value.items():
                take(name, inner, lines.get((name, inner), 0), inner_value, f"a key of [{name}]", known)
        elif name in TABLES:
            faults.append(Fault(line, name, shown(value), f"a table, once: [{name}]"))
        elif name != "extends":
            take("", name, line, value, "a table or a key that a policy has", top)
    return given


def _against_rules(values: dict[str, Any], sources: dict[str, str], lines: dict[tuple[str, ...], int]) -> list[Fault]:
    """Faults between keys; each is said of the key that the file gives later."""
    faults = []
    for left, comparison, right in RULES:
        if any(isinstance(side, str) and side not in values for side in (left, right)):
            continue
        low, high = (values[side] if isinstance(side, str) else side for side in (left, right))
        if low < high or (comparison == "<=" and low == high):
            continue
        less, more = _WORDS[comparison]
        sides = [(left, less, right), (right, more, left)]
        path, words, other = max((s for s in sides if isinstance(s[0], str)), key=lambda s: _line(lines, str(s[0])))
        key = KEYS[str(path)]
        if isinstance(other, str):
            limit = f"{other} = {written(KEYS[other], values[other])} ({sources.get(other, 'built-in')})"
        else:
            limit = written(key, other)
        faults.append(Fault(_line(lines, key.path), key.path, written(key, values[key.path]), f"{words} {limit}"))
    for tier in ("compact", "clear"):
        ways = [f"{tier}.exec", f"{tier}.signal"]
        if all(values.get(way) for way in ways):
            path = max(ways, key=lambda way: _line(lines, way))
            value = written(KEYS[path], values[path])
            faults.append(Fault(_line(lines, path), path, value, f"only one of {ways[0]} and {ways[1]}"))
    return faults
