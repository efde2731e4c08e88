"""Memory that this process does not need any more, given back to the kernel: garbage collected, the heap trimmed."""

from __future__ import annotations

import ctypes
import gc
import time
from dataclasses import dataclass

from governor.agent.container import own_rss_bytes


@dataclass(frozen=True, slots=True)
class Freed:
    """What it brought: by RSS of this process, which others of its threads go on changing meanwhile."""

    collected: int  # objects that were found unreachable
    before_bytes: int
    after_bytes: int
    trimmed: bool  # False: a C library without malloc_trim
    took_s: float

    @property
    def freed_bytes(self) -> int:
        """Never negative."""
        return max(0, self.before_bytes - self.after_bytes)


def give_back() -> Freed:
    """Collect all generations and call malloc_trim; both stop this thread, for some ms per 100,000 objects.

    To be called in the thread whose objects may be finalised there: an event loop's own.
    """
    begun_s = time.monotonic()
    before_bytes = own_rss_bytes()
    collected = gc.collect()
    trimmed = trim()
    return Freed(collected, before_bytes, own_rss_bytes(), trimmed, time.monotonic() - begun_s)


def trim() -> bool:
    """Free pages of glibc's heaps, those in their midst too, go back to the kernel; False where it cannot."""
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except AttributeError:
        return False
    malloc_trim(ctypes.c_size_t(0))
    return True
