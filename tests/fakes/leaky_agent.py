"""An asyncio agent that leaks: each request leaves 256 KiB in a cache, for more requests than its container can hold.

    leaky_agent.py REQUESTS [--protected]

With --protected it asks governor.agent before each request, and lets go of its cache when load is shed. Prints what
became of it as one JSON object.
"""

from __future__ import annotations

import asyncio
import json
import sys

LEAK_BYTES = 256 << 10


async def serve(requests: int, protected: bool) -> dict[str, object]:
    cache: list[bytearray] = []
    about: dict[str, object] = {"served": 0, "refused": 0, "recovered": 0, "highest": 0.0}

    async def request() -> None:
        cache.append(bytearray(b"1") * LEAK_BYTES)
        about["served"] += 1
        await asyncio.sleep(0.001)

    if not protected:
        for _ in range(requests):
            await request()
        return about

    from governor.agent import MemoryPressure, Overloaded, Status, sheds

    async with MemoryPressure() as pressure:

        async def on_change(change) -> None:
            if change.after >= Status.SHEDDING:
                await asyncio.sleep(0.05)  # what an agent does before it can let go
                cache.clear()
            elif change.before >= Status.SHEDDING:
                about["recovered"] += 1

        pressure.on_change(on_change)
        shedding = sheds(pressure)(request)
        while about["served"] < requests:
            try:
                await shedding()
            except Overloaded:
                about["refused"] += 1
                await asyncio.sleep(0.005)
            about["highest"] = max(about["highest"], pressure.ratio)
        return about | {"bound_by": pressure.reading.bound_by}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(serve(int(sys.argv[1]), "--protected" in sys.argv))))
