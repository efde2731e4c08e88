"""Tells an agent something by its own input, as its user would: guarded as a delivery, tried until it can be typed.

For what an agent should know of a tool that was shed. So that a loop of sheds does not flood the agent's context, one
line in a few minutes is typed; the others are in the file that `governor why` reads. Runs in a child.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from governor import told
from governor.channels.terminal import ChannelError, Terminal
from governor.children import Attempt, Child, Deferred, Ended, fork
from governor.delivery import Outcome, alone_with, as_output, limit_cpu, open_terminal, type_line
from governor.model import Status
from governor.policy import MINUTE, SECOND
from governor.profile import Profile
from governor.profile_agent import Agent, NoAgent, find_agent, is_alive
from governor.profile_state import is_frozen

WITHIN_NS = 60 * SECOND  # from the first try to the last; while the agent is frozen the time stands still
_AGAIN_NS = 2 * MINUTE  # from one line to the next
_TRY_NS = 20 * SECOND  # one try has so long
_RETRY_S = 1.0
_CPU_S = 90  # of a CPU, for all looks
_ROOM_NS = 15 * SECOND  # beyond: for the last try to come to its end

Try = Callable[[Agent, Terminal], Outcome]


def start(profile: Profile, pid: int, channel: str, attempt: Try, within_ns: int, what: str) -> Child:
    """Try it in a child until it is not deferred; exit status and output are as those of delivery.start().

    Raises OSError: no child.
    """

    def work() -> bytes:
        limit_cpu(_CPU_S)
        try:
            agent = find_agent(profile.match, pid)
            terminal = open_terminal(channel, agent)
            if terminal is None:
                raise ChannelError("no terminal is known")
            return as_output(_until_done(agent, terminal, attempt, within_ns))
        except NoAgent as error:
            raise ChannelError(str(error)) from None

    return fork(work, time.monotonic_ns() + within_ns + _TRY_NS + _ROOM_NS, what, is_delivery=True)


def _until_done(agent: Agent, terminal: Terminal, attempt: Try, left_ns: int) -> Outcome:
    while True:
        began_ns = time.monotonic_ns()
        try:
            with alone_with(agent):
                outcome = attempt(agent, terminal)
        except Deferred as error:
            outcome = Outcome(Status.DEFERRED, str(error))
        if outcome.status is not Status.DEFERRED or left_ns <= 0 or not is_alive(agent):
            return outcome
        time.sleep(_RETRY_S)
        if not is_frozen(agent.pid):
            left_ns -= time.monotonic_ns() - began_ns


def say(profile: Profile, text: str) -> Try:
    """What types a line whenever the agent takes one: idle, or busy where it queues."""
    return lambda agent, terminal: type_line(profile, text, agent, terminal, time.monotonic_ns() + _TRY_NS)


class Telling:
    """What one agent is told, and when it was last told something."""

    def __init__(self, start: Attempt, note: Callable[[str, str], None]) -> None:
        """`start` looks after a child; `note` writes a kind and a text for people and the journal."""
        self._start, self._note = start, note
        self._told_ns: int | None = None
        self._left_out = 0

    def tell(self, profile: Profile, pid: int, channel: str, text: str, now_ns: int) -> None:
        """Have it typed, unless something was a short while ago; returns at once."""
        if self._told_ns is not None and now_ns - self._told_ns < _AGAIN_NS:
            self._left_out += 1
            self._note("agent_not_told", "the agent is not told by its terminal: it was told something a moment ago")
            return
        more = f" {self._left_out} more were killed before: governor why tells." if self._left_out else ""
        line = told.typed(text + more)
        self._told_ns, self._left_out = now_ns, 0
        what = "telling the agent of a shed"
        self._start(lambda: start(profile, pid, channel, say(profile, line), WITHIN_NS, what), self._ended)

    def _ended(self, ended: Ended) -> None:
        why = ended.output.decode(errors="replace") or f"status {ended.status}"
        if ended.ok:
            self._note("agent_told", f"the agent was told by its terminal: {why}")
        else:
            self._note("agent_not_told", f"the agent was not told by its terminal: {why}")
