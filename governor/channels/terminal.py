"""A terminal that an agent is in, as far as a delivery needs it."""

from __future__ import annotations

from typing import Protocol


class ChannelError(Exception):
    """The terminal could not be seen, or not typed into; the text is the reason."""


class Terminal(Protocol):
    """What shows the agent's screen and takes keys for it; may be closed when done."""

    def screen(self) -> list[str]:
        """The visible lines, without the spaces at their ends; raises ChannelError."""

    def type(self, keys: bytes) -> None:
        """Send keys as a keyboard would; raises ChannelError."""
