"""A terminal that an agent is in, as far as a delivery needs it."""

from __future__ import annotations

from typing import Protocol


class ChannelError(Exception):
    """The terminal could not be seen, or not typed into; the text is the reason."""


class Terminal(Protocol):
    """What shows the agent's screen and takes keys for it; may be closed when done."""

    def screen(self) -> list[str]:
        """The visible lines, without the spaces at their ends, down to the cursor or the last that shows anything.

        Raises ChannelError.
        """

    def type(self, keys: bytes) -> None:
        """Send keys as a keyboard would; raises ChannelError."""


def down_to(lines: list[str], cursor_row: int) -> list[str]:
    """Lines of a whole screen without spaces at their ends, and without the blank ones below the cursor (row from 0).

    So a program that is at work on a line is told from one that waits behind its prompt.
    """
    lines = [line.rstrip() for line in lines]
    last = max((row for row, line in enumerate(lines) if line), default=-1)
    return lines[: max(last, cursor_row) + 1]
