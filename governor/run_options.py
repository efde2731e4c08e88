"""What the command line of `governor run` found out, for the process that it becomes."""

from __future__ import annotations

from typing import Any, NamedTuple


class Options(NamedTuple):
    """`guard` has the fields of guard.Guard and the names of its locks."""

    command: list[str]
    socket_path: str = ""  # "": no control socket
    log_path: str = ""  # of the guard, while the terminal is the agent's
    memcg: str = ""  # made for the agent, and removed at the end
    guard: dict[str, Any] | None = None
    grace_ns: int = 10_000_000_000
    without: list[str] = []  # noqa: RUF012  never changed; names that the agent's environment is not to have
    kept: list[int] = []  # noqa: RUF012  never changed; which words of the command a resumed agent is given again
