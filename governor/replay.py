"""Decide again what a journal tells of, without a kernel: the same policy must come to the same decisions.

With another policy the decisions that differ are shown side by side. What was heard stays what it was: a crossing
that the other policy's levels would have brought earlier, or an answer to something it never asked, is not made up.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from governor import ladder, model
from governor.codec import plain, restored
from governor.journal import Journal, open_file
from governor.model import State
from governor.policy import Policy

_EVENTS = {kind.__name__: kind for kind in model.Event.__args__}
_LINE_LIMIT_BYTES = 1 << 20


class ReplayError(Exception):
    """A journal cannot be replayed; says which line and why."""


@dataclass(frozen=True, slots=True)
class Decision:
    """One step: what was heard, what had been decided, and what is decided now."""

    time: str
    event: str
    recorded: tuple[str, ...]
    replayed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A line that was cut off, by a full disk for instance; passed over."""

    where: str


def files(path: Path) -> list[Path]:
    """A journal with the files that were rotated away from it, oldest first."""
    older = [path.with_name(f"{path.name}.{number}") for number in range(Journal.KEEP, 0, -1)]
    return [*(one for one in older if one.exists()), path]


def replay(paths: list[Path], policy: Policy | None = None) -> Iterator[Decision | Unreadable]:
    """Every step of the journals, decided again; under the policies they name if none is given.

    Raises ReplayError for a file that is no journal, OSError for one that cannot be read.
    """
    state: State | None = None
    recorded_policy = Policy()
    for where, line in _lines(paths):
        if line is None:
            yield Unreadable(where)
            continue
        try:
            kind = line["kind"]
            if kind == "begin" and (state is None or policy is None):
                state = restored(State, line["state"])
            if kind in ("begin", "policy"):
                recorded_policy = restored(Policy, line["policy"])
            if kind != "step" or state is None:
                continue
            event = restored(_EVENTS[line["event"]], line["of"])
            state, instructions = ladder.step(state, event, line["now_ns"], policy or recorded_policy)
            yield Decision(
                line["time"],
                line["event"],
                tuple(told(each) for each in line["instructions"]),
                tuple(told({type(each).__name__: plain(each)}) for each in instructions),
            )
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise ReplayError(f"{where}: no line of a governor journal, or of another version ({error!r})") from error
    if state is None:
        raise ReplayError(f"found no line of kind begin in {', '.join(map(str, paths))}: not a governor journal")


def told(instruction: dict[str, dict[str, Any]]) -> str:
    """An instruction in one line: its name and what it was asked to do."""
    ((name, values),) = instruction.items()
    return f"{name}({', '.join(f'{key}={value}' for key, value in values.items())})"


def _lines(paths: list[Path]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    for path in paths:
        with open_file(path) as journal:
            for number, data in enumerate(iter(lambda: journal.readline(_LINE_LIMIT_BYTES), b""), 1):
                try:
                    line = orjson.loads(data)
                except orjson.JSONDecodeError:
                    line = None
                yield f"{path}:{number}", line if isinstance(line, dict) else None
