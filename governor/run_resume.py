"""Whether and when `governor run` starts an agent's session again: only by the guard's order, and not for ever."""

from __future__ import annotations

import json
import os
import random
from typing import NamedTuple

_LIMIT_BYTES = 64 << 10
_KILLED_STATUS = 128 + 9
_BACKOFF_NS = (1_000_000_000, 4_000_000_000, 16_000_000_000, 60_000_000_000)  # each half as long to half again
_LASTED_NS = 300_000_000_000  # who lived so long has not failed to come back


class Order(NamedTuple):
    """What is to be started, and why, for people."""

    command: list[str]
    why: str


def take(path: str, status: int) -> Order | None:
    """The order that the guard has left, if it is about this end; it is gone then.

    `status` is the agent's: one that the kernel's OOM killer did not end by SIGKILL has ended for another reason.
    """
    if not path:
        return None
    try:
        with open(path, "rb") as file:  # noqa: PTH123  no pathlib here
            said = json.loads(file.read(_LIMIT_BYTES))
        os.unlink(path)  # noqa: PTH108
        if said["how"] == "oom_killed" and status != _KILLED_STATUS:
            return None
        return Order([str(word) for word in said["command"]], str(said["why"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def forget(path: str) -> None:
    """Nothing is resumed any more: remove what the guard has left for that."""
    for left in (path, f"{path}.turn", f"{path}.ended") if path else ():
        try:
            os.unlink(left)  # noqa: PTH108
        except OSError:
            continue


class Tries:
    """How often in a row a session was brought back and did not last."""

    def __init__(self) -> None:
        self.failures = 0
        self._began_ns = 0

    def begin(self, now_ns: int) -> None:
        """The agent is started."""
        self._began_ns = now_ns

    def wait_ns(self, now_ns: int) -> int | None:
        """The agent was ended, and is to come back: how long to wait before; None: not again."""
        if now_ns - self._began_ns >= _LASTED_NS:
            self.failures = 0
        if self.failures == len(_BACKOFF_NS):
            return None
        wait_ns = int(_BACKOFF_NS[self.failures] * random.uniform(0.5, 1.5))  # noqa: S311  no secret
        self.failures += 1
        return wait_ns
