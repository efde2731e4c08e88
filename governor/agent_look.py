"""Has a child read what only the arguments and the environment of a process tell: whom a profile means, and HOME.

For either the kernel takes the lock of the process's memory map, and a program of a container can hold that for ever
(as it maps over a page of a FUSE file to which it has written, and whoever serves that never takes it). So of who
lives elsewhere both are read by a child with a deadline, one for each question of each agent: whoever lets it wait
keeps nobody waiting but itself. A reader that stays, for all, would be cheaper, and the first to hang would have it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import orjson

from governor import inside
from governor.children import Children, Ended, fork
from governor.policy import SECOND
from governor.poller import Poller
from governor.profile import Match
from governor.profile_agent import Agent, find_agent

_DEADLINE_NS = 5 * SECOND
_AGAIN_NS, _AGAIN_DOUBLED = 10 * SECOND, 12  # from a look that was over its deadline to the next, ever more seldom


class AgentLook:
    """At the agent of one governed memcg; `heard` is called once an answer to agent() is there."""

    def __init__(self, poller: Poller, heard: Callable[[], None]) -> None:
        self._children, self._heard = Children(poller), heard
        self._answers: list[Agent | None] = []
        self._looks_for_home = False
        self._failures = self._again_ns = 0
        self.is_open = False  # a child looks for the agent, or has, and nobody has taken its answer

    def agent(self, match: Match, pid: int) -> Agent | None:
        """Whom a profile means among a process and what it started; None for nobody, and while `is_open`."""
        if not self.is_open:
            if self._is_in_vain:
                return None
            self.is_open = True
            work = lambda: orjson.dumps(find_agent(match, pid))  # noqa: E731
            self._children.attempt(lambda: fork(work, _deadline_ns(), f"a look at process {pid}"), self._looked)
        if not self._answers:
            return None
        self.is_open = False
        return self._answers.pop()

    @property
    def is_waiting(self) -> bool:
        """Whether a child looks for the agent now."""
        return self.is_open and not self._answers

    @property
    def is_to_be_repeated(self) -> bool:
        """Whether the last one was over its deadline, a while ago."""
        return self._failures > 0 and not self._is_in_vain

    @property
    def _is_in_vain(self) -> bool:
        return time.monotonic_ns() < self._again_ns

    def _looked(self, ended: Ended) -> None:
        self._answers = [Agent(**orjson.loads(ended.output)) if ended.ok else None]
        self._count(ended)
        self._heard()

    def _count(self, ended: Ended) -> None:
        self._failures = self._failures + 1 if ended.over_deadline else 0
        if self._failures:
            self._again_ns = time.monotonic_ns() + (_AGAIN_NS << min(self._failures - 1, _AGAIN_DOUBLED))

    def home(self, door: inside.Door, then: Callable[[str], None]) -> None:
        """Have `then` called with the HOME of who lives behind a door, unless it cannot be read."""

        def looked(ended: Ended) -> None:
            self._looks_for_home = False
            self._count(ended)
            if ended.ok:
                then(os.fsdecode(ended.output))

        if not self._looks_for_home and not self._is_in_vain:
            self._looks_for_home = True
            work = lambda: os.fsencode(inside.home(door))  # noqa: E731
            self._children.attempt(lambda: fork(work, _deadline_ns(), "a look at HOME", keep=door.fds), looked)

    def check_deadlines(self, now_ns: int) -> None:
        """End a child that has waited for too long."""
        self._children.check_deadlines(now_ns)

    def close(self) -> None:
        """Nobody wants to know any more."""
        self._children.abandon()
        self._answers, self.is_open, self._looks_for_home = [], False, False


def _deadline_ns() -> int:
    return time.monotonic_ns() + _DEADLINE_NS
