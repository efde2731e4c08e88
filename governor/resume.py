"""How an agent that governor or the kernel ended is brought back: what `governor run` is told to start next.

The guard writes the order, `governor run` reads it once both the agent and the guard have ended. Where the profile
knows no way to resume, or no session id could be read, there is no order, and nothing is started.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Literal

import orjson

from governor.policy import SECOND
from governor.profile import Profile
from governor.profile_agent import Agent
from governor.profile_state import read_state_file

TERMINATED, OOM_KILLED, RECYCLED = "terminated", "oom_killed", "recycled"
LATE = "late"  # RECYCLED, and the agent did not end in time: counts only if it ends by SIGTERM
_LIMIT_BYTES = 64 << 10


def command(
    profile: Profile, agent: Agent, what: Literal["resume", "compact_stopped"] = "resume", program: str = ""
) -> tuple[str, ...]:
    """The argv that goes on with the agent's session, or compacts it once the agent has ended.

    The session is as its state file names it; where that is not known there is none: (). So where the program is not
    to be found; `program` is what `governor run` was given, and stands for one of the same name.
    """
    wanted = profile.session.resume if what == "resume" else profile.session.compact_stopped
    session = (
        read_state_file(profile.state_file, agent).session if any("{session}" in word for word in wanted) else "-"
    )
    argv = tuple(word.replace("{session}", session) for word in wanted) if session else ()
    if argv and os.path.basename(argv[0]) == os.path.basename(program):  # noqa: PTH119  no paths of ours
        argv = (program, *argv[1:])
    return argv if argv and shutil.which(argv[0]) else ()


def order_session(
    path: str, how: str, why: str, profile: Profile, agent: Agent, program: str, compacting_ns: int
) -> bool:
    """Order that an agent's session goes on, compacted before where that is known and `compacting_ns` gives it time.

    False, and no order, where it is not known how: for a recycle nor where it cannot be compacted. Raises OSError.
    """
    argv = command(profile, agent, "resume", program)
    compacting = command(profile, agent, "compact_stopped", program) if compacting_ns else ()
    if not argv or (how == RECYCLED and not compacting):
        return False
    order(path, how, why, argv, compacting, compacting_ns / SECOND, profile.session.compact_refused)
    return True


def order(
    path: str,
    how: str,
    why: str,
    argv: tuple[str, ...],
    compacting: tuple[str, ...] = (),
    within_s: float = 0,
    refused: tuple[str, ...] = (),
) -> None:
    """Write it: `how` is TERMINATED, OOM_KILLED or RECYCLED, `why` is for people. Raises OSError.

    `compacting` is run before, for so long at most; it was not done where what it says matches one of `refused`.
    """
    more = {"compacting": compacting, "within_s": within_s, "refused": refused}
    _write(path, {"how": how, "why": why, "command": argv} | more)


def loosen(path: str) -> None:
    """Make an order of a recycle that the agent did not follow in time one of a late end, if there is one."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        with Path(path).open("rb") as file:
            told = orjson.loads(file.read(_LIMIT_BYTES))
        if told["how"] == RECYCLED:
            _write(path, told | {"how": LATE})


def withdraw(path: str) -> None:
    """Nothing is to be started."""
    with suppress(OSError):
        Path(path).unlink()


def _write(path: str, told: dict[str, object]) -> None:
    beside = Path(f"{path}.new")
    beside.unlink(missing_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(orjson.dumps(told))
    beside.rename(path)
