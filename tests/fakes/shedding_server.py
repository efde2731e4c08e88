"""ASGI apps for uvicorn over the fixture tree that SHEDDING_TREE names: `app` with all parts, `probes` alone."""

from __future__ import annotations

import asyncio
import os

from governor.agent import MemoryPressure, Probes, ShedLoad
from governor.agent.container import Container

pressure = MemoryPressure(container=Container(root=os.environ["SHEDDING_TREE"]), governor=False, gives_back=False)
slow_ones: list[str] = []


async def answers(scope, receive, send) -> None:
    """/slow takes a second, /begun is 404 until one has begun; of a lifespan it knows nothing, as many apps."""
    assert scope["type"] == "http"
    if scope["path"] == "/slow":
        slow_ones.append("begun")
        await asyncio.sleep(1)
    status = 404 if scope["path"] == "/begun" and not slow_ones else 200
    await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"done"})


app = Probes(pressure, ShedLoad(answers, pressure, spared_paths=["/spared"]))
probes = Probes(pressure)
