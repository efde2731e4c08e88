"""Reads a policy from TOML: a preset of the package or a file; every fault at once, with its line.

What keys there are and how their values are written is in `policy_keys`; here is what a file may say, and the rules
from one key to another.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governor import profile_file
from governor.policy import Policy
from governor.policy_keys import KEYS, NAME, build, flatten, hint, shown, written
from governor.toml_file import Fault, FileError, given_values, line_of, read_named, read_tree

_PRESETS = Path(__file__).parent / "presets"

# Left, comparison, right; each a key, or a value in the unit of the other side's key.
RULES: tuple[tuple[str | float, str, str | float], ...] = (
    # Levels. The kernel programs need theirs ascending, and something to fall below.
    *((0, "<", f"{tier}.release") for tier in ("compact", "recycle", "clear", "terminate", "brake")),
    *((f"{tier}.release", "<", f"{tier}.engage") for tier in ("compact", "recycle", "clear", "terminate", "brake")),
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
    ("recycle.engage", "<=", "recycle.cooldown_waived"),
    ("clear.engage", "<=", "clear.cooldown_waived"),
    (0, "<", "terminate.throttle"),
    # Times. Where compact may not be tried within clear_after_compact, clear could never follow it.
    ("compact.cooldown", "<", "clear_after_compact"),
    ("compact.settle", "<", "clear_after_compact"),
    *((0, "<", f"{tier}.{time}") for tier in ("compact", "recycle", "clear") for time in ("deadline", "retry")),
    (0, "<", "recycle.compacting"),
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


PolicyError = FileError  # a policy that cannot be used


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
    data = read_named(name_or_path, presets(), "preset")
    if name_or_path in presets():
        return _parse(data, f"preset {name_or_path}", name_or_path, is_preset=True)
    return parse(data, name_or_path)


def parse(data: bytes, where: str) -> Loaded:
    """The policy that a file's bytes say; `where` is the file's name; raises PolicyError."""
    return _parse(data, where, Path(where).stem, is_preset=False)


def _parse(data: bytes, where: str, stem: str, is_preset: bool) -> Loaded:
    tree, lines = read_tree(data, where)
    faults: list[Fault] = []
    base = _base(tree, stem if is_preset else "", lines, faults)
    given = given_values(tree, lines, KEYS, ("extends",), "a policy", faults)
    policy, sources = (base.policy, dict(base.sources)) if base else (Policy(), {})
    values = flatten(policy) | given
    for path in given:
        sources[path] = where if is_preset else f"{where}:{line_of(lines, path)}"
    if "name" not in tree and NAME.fullmatch(stem):
        values["name"], sources["name"] = stem, where
    faulty = {fault.key for fault in faults}
    # Without its base a file can only be held against itself.
    sure = {path: values[path] for path in (KEYS if base else given) if path not in faulty}
    faults += _against_rules(sure, sources, lines)
    if "profile" in sure and (why := _no_profile(sure["profile"])):
        faults.append(Fault(line_of(lines, "profile"), "profile", shown(sure["profile"]), why))
    if faults:
        raise PolicyError(where, sorted(faults, key=lambda fault: fault.line))
    return Loaded(build(values), sources)


def _no_profile(name: str) -> str:
    """What would be a profile, where this is none; "" where it is one, or not given."""
    known = profile_file.profiles()
    if name and name not in known and not name.startswith("/"):
        return f"a profile's absolute path, or one of {', '.join(known)}{hint(name, list(known))}"
    try:
        if name:
            profile_file.load(name)
    except FileError as error:
        return f"a good profile: {error}"
    return ""


def _base(
    tree: dict[str, Any], own_name: str, lines: dict[tuple[str, ...], int], faults: list[Fault]
) -> Loaded | None:
    """What the file extends; None, and a fault, where there is no such preset."""
    if own_name == "default":
        return Loaded(Policy(), dict.fromkeys(KEYS, "built-in"))
    name = tree.get("extends", "default")
    known = list(presets())
    if isinstance(name, str) and name in known:
        return load(name)
    near = hint(name, known) if isinstance(name, str) else ""
    faults.append(Fault(line_of(lines, "extends"), "extends", shown(name), f"a preset: {', '.join(known)}{near}"))
    return None


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
        path, words, other = max((s for s in sides if isinstance(s[0], str)), key=lambda s: line_of(lines, str(s[0])))
        key = KEYS[str(path)]
        if isinstance(other, str):
            limit = f"{other} = {written(KEYS[other], values[other])} ({sources.get(other, 'built-in')})"
        else:
            limit = written(key, other)
        faults.append(Fault(line_of(lines, key.path), key.path, written(key, values[key.path]), f"{words} {limit}"))
    for tier in ("compact", "clear"):
        ways = [f"{tier}.exec", f"{tier}.signal"]
        if all(values.get(way) for way in ways):
            path = max(ways, key=lambda way: line_of(lines, way))
            value = written(KEYS[path], values[path])
            faults.append(Fault(line_of(lines, path), path, value, f"only one of {ways[0]} and {ways[1]}"))
    return faults
