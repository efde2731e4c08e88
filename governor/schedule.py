"""Which of many is due, and when the next one will be. Pure; imported by the real-time process."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import Generic, TypeVar

Key = TypeVar("Key", int, str)


class Schedule(Generic[Key]):
    """A time for each of some things; finding the earliest does not look at all of them."""

    def __init__(self) -> None:
        self._at: dict[Key, int] = {}
        self._heap: list[tuple[int, Key]] = []  # with times that were given before among them

    def set(self, key: Key, at_ns: int) -> None:
        """It is due then, and no more when it was to be before."""
        if self._at.get(key) != at_ns:
            self._at[key] = at_ns
            heapq.heappush(self._heap, (at_ns, key))

    def drop(self, key: Key) -> None:
        """It is never due any more."""
        self._at.pop(key, None)

    def due(self, now_ns: int) -> Iterator[Key]:
        """Whatever is due, each once and no more until its time is set again; earliest first."""
        while (next_ns := self.next_ns()) is not None and next_ns <= now_ns:
            _, key = heapq.heappop(self._heap)
            del self._at[key]
            yield key

    def next_ns(self) -> int | None:
        """When the next one is due; None where there is none."""
        while self._heap and self._at.get(self._heap[0][1]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None
