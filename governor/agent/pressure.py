"""MemoryPressure: how near this agent's container is to its end, and who is told when that changes.

    async with MemoryPressure() as pressure:
        async for change in pressure:
            if change.after >= Status.SHEDDING:
                cache.clear()

Looks by itself, the more often the nearer; at once when the kernel counts in `memory.events` (v2), and when a
governor that runs here hears a crossing. Who asks (`status`, `accepting()`) while a look is overdue looks itself: so
it is right in a blocked event loop, in threads and in a program without one, too. Callbacks, `async for`, the
collection on critical and governor's requests need `async with`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from governor.agent.container import Container, Reading
from governor.agent.heap import Freed, give_back
from governor.agent.hearing import Crossing, Hearing, Hooks, NoGovernor, socket_paths
from governor.agent.levels import INTERVAL_MIN_S, Levels, Pace, Status
from governor.agent.memory_events import MemoryEvents

_AGAIN_MIN_S, _AGAIN_MAX_S = 1.0, 30.0  # between two collections while it stays critical
_ALERT_S = 0.5  # after a crossing that governor heard
_COUNTED_GAP_S = 0.1  # a memcg that is full of page cache counts in memory.events a hundred times a second
_BLIND_S = 1.0  # after a look that failed
_RECONNECT_MIN_S, _RECONNECT_MAX_S = 0.5, 10.0
_log = logging.getLogger("governor.agent")


@dataclass(frozen=True, slots=True)
class Change:
    """The status is another one."""

    before: Status
    after: Status
    reading: Reading


Callback = Callable[[Change], Awaitable[None] | None]


class MemoryPressure:
    """The watch over this process's container."""

    def __init__(
        self,
        levels: Levels | None = None,
        *,
        hooks: Hooks | None = None,
        limit_bytes: int | None = None,
        gives_back: bool = True,
        governor: bool = True,
        container: Container | None = None,
    ) -> None:
        """`limit_bytes` replaces MEMORY_LIMIT_MB; `gives_back`: collect and trim on critical; `governor`: hear one.

        Raises ValueError for a bad MEMORY_LIMIT_MB, OSError where there is no /proc.
        """
        self.levels = levels or Levels()
        self.last_freed: Freed | None = None
        self._container = container or Container(limit_bytes)
        self._hearing = Hearing(hooks or Hooks())
        self._gives_back, self._listens = gives_back, governor
        self._pace = Pace(self.levels)
        self._callbacks: dict[Callback, asyncio.Task[None] | None] = {}  # of a coroutine function: what calls it
        self._entered = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._look_again = asyncio.Event()
        self._changed = asyncio.Event()
        self._status = self._told = Status.OK
        self._reading = self._container.look()
        self._is_blind = False
        self._due_s = self._alert_until_s = 0.0
        self.look()

    @property
    def reading(self) -> Reading:
        """The last look, or a new one if that is overdue."""
        if time.monotonic() >= self._due_s:
            self.look()
        return self._reading

    @property
    def ratio(self) -> float:
        """Share of the limit that cannot be reclaimed."""
        return self.reading.ratio

    @property
    def status(self) -> Status:
        """ok, warning, shedding or critical; of the last look, or of a new one if that is overdue."""
        if time.monotonic() >= self._due_s:
            self.look()
        return self._status

    @property
    def hears_governor(self) -> bool:
        """Whether a governor is listened to now."""
        return self._hearing.is_connected

    def accepting(self) -> bool:
        """Whether to begin new work: not from shedding on. Costs a look at most, mostly only a clock."""
        return self.status < Status.SHEDDING

    def look(self) -> Reading:
        """Look now, whatever the pace. Where that cannot be (no descriptor is left), the last reading stands."""
        now_s = time.monotonic()
        try:
            reading = self._container.look()
        except OSError as error:
            self._say_blind(error)
            self._due_s = now_s + _BLIND_S
            return self._reading
        self._is_blind = False
        now_s = time.monotonic()
        wait_s = self._pace.next_s(reading.unreclaimable_bytes, reading.max_bytes, now_s, reading.bound_by)
        self._due_s = now_s + wait_s
        self._reading = reading
        status = self.levels.status(reading.ratio, self._status)
        if status is not self._status:
            self._status = status
            if self._loop:
                self._loop.call_soon_threadsafe(self._tell)
        return reading

    def _say_blind(self, error: OSError) -> None:
        if not self._is_blind:
            _log.warning("cannot look at memory, the last reading stands meanwhile: %s", error)
        self._is_blind = True

    def on_change(self, callback: Callback) -> Callable[[], None]:
        """Have it called at each change while the watch is entered; returns what ends that.

        A plain function is called in the event loop, before anybody else hears; it must not take long. A coroutine
        function may: what changes meanwhile it is told as one change.
        """
        self._callbacks[callback] = None
        if self._loop:
            self._begin(callback)

        def end() -> None:
            if task := self._callbacks.pop(callback, None):
                task.cancel()

        return end

    async def __aiter__(self) -> AsyncIterator[Change]:
        """Each change from ok on, until the watch is left; who is slow hears several as one."""
        seen = Status.OK
        while self._loop:
            changed = self._changed
            if self._told is seen:
                await changed.wait()
            else:
                change = Change(seen, self._told, self._reading)
                seen = change.after
                yield change

    async def wait_until_accepting(self) -> None:
        """Until new work may begin."""
        while not self.accepting():
            changed = self._changed
            await _wait(changed, self._due_s - time.monotonic())

    async def __aenter__(self) -> MemoryPressure:
        """May be entered several times, in one event loop."""
        self._entered += 1
        if self._entered == 1:
            self._loop = asyncio.get_running_loop()
            self._look_again, self._changed, self._told = asyncio.Event(), asyncio.Event(), Status.OK
            work = [self._watch(), *([self._give_back()] if self._gives_back else [])]
            work += [self._hear()] if self._listens else []
            self._tasks = [asyncio.create_task(one) for one in work]
            for task in self._tasks:
                task.add_done_callback(_log_failure)
            for callback in list(self._callbacks):
                self._begin(callback)
            self._tell()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._entered -= 1
        if self._entered == 0:
            self._loop = None
            self._changed.set()  # iterators end
            tasks = [*self._tasks, *self._hearing.tasks, *(task for task in self._callbacks.values() if task)]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, callback: Callback) -> None:
        if inspect.iscoroutinefunction(callback) or inspect.iscoroutinefunction(type(callback).__call__):
            self._callbacks[callback] = asyncio.create_task(self._call_each(callback))

    async def _call_each(self, callback: Callback) -> None:
        async for change in self:
            try:
                if waiting := callback(change):
                    await waiting
            except Exception:  # noqa: BLE001  the agent's own code: its fault must not end the watch
                _log.exception("a callback failed at %s", change.after)

    def _tell(self) -> None:
        """In the event loop: the plain callbacks, and whoever waits."""
        change = Change(self._told, self._status, self._reading)
        if change.before is change.after:
            return
        self._told = change.after
        for callback, task in list(self._callbacks.items()):
            if task is None:
                try:
                    callback(change)
                except Exception:  # noqa: BLE001  as above
                    _log.exception("a callback failed at %s", change.after)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def _watch(self) -> None:
        while True:
            try:
                await self._look_when_due()
            except OSError as error:  # no descriptor to wait with
                self._say_blind(error)
                await asyncio.sleep(_BLIND_S)

    async def _look_when_due(self) -> None:
        loop = asyncio.get_running_loop()
        events = MemoryEvents()
        resume = loop.call_soon(lambda: None)

        def counted() -> None:
            nonlocal resume
            events.read()
            self._look_again.set()
            loop.remove_reader(events.fileno())
            resume = loop.call_later(_COUNTED_GAP_S, loop.add_reader, events.fileno(), counted)

        loop.add_reader(events.fileno(), counted)
        try:
            while True:
                self._look_again.clear()
                events.follow(self._container.events_paths())  # again: it may be moved, or one could not be opened
                self.look()
                now_s = time.monotonic()
                due_s = min(self._due_s, now_s + INTERVAL_MIN_S) if now_s < self._alert_until_s else self._due_s
                await _wait(self._look_again, due_s - now_s)
        finally:
            resume.cancel()
            loop.remove_reader(events.fileno())
            events.close()

    async def _give_back(self) -> None:
        """While it is critical again and again, as callbacks may let go of more; less and less often."""
        wait_s = _AGAIN_MIN_S
        while True:
            changed = self._changed
            if self._told is Status.CRITICAL:
                try:
                    self.last_freed = give_back()
                except OSError as error:  # before it began, or after
                    self._say_blind(error)
                else:
                    freed_bytes = self.last_freed.freed_bytes
                    _log.info("critical: gave back %d bytes, ratio now %.3f", freed_bytes, self.look().ratio)
            else:
                wait_s = _AGAIN_MIN_S
            await _wait(changed, wait_s if self._told is Status.CRITICAL else None)
            wait_s = min(_AGAIN_MAX_S, wait_s * 2)

    async def _hear(self) -> None:
        wait_s = _RECONNECT_MIN_S
        while True:
            try:
                paths = socket_paths([memcg.path for memcg in self._container.memcgs()], self._container.root)
            except OSError as error:
                self._say_blind(error)
                paths = []
            for path in paths:
                try:
                    if await self._hearing.hear(path, self._crossed):
                        wait_s = _RECONNECT_MIN_S
                except (OSError, NoGovernor) as error:
                    _log.info("no governor to hear at %s: %s", path, error)
            await asyncio.sleep(wait_s)
            wait_s = min(_RECONNECT_MAX_S, wait_s * 2)

    def _crossed(self, crossing: Crossing) -> None:
        """governor's figure is an upper bound, a little early: look, and for a moment as often as can be."""
        if crossing.rising:
            self._alert_until_s = time.monotonic() + _ALERT_S
        self._look_again.set()


async def _wait(event: asyncio.Event, within_s: float | None) -> None:
    """Not wait_for(): in Python 3.11 it goes on where a task is cancelled just as the event comes."""
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            await event.wait()


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("the watch over memory ended", exc_info=error)
