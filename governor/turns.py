"""Who may begin, of what a whole node does a few at a time: first come, first served. Starts and ends nothing itself.

Archives, mostly of containers that were braked: each is a fork of governor and another in the container, on a node
that is short of memory as it is. Strictly one by one, one container whose files never answer would take the time of
all others. So a few go on at once, and whoever takes longer than its share goes on beside those: it most likely
waits, and holds little more than the memory it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

AT_ONCE = 4
SHARE_NS = 5_000_000_000  # so of N before it, hanging all of them, nobody waits for longer than N / 4 times 5 s


@dataclass(eq=False, slots=True)
class Turn:
    """Somebody's, which has begun or will."""

    begin: Callable[[], None]
    begun_ns: int | None = None


class Turns:
    """Of everybody; once begun they are to be ended, by whoever has them."""

    def __init__(self) -> None:
        self._turns: list[Turn] = []  # in the order in which they were asked for
        self._is_admitting = False

    def ask(self, turn: Turn, now_ns: int) -> None:
        """Its `begin` is called once: here if it is alone, else from admit() or end().

        Who asks comes in swarms, when a node fills up: each must have been heard, and its loan prolonged, before one
        more fork takes the time for that.
        """
        self._turns.append(turn)
        if len(self._turns) == 1:
            self.admit(now_ns)

    def end(self, turn: Turn, now_ns: int) -> None:
        """It is over, or not wanted any more."""
        if turn in self._turns:
            self._turns.remove(turn)
            self.admit(now_ns)

    def admit(self, now_ns: int) -> None:
        """Have begin whoever may by now."""
        if self._is_admitting:  # one that fails at once ends while it begins: whoever called goes on
            return
        self._is_admitting = True
        try:
            while (turn := self._next(now_ns)) is not None:
                turn.begun_ns = now_ns
                turn.begin()
        finally:
            self._is_admitting = False

    def _next(self, now_ns: int) -> Turn | None:
        busy = sum(turn.begun_ns is not None and now_ns - turn.begun_ns < SHARE_NS for turn in self._turns)
        waiting = (turn for turn in self._turns if turn.begun_ns is None)
        return next(waiting, None) if busy < AT_ONCE else None
