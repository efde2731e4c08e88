"""Whether and when `governor run` starts an agent's session again: only by the guard's order, and not for ever."""

from __future__ import annotations

import json
import os
import random
import time
from typing import NamedTuple

_LIMIT_BYTES = 64 << 10
_STATUSES = {"oom_killed": 128 + 9, "late": 128 + 15}
_FRESH_S = 600  # from the order to the end: more than a grace and the last archive take
_BACKOFF_NS = (1_000_000_000, 4_000_000_000, 16_000_000_000, 60_000_000_000)  # each half as long to half again
_LASTED_NS = 300_000_000_000  # who lived so long has not failed to come back


class Order(NamedTuple):
    """What is to be started, and why, for people; before it `compacting`, if any, for so long at most."""

    how: str
    command: list[str]
    why: str
    compacting: list[str] = []  # noqa: RUF012  never changed
    within_s: float = 0
    refused: list[str] = []  # noqa: RUF012  expressions over what the compaction says

    def given(self, options: list[str]) -> Order:
        """With these words in the place of "{options}"."""
        command, compacting = (
            [each for word in words for each in (options if word == "{options}" else [word])]
            for words in (self.command, self.compacting)
        )
        return self._replace(command=command, compacting=compacting)

    @property
    def is_recycle(self) -> bool:
        """Whether the agent was ended to be compacted, and not because it had to be."""
        return self.how in ("recycled", "late")

    @property
    def may_be_large(self) -> bool:
        """Whether the session itself may have filled memory; a kill by the kernel may have been a tool's fault."""
        return self.how != "oom_killed"


def take(path: str, status: int) -> Order | None:
    """The order that the guard has left, if it is about this end; it is gone then.

    One of long ago was about somebody else's end. `status` is the agent's: one that the kernel's OOM killer did not
    end by SIGKILL has ended for another reason, as has one that should end for a recycle, was late, and did not end
    by SIGTERM.
    """
    if not path:
        return None
    try:
        with open(path, "rb") as file:  # noqa: PTH123  no pathlib here
            age_s = time.time() - os.fstat(file.fileno()).st_mtime
            said = json.loads(file.read(_LIMIT_BYTES))
        os.unlink(path)  # noqa: PTH108
        if _STATUSES.get(said["how"], status) != status or abs(age_s) > _FRESH_S:
            return None
        command, compacting, refused = (
            list(map(str, said.get(key, ()))) for key in ("command", "compacting", "refused")
        )
        return (
            Order(said["how"], command, str(said["why"]), compacting, float(said.get("within_s", 0)), refused)
            if command
            else None
        )
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

    def wait_ns(self, now_ns: int, is_recycle: bool = False) -> int | None:
        """The agent was ended, and is to come back: how long to wait before; None: not again.

        One that is recycled has not failed: that it does not happen again and again is the ladder's business.
        """
        if is_recycle:
            return 0
        if now_ns - self._began_ns >= _LASTED_NS:
            self.failures = 0
        if self.failures == len(_BACKOFF_NS):
            return None
        wait_ns = int(_BACKOFF_NS[self.failures] * random.uniform(0.5, 1.5))  # noqa: S311  no secret
        self.failures += 1
        return wait_ns
