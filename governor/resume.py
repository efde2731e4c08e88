"""How an agent that governor or the kernel ended is brought back: what `governor run` is told to start next.

The guard writes the order, `governor run` reads it once both the agent and the guard have ended. Where the profile
knows no way to resume, or no session id could be read, there is no order, and nothing is started.
"""

from __future__ import annotations

import os
from pathlib import Path

import orjson

from governor.profile import Profile
from governor.profile_agent import Agent
from governor.profile_state import read_state_file

TERMINATED, OOM_KILLED = "terminated", "oom_killed"


def command(profile: Profile, agent: Agent) -> tuple[str, ...]:
    """The argv that goes on with the agent's session, as its state file names it; empty where that is not known."""
    wanted = profile.session.resume
    session = (
        read_state_file(profile.state_file, agent).session if any("{session}" in word for word in wanted) else "-"
    )
    return tuple(word.replace("{session}", session) for word in wanted) if session else ()


def order(path: str, how: str, why: str, argv: tuple[str, ...]) -> None:
    """Write it: `how` is TERMINATED or OOM_KILLED, `why` is for people. Raises OSError."""
    beside = Path(f"{path}.new")
    beside.unlink(missing_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(orjson.dumps({"how": how, "why": why, "command": argv}))
    beside.rename(path)
