"""A turn that an agent's end cut off: asked for again once, in the resumed session, if the profile says how.

Two files beside the order to resume, PATH: PATH.ended names every session that was ended so far, one a line;
PATH.turn names the one whose turn is to be asked for again, and the process that was at it. So that nothing is asked
twice, the latter is removed before anything is typed, and a session that was ended before gets none; whoever dies in
between leaves a turn that nobody asks for.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress

from governor import telling
from governor.channels.terminal import Terminal
from governor.children import Child
from governor.delivery import Outcome, type_line
from governor.model import Status
from governor.policy import SECOND
from governor.profile import Profile
from governor.profile_agent import Agent
from governor.profile_state import State, look, read_state_file

_WITHIN_NS = 300 * SECOND  # from when the resumed agent is found until it is idle
_TRY_NS = 20 * SECOND
_LIMIT_BYTES = 64 << 10


def ended(path: str, profile: Profile, agent: Agent) -> bool:
    """The agent was ended, and is to be resumed: whether its turn is to be asked for again. Raises OSError.

    Only where its state file says that it was busy, for the first time that its session was ended.
    """
    found = read_state_file(profile.state_file, agent)
    if not (profile.session.resubmit and found.session):
        return False
    with suppress(FileNotFoundError):
        os.unlink(f"{path}.turn")  # noqa: PTH108
    was_ended = found.session in _read(f"{path}.ended").split()
    _write(f"{path}.ended", f"{found.session}\n", os.O_APPEND)
    if was_ended or found.state is not State.BUSY:
        return False
    _write(f"{path}.turn", f"{found.session} {agent.pid} {agent.start_ticks}\n", os.O_EXCL)
    return True


def pending(path: str, agent: Agent) -> str:
    """The session whose turn is to be asked for again, by an agent that was started since; "" for none."""
    session, _, process = _read(f"{path}.turn").strip().partition(" ")
    return "" if process == f"{agent.pid} {agent.start_ticks}" else session


def start(path: str, profile: Profile, pid: int, channel: str, session: str) -> Child:
    """Ask in a child, as telling.start() does; raises OSError: no child."""
    claimed = False

    def attempt(agent: Agent, terminal: Terminal) -> Outcome:
        nonlocal claimed
        seen = look(profile, agent, terminal.screen())
        wrong = ""
        if seen.session not in ("", session):
            wrong = f"it is in another session, {seen.session}"
        elif seen.state is State.BUSY and not claimed:
            wrong = "it is at work already"
        if not wrong and (seen.state is not State.IDLE or not seen.session):
            return Outcome(Status.DEFERRED, f"nothing typed: it is {seen.state.value}: {seen.why}")
        if not claimed and not claim(path):
            wrong = wrong or "it was asked for before"
        if wrong:
            return Outcome(Status.FAILED, wrong)
        claimed = True
        return type_line(profile, profile.session.resubmit, agent, terminal, time.monotonic_ns() + _TRY_NS)

    return telling.start(profile, pid, channel, attempt, _WITHIN_NS, "asking for a turn again")


def claim(path: str) -> bool:
    """Take the turn, so that nobody else asks for it; False where somebody else has."""
    try:
        os.unlink(f"{path}.turn")  # noqa: PTH108
    except OSError:
        return False
    return True


def _read(path: str) -> str:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            return os.read(fd, _LIMIT_BYTES).decode(errors="replace")
        finally:
            os.close(fd)
    except OSError:
        return ""


def _write(path: str, text: str, flags: int) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | flags, 0o600)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
