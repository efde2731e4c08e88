"""An agent that says what governor.agent tells it: one JSON object a line, with the monotonic clock.

    watching_agent.py [--alone] [--seldom]

It warns from governor's own first level on. --alone: without governor's socket. --seldom: it looks every 30 s, so
that what it sees sooner the kernel has said.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

from governor.agent import Hooks, Levels, MemoryPressure, levels


def say(**about: object) -> None:
    print(json.dumps({"ns": time.monotonic_ns()} | about), flush=True)


async def compact(request) -> str:
    say(asked=request.what)
    return "as asked"


async def announced(announcement) -> None:
    say(announced=announcement.kind)


def crossed(crossing) -> None:
    say(crossed=crossing.level, rising=crossing.rising, at_ns=crossing.monotonic_ns)


async def watch() -> None:
    if "--seldom" in sys.argv:
        levels.LEAST_WORST_BYTES = 1
    hooks = Hooks(compact=compact, announced=announced, crossed=crossed)
    pressure = MemoryPressure(Levels(warning_ratio=0.70), hooks=hooks, governor="--alone" not in sys.argv)
    async with pressure:
        pressure.on_change(lambda change: say(status=str(change.after)))
        while "--alone" not in sys.argv and not pressure.hears_governor:
            await asyncio.sleep(0.02)
        say(ready=True)
        async for _ in pressure:
            pass


asyncio.run(watch())
