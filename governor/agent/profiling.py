"""Where this process's memory comes from, by tracemalloc: the most, what has grown, and whether it leaks.

    with Profiler(interval_s=1) as profiler:
        agent.warm_up()
        profiler.baseline()
        agent.work()
        print(profiler.report())

tracemalloc has its price. A program that does nothing but make small objects took 7 to 10 times as long with one of
the `frames` kept, 20 to 40 times with ten, and as much memory again. What C libraries allocate by themselves it does
not see: so RSS is sampled, too.
"""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import psutil

from governor.agent.leak import Leak, Sample, judge

By = Literal["lineno", "traceback"]
_SAMPLES_LIMIT = 4096
_NOT_OURS = [tracemalloc.Filter(False, name) for name in (tracemalloc.__file__, __file__, "<frozen importlib*>")]

_RUNNER = frozenset({str(Path(__file__).with_name("__main__.py")), "<frozen runpy>"})


@dataclass(frozen=True, slots=True)
class Place:
    """Where memory that is alive was allocated; `frames` are `file:line`, the innermost last."""

    size_bytes: int
    growth_bytes: int  # since the baseline
    count: int
    frames: tuple[str, ...]

    def __str__(self) -> str:
        line = f"{_mib(self.size_bytes)} in {self.count:,} blocks, {_mib(self.growth_bytes, '+')}  {self.frames[-1]}"
        return "\n".join([line, *(f"{'':12}from {frame}" for frame in reversed(self.frames[:-1]))])


class Profiler:
    """Traces from start() on; with `interval_s` a thread takes the samples for the verdict."""

    def __init__(self, frames: int = 1, interval_s: float = 0.0) -> None:
        self._frames, self._interval_s = frames, interval_s
        self._traced: deque[Sample] = deque(maxlen=_SAMPLES_LIMIT)
        self._rss: deque[Sample] = deque(maxlen=_SAMPLES_LIMIT)
        self._process = psutil.Process()
        self._baseline: tracemalloc.Snapshot | None = None
        self._ended = threading.Event()
        self._sampler = threading.Thread(target=self._sample_on, name="governor-profiler", daemon=True)
        self._starts = False

    def start(self) -> None:
        """Begin; what was allocated before is not seen."""
        if not tracemalloc.is_tracing():
            self._starts = True
            tracemalloc.start(self._frames)
        if self._interval_s:
            self._sampler.start()

    def stop(self) -> None:
        """End; what was traced is forgotten."""
        self._ended.set()
        if self._sampler.is_alive():
            self._sampler.join()
        if self._starts:
            tracemalloc.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def sample(self) -> None:
        """How much is in use now."""
        now_s = time.monotonic()
        self._traced.append((now_s, tracemalloc.get_traced_memory()[0]))
        self._rss.append((now_s, self._process.memory_info().rss))

    def baseline(self) -> None:
        """Growth counts from here."""
        self._baseline = _snapshot()
        self._traced.clear()
        self._rss.clear()

    def top(self, count: int = 10, by: By = "lineno") -> list[Place]:
        """Where most of what is alive comes from."""
        return self._places(by, count, lambda place: place.size_bytes)

    def growth(self, count: int = 10, by: By = "lineno") -> list[Place]:
        """Where most of what has come since the baseline comes from; without one, since the start."""
        return [
            place for place in self._places(by, count, lambda place: place.growth_bytes) if place.growth_bytes > 0
        ]

    def leak(self) -> Leak:
        """Of what Python allocates."""
        return judge(list(self._traced))

    def rss_leak(self) -> Leak:
        """Of the whole process, C libraries included; less sharp: what is freed is not always returned."""
        return judge(list(self._rss), min_growth_bytes=1 << 20)

    def report(self, count: int = 10, by: By = "lineno") -> str:
        """All of it, for people."""
        in_use_bytes, peak_bytes = tracemalloc.get_traced_memory()
        leak, rss, rss_bytes = self.leak(), self.rss_leak(), self._process.memory_info().rss
        lines = [
            f"traced: {_mib(in_use_bytes)} in use, at most {_mib(peak_bytes)}; RSS {_mib(rss_bytes)}",
            f"Python's memory: {leak.verdict.value} ({leak.confidence:.1%} sure that it grows; {leak.why})",
            f"the process's: {rss.verdict.value} ({rss.confidence:.1%} sure that it grows; {rss.why})",
            "grown most since the baseline:",
            *(f"  {place}" for place in self.growth(count, by)),
            "most in use:",
            *(f"  {place}" for place in self.top(count, by)),
        ]
        return "\n".join(lines)

    def _places(self, by: By, count: int, key: Callable[[Place], int]) -> list[Place]:
        found = _snapshot()
        before = self._baseline.statistics(by) if self._baseline else []
        earlier_bytes = {statistic.traceback: statistic.size for statistic in before}
        places = [
            Place(
                each.size,
                each.size - earlier_bytes.get(each.traceback, 0),
                each.count,
                _frames(each.traceback),
            )
            for each in found.statistics(by)
        ]
        return sorted(places, key=key, reverse=True)[:count]

    def _sample_on(self) -> None:
        while not self._ended.wait(self._interval_s):
            self.sample()


def _frames(traceback: tracemalloc.Traceback) -> tuple[str, ...]:
    """Without what `python -m governor.agent profile` itself adds."""
    own = [frame for frame in traceback if frame.filename not in _RUNNER]
    return tuple(f"{frame.filename}:{frame.lineno}" for frame in own or traceback)


def _snapshot() -> tracemalloc.Snapshot:
    gc.collect()
    return tracemalloc.take_snapshot().filter_traces(_NOT_OURS)


def _mib(size_bytes: int, sign: str = "") -> str:
    return f"{size_bytes / (1 << 20):{sign}.2f} MiB"
