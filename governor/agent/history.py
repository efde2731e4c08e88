"""A conversation with a hard cap, by the bytes that it really holds, by turns and by tokens.

When a turn does not fit, the oldest exchanges go: a question with all that answered it, so that no tool's result is
left without its call. In the last exchange, which may be an agent's work of hours, the oldest steps go and the
question stays. System turns and pinned ones stay always. Room is made for many turns at once (`release_ratio`): the
model's prompt cache is good until the beginning changes.

What goes may be written to a file and read back (see history_spill), and be handed to a summariser. The cap holds at
every moment: turns are written and summarised before they go, and only then comes the new one. For one thread, or one
event loop.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
import os
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from governor.agent.deep_size import deep_size
from governor.agent.history_spill import Spill, check

_SYSTEM = frozenset({"system", "developer"})
_RESULTS = frozenset({"tool", "function"})


class HistoryFull(ValueError):
    """A turn or a summary does not fit beside what has to stay; the history is as it was."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One message. `content` is text, or blocks as the model's API has them; not to be changed once it is here.

    Or it is the whole message, a dict, where the API has more beside the content: OpenAI's tool_calls, tool_call_id.
    """

    number: int
    role: str
    content: Any
    pinned: bool
    size_bytes: int
    tokens: int


@dataclass(frozen=True, slots=True)
class _Amount:
    size_bytes: int
    turns: int
    tokens: int

    def plus(self, other: _Amount, sign: int = 1) -> _Amount:
        return _Amount(
            self.size_bytes + sign * other.size_bytes,
            self.turns + sign * other.turns,
            self.tokens + sign * other.tokens,
        )

    def minus(self, other: _Amount) -> _Amount:
        return self.plus(other, -1)

    def times(self, ratio: float) -> _Amount:
        return _Amount(int(self.size_bytes * ratio), int(self.turns * ratio), int(self.tokens * ratio))

    def __str__(self) -> str:
        parts = ((self.size_bytes, "bytes"), (self.turns, "turns"), (self.tokens, "tokens"))
        return ", ".join(f"{count:,} {what}" for count, what in parts if 0 < count < sys.maxsize) or "nothing"

    def fits(self, caps: _Amount) -> bool:
        return self.size_bytes <= caps.size_bytes and self.turns <= caps.turns and self.tokens <= caps.tokens


_Step = list[Turn]  # what stays or goes together: a question, or an answer with its tools' results
_NOTHING = _Amount(0, 0, 0)
_INTEGER_BYTES = 32
_TURN_BYTES = sys.getsizeof(Turn(0, "", "", False, 0, 0)) + 2 * _INTEGER_BYTES
_PLACE_BYTES = sys.getsizeof([None]) + 8  # a step's list, and the window's pointer to it

Summarise = Callable[[str, Sequence[Turn]], "str | Awaitable[str]"]  # the summary until now ("": none), what goes now


class BoundedHistory:
    """Turns in order, never more than the caps; a cap that is None is none, and there is at least one.

    `max_tokens` goes with `count_tokens`, a function of role and content. `summarise` is given the last summary and
    what goes now; what it returns takes their place, as a turn of `summary_role`. `spill` names a file for what goes.
    """

    def __init__(
        self,
        max_bytes: int | None = None,
        *,
        max_turns: int | None = None,
        max_tokens: int | None = None,
        count_tokens: Callable[[str, Any], int] | None = None,
        summarise: Summarise | None = None,
        summary_role: str = "user",
        release_ratio: float = 0.75,
        spill: str | os.PathLike[str] | None = None,
        sync: bool = False,
    ) -> None:
        given = [cap for cap in (max_bytes, max_turns, max_tokens) if cap is not None]
        if not given or min(given) <= 0:
            raise ValueError(f"found caps {given}, expected max_bytes, max_turns or max_tokens, more than 0")
        if (max_tokens is None) != (count_tokens is None):
            raise ValueError(
                "max_tokens and count_tokens, a function of role and content, go together: found only one"
            )
        if not 0 < release_ratio <= 1 or (summarise and release_ratio == 1):
            raise ValueError(
                f"found release_ratio {release_ratio}, expected above 0, at most 1, below 1 with summaries"
            )
        self._caps = _Amount(*(sys.maxsize if cap is None else cap for cap in (max_bytes, max_turns, max_tokens)))
        self._release_ratio = release_ratio
        self._count_tokens = count_tokens
        self._summarise = summarise
        self._summary_role = summary_role
        self._summary: Turn | None = None
        self._kept: list[_Step] = []  # system turns, and what is pinned and whose neighbours have gone
        self._window: deque[_Step] = deque()
        self._questions = 0  # of the steps in the window
        self._held = _NOTHING
        self._summarising = asyncio.Lock()
        self._spill = Spill(spill, sync=sync) if spill is not None else None
        newest = self._spill.last() if self._spill else None
        # Of all that went: what was pinned goes after what came later. Records of old have only their own.
        self._newest_spilled = newest.get("newest", newest["number"]) if newest else -1
        self._next_number = self._newest_spilled + 1

    def append(self, role: str, content: Any, *, pinned: bool = False) -> Turn:
        """Add a turn, and make room for it.

        Raises HistoryFull where there cannot be, OSError where what goes cannot be written, and what the summariser
        raises: then the history is as it was.
        """
        self._not_meanwhile()
        turn = self._measured(role, content, pinned)
        self._shrink(turn, self._leaving(turn, self._release_ratio))
        return self._placed(turn)

    async def append_async(self, role: str, content: Any, *, pinned: bool = False) -> Turn:
        """As append(), where the summariser may be asynchronous; others wait for their turn."""
        async with self._summarising:
            turn = self._measured(role, content, pinned)
            await self._shrink_async(turn, self._leaving(turn, self._release_ratio))
            return self._placed(turn)

    def shrink(self, ratio: float) -> None:
        """Down to this share of the caps now, as far as that goes: for an agent that is asked to compact."""
        self._not_meanwhile()
        self._shrink(None, self._leaving(None, ratio))

    async def shrink_async(self, ratio: float) -> None:
        """As shrink(), where the summariser may be asynchronous."""
        async with self._summarising:
            await self._shrink_async(None, self._leaving(None, ratio))

    def pin(self, number: int, pinned: bool = True) -> None:
        """Keep a turn that is here, or no longer; raises KeyError where it is not here. Takes a look at each turn."""
        self._not_meanwhile()
        for step in (*reversed(self._window), *self._kept):
            for at, turn in enumerate(step):
                if turn.number == number:
                    step[at] = replace(turn, pinned=pinned)
                    if not _pinned(step) and turn.role not in _SYSTEM and any(step is kept for kept in self._kept):
                        self._kept = [kept for kept in self._kept if kept is not step]
                        self._window.appendleft(step)  # whole: a call with its results
                        self._questions += _asks(step)
                    return
        raise KeyError(f"turn {number} is not here (any more)")

    def __iter__(self) -> Iterator[Turn]:
        turns = [turn for step in (*self._kept, *self._window) for turn in step]
        return iter(sorted(turns + ([self._summary] if self._summary else []), key=lambda turn: turn.number))

    def __len__(self) -> int:
        return self._held.turns

    def messages(self) -> list[dict[str, Any]]:
        """As model APIs want them."""
        return [
            turn.content if isinstance(turn.content, dict) else {"role": turn.role, "content": turn.content}
            for turn in self
        ]

    @property
    def size_bytes(self) -> int:
        """What all turns hold."""
        return self._held.size_bytes

    @property
    def tokens(self) -> int:
        """By the counter that was given; 0 without."""
        return self._held.tokens

    def spilled(self) -> Iterator[Turn]:
        """What was dropped, in that order, also by those who had the file before; one turn in memory at a time."""
        for record in self._spill or ():
            yield self._measured(record["role"], record["content"], record["pinned"], record["number"])

    def close(self) -> None:
        """Let others use the spill."""
        if self._spill:
            self._spill.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _measured(self, role: str, content: Any, pinned: bool, number: int | None = None) -> Turn:
        role = sys.intern(str.__str__(role))  # of a StrEnum, too: only a plain text can be interned
        if self._spill and not isinstance(content, str):
            check(content)
        tokens = self._count_tokens(role, content) if self._count_tokens else 0
        size_bytes = _TURN_BYTES + _PLACE_BYTES + deep_size(content) + (tokens > 256) * _INTEGER_BYTES
        return Turn(self._next_number if number is None else number, role, content, pinned, size_bytes, tokens)

    def _placed(self, turn: Turn) -> Turn:
        self._next_number = turn.number + 1
        self._held = self._held.plus(_of(turn))
        if turn.role in _SYSTEM:
            self._kept.append([turn])
        elif _is_result(turn) and self._window and not _asks(self._window[-1]):
            self._window[-1].append(turn)
        else:
            self._window.append([turn])
            self._questions += _asks(self._window[-1])
        return turn

    def _leaving(self, turn: Turn | None, ratio: float) -> list[_Step]:
        """What goes, oldest first, to have room for a turn; with None, to come down to this share of the caps."""
        held = self._held.plus(_of(turn)) if turn else self._held
        leaving: list[_Step] = []
        if held.fits(self._caps if turn else self._caps.times(ratio)):
            return leaving
        release = self._caps.times(ratio)
        enough = release if self._summarise or not turn else self._caps  # the last exchange gives no more than that
        new_question = turn is not None and _asks([turn])
        # The last step may have a call whose result is still to come.
        waiting = turn is None or turn.role in _SYSTEM or _is_result(turn)
        asked = 0
        for place, step in enumerate(self._window, 1):
            asked += _asks(step)
            in_last_exchange = not new_question and asked == self._questions
            if held.fits(release) and (in_last_exchange or _asks(step)):
                break
            if in_last_exchange and (held.fits(enough) or (waiting and place == len(self._window))):
                break
            if not _pinned(step) and not (in_last_exchange and _asks(step)):
                leaving.append(step)
                held = held.minus(_amount(step))
        if turn and not held.fits(self._caps):
            raise HistoryFull(
                f"found {held}: a turn of {_of(turn)}, and what has to stay (system and pinned turns, and the "
                f"question that is being answered); expected at most {self._caps}"
            )
        return leaving

    def _shrink(self, turn: Turn | None, leaving: list[_Step]) -> None:
        summary = ""
        if leaving and self._summarise:
            made = self._summarise(*self._to_summarise(leaving))
            if not isinstance(made, str):
                if inspect.iscoroutine(made):
                    made.close()
                raise TypeError("the summariser is asynchronous: use append_async and shrink_async")
            summary = made
        self._remove(leaving, summary, turn)

    async def _shrink_async(self, turn: Turn | None, leaving: list[_Step]) -> None:
        summary = ""
        if leaving and self._summarise:
            made = self._summarise(*self._to_summarise(leaving))
            summary = made if isinstance(made, str) else await made
        self._remove(leaving, summary, turn)

    def _to_summarise(self, leaving: list[_Step]) -> tuple[str, list[Turn]]:
        return self._summary.content if self._summary else "", [turn for step in leaving for turn in step]

    def _remove(self, leaving: list[_Step], text: str, turn: Turn | None) -> None:
        """Write what goes, put the summary in its place, take it out of the window."""
        if not leaving:
            return
        held = self._held.minus(_amount([each for step in leaving for each in step]))
        summary = self._summary
        if text:
            summary = self._measured(self._summary_role, text, True, leaving[-1][-1].number)
            held = held.plus(_of(summary)).minus(_of(self._summary) if self._summary else _NOTHING)
            if not held.plus(_of(turn) if turn else _NOTHING).fits(self._caps):
                raise HistoryFull(
                    f"found a summary of {_of(summary)} for what held {self._held.minus(held)}; make it shorter"
                )
        if self._spill:
            turns = [each for step in leaving for each in step]
            # Of those until each one: who is killed in the midst goes on after the last that is there.
            numbers = (each.number for each in turns)
            newest = list(itertools.accumulate(numbers, max, initial=self._newest_spilled))
            self._spill.write(
                {"number": each.number, "role": each.role, "content": each.content, "pinned": False, "newest": until}
                for each, until in zip(turns, newest[1:], strict=True)
            )
            self._newest_spilled = newest[-1]
        going, question = deque(leaving), None
        while going:
            step = self._window.popleft()
            self._questions -= _asks(step)
            if step is going[0]:
                going.popleft()
            elif _pinned(step):
                self._kept.append(step)
            else:  # the question of the last exchange
                question = step
        if question:
            self._window.appendleft(question)
            self._questions += 1
        self._held, self._summary = held, summary

    def _not_meanwhile(self) -> None:
        if self._summarising.locked():
            raise RuntimeError(
                "a summary is being made at this moment: use append_async and shrink_async, and pin before or after"
            )


def _is_result(turn: Turn) -> bool:
    """It answers a call of the turn before: OpenAI's role for that, or blocks as Anthropic has them."""
    content = turn.content.get("content") if isinstance(turn.content, dict) else turn.content
    blocks = content if turn.role == "user" and isinstance(content, list) else []
    return turn.role in _RESULTS or any(isinstance(b, dict) and b.get("type") == "tool_result" for b in blocks)


def _asks(step: _Step) -> bool:
    return step[0].role == "user" and not _is_result(step[0])


def _pinned(step: _Step) -> bool:
    return any(turn.pinned for turn in step)


def _of(turn: Turn) -> _Amount:
    return _Amount(turn.size_bytes, 1, turn.tokens)


def _amount(turns: _Step) -> _Amount:
    if len(turns) == 1:
        return _of(turns[0])
    return _Amount(sum(turn.size_bytes for turn in turns), len(turns), sum(turn.tokens for turn in turns))
