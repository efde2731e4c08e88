"""The keys of a policy file, drawn from the fields of `Policy`, and how values are written (a profile's as well).

A key is called as its field, without the unit; the unit says how the value is written: `_ratio` 0.7, `_ns` "500ms",
`_bytes` "4GiB". Reads no file.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from governor.policy import Policy
from governor.session_files import parse_pattern

_DURATIONS = {"h": 3600 * 10**9, "m": 60 * 10**9, "s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}
_SIZES = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10, "": 1}
_QUANTITY = re.compile(r"([0-9]{1,18})([A-Za-z]*)")
_LONGEST_NS = 24 * _DURATIONS["h"]
_LARGEST_BYTES = (1 << 63) - 1
_LARGEST_COUNT = 1_000_000
_TEXT_LIMIT = 4096  # PATH_MAX: no glob and no argument of ours is longer
_LIST_LIMIT = 256
_SHOWN_LIMIT = 120
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# As Kubernetes has the keys of labels and annotations: an optional prefix that is a DNS name, then the name.
_PAIR = re.compile(r"([a-z0-9.-]{1,253}/)?[A-Za-z0-9][A-Za-z0-9._-]{0,62}=")


T = TypeVar("T")


class Unexpected(ValueError):
    """A value that does not fit its key; the text says what would."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key; `table` is "" at the top level, `default` is in the field's unit."""

    table: str
    name: str
    field: str
    default: Any
    check: Callable[[Any], None] | None = None  # raises Unexpected

    @property
    def path(self) -> str:
        """As people write it: compact.engage."""
        return f"{self.table}.{self.name}" if self.table else self.name


def keys_of(nouns: Any, checks: dict[str, Callable[[Any], None]]) -> dict[str, Key]:
    """The keys by path, drawn from a dataclass whose fields are values or dataclasses of values.

    `checks`: of texts and lists, by path or by name.
    """
    found: list[Key] = []
    for outer in fields(nouns):
        default = getattr(nouns, outer.name)
        table, inner = ("", [(outer.name, default)])
        if is_dataclass(default):
            table, inner = outer.name, [(field.name, getattr(default, field.name)) for field in fields(default)]
        for field_name, value in inner:
            name = _without_unit(field_name)
            check = checks.get(f"{table}.{name}", checks.get(name))
            found.append(Key(table, name, field_name, value, check))
    keys = {key.path: key for key in found}
    assert len(keys) == len(found), "two fields of a table differ in nothing but the unit"
    return dict(sorted(keys.items(), key=lambda item: item[1].table != ""))  # a file has the top level first


def _without_unit(field: str) -> str:
    return re.sub(r"_(ratio|ns|bytes)$", "", field)


def flatten(nouns: Any, keys: dict[str, Key] | None = None) -> dict[str, Any]:
    """The value of every key (default: of a policy), in its field's unit."""
    return {
        path: getattr(getattr(nouns, key.table) if key.table else nouns, key.field)
        for path, key in (KEYS if keys is None else keys).items()
    }


def build(values: dict[str, Any]) -> Policy:
    """The inverse of `flatten`, for a policy."""
    return build_from(Policy(), values, KEYS)


def build_from(nouns: T, values: dict[str, Any], keys: dict[str, Key]) -> T:
    """`nouns`, a dataclass, with these values; the inverse of `flatten`."""
    changed: dict[str, dict[str, Any]] = {}
    for path, key in keys.items():
        changed.setdefault(key.table, {})[key.field] = values[path]
    top = changed.pop("")
    tables = {table: replace(getattr(nouns, table), **inner) for table, inner in changed.items()}
    built: T = replace(nouns, **top, **tables)  # type: ignore[type-var]  # any dataclass
    return built


def convert(key: Key, value: Any) -> Any:
    """What tomllib read, in the field's unit; raises Unexpected."""
    default = key.default
    if key.field.endswith("_ratio"):
        return _number(value, float, "a number from 0 to 1", 1)
    if key.field.endswith("_ns"):
        return duration_ns(value)
    if key.field.endswith("_bytes"):
        return size_bytes(value)
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise Unexpected("true or false")
        return value
    if isinstance(default, int):
        return _number(value, int, f"a whole number from 0 to {_LARGEST_COUNT}", _LARGEST_COUNT)
    if isinstance(default, Enum):
        return _member(type(default), value)
    if isinstance(default, str):
        return _checked(key, _text(value))
    assert isinstance(default, tuple), f"{key.path}: no way to write a {type(default).__name__} in a file"
    return _checked(key, _texts(value))


def duration_ns(value: Any) -> int:
    """ "500ms", "10s", "5m", "2h" or 0, in nanoseconds; raises Unexpected."""
    return _quantity(value, _DURATIONS, _LONGEST_NS, 'a duration up to "24h", such as "500ms", "10s", "5m"')


def size_bytes(value: Any) -> int:
    """ "512MiB", "4GiB", "1000000" or 0, in bytes; raises Unexpected."""
    return _quantity(value, _SIZES, _LARGEST_BYTES, 'a size, such as "512MiB", "4GiB" or "1000000"')


def _number(value: Any, kind: type[int] | type[float], expected: str, most: int) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, kind)) or not 0 <= value <= most:
        raise Unexpected(expected)
    return kind(value)


def _quantity(value: Any, units: dict[str, int], most: int, expected: str) -> int:
    if isinstance(value, int) and value == 0 and not isinstance(value, bool):
        return 0
    match = _QUANTITY.fullmatch(value) if isinstance(value, str) else None
    if not match or match[2] not in units or int(match[1]) * units[match[2]] > most:
        raise Unexpected(expected)
    return int(match[1]) * units[match[2]]


def _member(kind: type[Enum], value: Any) -> Enum:
    for member in kind:
        if member.value == value and isinstance(value, str):
            return member
    raise Unexpected("one of " + ", ".join(toml_text(member.value) for member in kind))


def _text(value: Any) -> str:
    if not isinstance(value, str) or "\0" in value or len(value) > _TEXT_LIMIT:
        raise Unexpected(f"text of at most {_TEXT_LIMIT} characters")
    return value


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or len(value) > _LIST_LIMIT:
        raise Unexpected(f'a list of at most {_LIST_LIMIT} texts, such as ["one", "two"]')
    return tuple(map(_text, value))


def _checked(key: Key, value: Any) -> Any:
    if key.check:
        key.check(value)
    return value


def check_name(name: str) -> None:
    """Raises Unexpected for what could not be a file's name."""
    if not NAME.fullmatch(name):
        raise Unexpected("a name of at most 64 letters, digits, '.', '_' and '-', beginning with a letter or digit")


def check_signal(name: str) -> None:
    """Raises Unexpected for what is no signal that can be handled; "" is none."""
    if name in ("SIGKILL", "SIGSTOP"):
        raise Unexpected("a signal that the agent can handle")
    if name and name not in signal.Signals.__members__:
        raise Unexpected(f'the name of a signal, such as "SIGUSR1"{hint(name, list(signal.Signals.__members__))}')


def check_exec(command: tuple[str, ...]) -> None:
    """Raises Unexpected for a command without a program; () is none."""
    if command and not command[0]:
        raise Unexpected("a list that begins with the program to run")


def check_globs(globs: tuple[str, ...]) -> None:
    """Raises Unexpected for globs that are not absolute or of a home."""
    for glob in globs:
        try:
            parse_pattern(glob, "/")
        except ValueError:
            raise Unexpected(
                f"globs of files, each beginning with / or ~/ and without '..'; found {toml_text(glob)}"
            ) from None


def _check_cgroups(globs: tuple[str, ...]) -> None:
    for glob in globs:
        if not glob or glob.startswith("/"):
            raise Unexpected(
                f'globs of paths below /sys/fs/cgroup, such as "system.slice/*"; found {toml_text(glob)}'
            )


def _check_names(globs: tuple[str, ...]) -> None:
    for glob in globs:
        if not glob or "/" in glob:
            raise Unexpected(f'globs of names, without "/", such as "agent-*"; found {toml_text(glob)}')


def _check_pairs(pairs: tuple[str, ...]) -> None:
    for pair in pairs:
        if not _PAIR.match(pair):
            raise Unexpected(f'"key=glob", such as "app=agent-*"; "app=*" is any value; found {toml_text(pair)}')


def _check_profile(text: str) -> None:
    if text and not text.startswith("/") and not NAME.fullmatch(text):
        raise Unexpected("a profile's name, or its absolute path")


_CHECKS: dict[str, Callable[[Any], None]] = {
    "name": check_name,
    "profile": _check_profile,
    "signal": check_signal,
    "exec": check_exec,
    "globs": check_globs,
    "cgroup": _check_cgroups,
    "namespace": _check_names,
    "pod": _check_names,
    "container": _check_names,
    "label": _check_pairs,
    "annotation": _check_pairs,
}
KEYS = keys_of(Policy(), _CHECKS)
TABLES = tuple(dict.fromkeys(key.table for key in KEYS.values() if key.table))


def hint(found: str, known: list[str]) -> str:
    """`; did you mean "X"?`, or nothing."""
    import difflib  # not in the resident process until somebody made a mistake

    near = difflib.get_close_matches(found[:_SHOWN_LIMIT], known, 1, 0.5)
    return f"; did you mean {toml_text(near[0])}?" if near else ""


def written(key: Key, value: Any) -> str:
    """A value in the field's unit as a file has it; `convert` reads it back."""
    if isinstance(value, Enum):
        return toml_text(value.value)
    for unit, units in (("_ns", _DURATIONS), ("_bytes", _SIZES)):
        if key.field.endswith(unit):
            if value == 0:
                return "0"
            suffix = next(suffix for suffix, factor in units.items() if value % factor == 0)
            return toml_text(f"{value // units[suffix]}{suffix}")
    return toml_text(value)


def toml_text(value: Any) -> str:
    """A value as TOML, with nothing in it that could steer a terminal."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(map(_escaped, value)) + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(toml_text, value)) + "]"
    return str(value)


def _escaped(char: str) -> str:
    if char in ('"', "\\"):
        return "\\" + char
    if char.isprintable():
        return char
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def shown(value: Any) -> str:
    """A value that was found in a file, however odd, in a bounded space."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):  # its elements may nest deeper than Python recurses
        text = "[" + ", ".join("[...]" if isinstance(x, list) else shown(x) for x in value[:_LIST_LIMIT]) + "]"
    elif isinstance(value, str):
        text = toml_text(value[:_SHOWN_LIMIT])
        text = text if len(value) <= _SHOWN_LIMIT else text[:-1] + "..."
    elif isinstance(value, int) and value.bit_length() > 256:  # str() refuses more than 4300 digits
        text = "a number of more than 70 digits"
    else:
        text = toml_text(value)
    return text if len(text) <= 2 * _SHOWN_LIMIT else text[: 2 * _SHOWN_LIMIT] + "..."
