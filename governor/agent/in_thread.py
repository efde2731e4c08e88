"""Calls that may block, in a thread; not over before the thread is."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar, TypeVarTuple

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


async def in_thread(function: Callable[[*_Arguments], _Result], *arguments: *_Arguments) -> _Result:
    """As asyncio.to_thread(), which leaves its thread behind when it is cancelled.

    Who is cancelled closes its files: the thread would go on with their descriptors, which are soon another file's.
    """
    task = asyncio.ensure_future(asyncio.to_thread(function, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            try:
                await asyncio.wait([task])
            except asyncio.CancelledError:
                continue  # once more: the first one is raised below
        if not task.cancelled():
            task.exception()  # seen, or asyncio complains
        raise
