"""One run of `governor watch`: looks when that is due, shows what was seen, ends when it was told to.

As a picture where there is a terminal that can show one, else as lines. Ctrl-C, SIGTERM, q and the end of --for all
end it in the same way: with a summary.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from governor import watch_lines
from governor.journal import printable
from governor.poller import Poller
from governor.watch_keys import Key
from governor.watch_model import SECOND_NS, Entry
from governor.watch_one import One
from governor.watch_overview import Many
from governor.watch_target import Target, Unknown

if TYPE_CHECKING:
    from governor.watch_screen import Screen

ONCE_NS = 400_000_000  # from the first look to the one that is told: growth needs two, a governor a moment to answer
LEVEL_STATUS = {"below": 0, "compact": 10, "arm": 20, "brake": 30, "last": 40}
HELD_STATUS = 50
_AGAIN_NS = 5 * SECOND_NS  # between two looks for a memcg that follows one that is gone
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WIDE = 10_000  # columns of what is no terminal


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the command line asks for."""

    targets: Sequence[Target]  # none: all
    source: str = "auto"
    as_json: bool = False
    as_lines: bool = False
    ascii_only: bool = False
    once: bool = False
    for_ns: int | None = None
    until_crossing: bool = False
    again: Callable[[], Sequence[Target]] = tuple  # what the TARGET means by now; raises Unknown


class Session:
    """The view, what shows it, and what ends it."""

    def __init__(self, wanted: Wanted) -> None:
        """Raises OSError when a target is no memcg that may be read."""
        self._wanted = wanted
        self._poller = Poller()
        self._screen: Screen | None = None
        self._crossed = ""
        self._again_ns = 0
        self._ended = self._holds = False
        self._many: Many | None = None
        self._one: One | None = None
        if len(wanted.targets) == 1:
            self._one = self._open(wanted.targets[0])
        else:
            self._many = Many(self._poller, wanted.targets, self._on_entry)

    @property
    def _view(self) -> One | Many:
        view = self._one or self._many
        assert view
        return view

    def run(self) -> int:
        """Until it is over; the exit status."""
        before = {number: signal.signal(number, signal.default_int_handler) for number in _ENDING}
        status = 1 if self._wanted.until_crossing else 0
        try:
            with suppress(KeyboardInterrupt):
                if shows_picture(self._wanted):
                    from governor.watch_screen import Screen

                    self._screen = Screen(self._poller, self._wanted.ascii_only, self._on_key)
                status = self._loop()
        except (EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.EPIPE, errno.EIO):
                raise
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody is there any more to be told
        finally:
            for number in _ENDING:
                signal.signal(number, signal.SIG_IGN)  # the second Ctrl-C would leave programs loaded
            told = self._end_lines()
            for view in (self._one, self._many):
                if view:
                    view.close()
            interrupted = before.pop(signal.SIGINT)
            for number, handler in before.items():
                signal.signal(number, handler)  # who does not read must not keep us
            if self._screen:
                self._screen.close()
                self._screen = None
            signal.signal(signal.SIGINT, interrupted)  # the second Ctrl-C would leave the terminal as it is
            with suppress(OSError):
                sys.stdout.write("".join(f"{line}\n" for line in told))
                sys.stdout.flush()
        return status

    def _loop(self) -> int:
        began_ns = time.monotonic_ns()
        limit_ns = ONCE_NS if self._wanted.once else self._wanted.for_ns
        while not self._ended:
            now_ns = time.monotonic_ns()
            is_over = limit_ns is not None and now_ns - began_ns >= limit_ns
            view = self._view
            if now_ns >= view.due_ns or (is_over and self._wanted.once):
                view.turn(now_ns)
                self._looked(view, now_ns, is_over)
            if self._crossed or is_over or (isinstance(view, One) and view.model.gone and not self._screen):
                break
            if isinstance(view, One) and view.model.gone and not self._many and now_ns >= self._again_ns:
                self._again_ns = now_ns + _AGAIN_NS
                self._follow(view)
            due_ns = view.due_ns
            if self._screen:
                self._screen.turn(view, time.monotonic_ns(), self._holds, self._many is not None)
                due_ns = min(due_ns, self._screen.due_ns)
            if limit_ns is not None:
                due_ns = min(due_ns, began_ns + limit_ns)
            self._poller.wait(due_ns - time.monotonic_ns())
        return self._status()

    def _follow(self, gone: One) -> None:
        """A container or a unit that was started again: the memcg that has its name now, below the same log."""
        with suppress(Unknown, OSError):
            for target in self._wanted.again()[:1]:
                self._one = self._open(target)
                self._one.model.log.extend(gone.model.log)
                gone.close()

    def _looked(self, view: One | Many, now_ns: int, is_last: bool) -> None:
        if self._screen:
            self._screen.is_stale = not self._holds
            return
        if (self._wanted.once and not is_last) or (now_ns - view.told_ns < 0.9 * SECOND_NS and not is_last):
            return  # looked sooner than once a second, for what is near
        view.told_ns = now_ns
        time_s = time.time()
        if isinstance(view, Many):
            for row in view.rows:
                fields = watch_lines.row_fields(row) if self._wanted.as_json else {}
                self._print("sample", row.target, time_s, fields, watch_lines.row_text(row, time_s))
            return
        picture = view.model.picture(time_s)
        if picture.sample:
            fields = watch_lines.sample_fields(picture) if self._wanted.as_json else {}
            self._print("sample", view.target, time_s, fields, watch_lines.sample_text(picture))

    def _on_entry(self, entry: Entry) -> None:
        if self._wanted.until_crossing and entry.kind == "crossing" and entry.fields.get("rising"):
            self._crossed = str(entry.fields["level"])
        if self._screen:
            self._screen.is_stale = not self._holds
        elif not self._wanted.once or self._wanted.as_json:
            kind, fields = watch_lines.entry_fields(entry)
            target = self._one.target if self._one else None
            self._print(kind, target, entry.time_s, fields, watch_lines.entry_text(entry))

    def _print(self, kind: str, target: Target | None, time_s: float, fields: dict[str, Any], text: str) -> None:
        line = watch_lines.encode(kind, target, time_s, fields) if self._wanted.as_json else text
        sys.stdout.write(line + "\n")
        sys.stdout.flush()

    def _end_lines(self) -> list[str]:
        if self._wanted.once:
            return []
        if self._one is None:
            if self._wanted.as_json or not self._many:
                return []
            return [textwrap.fill(printable(self._many.summary(time.monotonic_ns())), _columns())]
        seen = self._one.model.summary()
        if self._wanted.as_json:
            return [watch_lines.encode("end", self._one.target, time.time(), asdict(seen))]
        return [textwrap.fill(line, _columns()) for line in watch_lines.summary_text(seen)]

    def _status(self) -> int:
        if self._wanted.until_crossing:
            return LEVEL_STATUS[self._crossed] if self._crossed else 1
        if not self._wanted.once:
            return 0
        if isinstance(self._view, One):
            if self._view.model.gone:
                return 1
            picture = self._view.model.picture(0)
            return max(LEVEL_STATUS[picture.level], _held(picture.standing))
        rows = self._view.rows
        return max((max(LEVEL_STATUS[watch_lines.level_of_row(row)], _held(row.standing)) for row in rows), default=0)

    # Keys

    def _on_key(self, key: Key) -> None:
        many, screen = self._many, self._screen
        if key is Key.QUIT:
            self._ended = True
        elif key is Key.HOLD:
            self._holds = not self._holds
        elif self._one and many and screen and key is Key.BACK:
            self._one.close()
            self._one, self._holds = None, False
            screen.clear()
        elif self._one is None and many and screen and not self._holds:
            if key is Key.SORT:
                many.sort_next()
            elif key in (Key.UP, Key.DOWN):
                many.select(many.selected + (1 if key is Key.DOWN else -1))
            elif key is Key.OPEN and many.rows:
                with suppress(OSError):  # gone meanwhile
                    self._one = self._open(many.rows[many.selected].target)
                    screen.clear()

    def _open(self, target: Target) -> One:
        return One(target, self._poller, self._wanted.source, self._on_entry, self._wanted.once)


def shows_picture(wanted: Wanted) -> bool:
    """Whether there is a terminal that can show one, and nothing else was asked for."""
    plain = wanted.as_json or wanted.as_lines or wanted.once
    return not plain and sys.stdout.isatty() and os.environ.get("TERM", "") not in ("", "dumb", "unknown")


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or _WIDE
    except OSError:
        return _WIDE


def _held(standing: Any) -> int:
    if not standing:
        return 0
    is_held = standing.get("frozen_for_ms") is not None or standing.get("phase") in ("held", "terminating")
    return HELD_STATUS if is_held else 0
