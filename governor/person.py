"""Shows a person a line where the agent is: on the status line of tmux, or by `governor run` at its terminal.

Where that is comes from the agent's own environment and ancestors, found while it lives: nobody has to configure it.
All of it is a hint from somebody hostile: tmux is asked as channels.tmux does it, and shows nothing in a pane that is
not the agent's or that of what started it. Nothing is typed. The work is done in a child with a deadline; while one
runs, what else is to be shown waits, and is shown with the next.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from governor import instance
from governor.channels.terminal import ChannelError
from governor.children import Attempt, Ended, fork
from governor.journal import printable
from governor.policy import SECOND
from governor.profile_agent import is_in_our_namespaces
from governor.session_files import environment_of
from governor.subtree import ancestors, read_stat
from governor.tiers import since

_FOR_MS = 5000  # so long tmux shows it, or until a key is pressed
_DEADLINE_NS = 10 * SECOND
_WAITING = 4
_AGAIN_NS = 10 * SECOND  # from one of a kind to the next
_EACH = ("warning", "warning_over", "terminating")
_TEXT_LIMIT = 600


class Places(NamedTuple):
    """Where a person may be; `terminals` are device numbers: the agent's and those of what started it."""

    socket: str = ""  # of a tmux server
    pane: str = ""
    uid: int = 0
    terminals: tuple[int, ...] = ()
    controls: tuple[str, ...] = ()  # control sockets of every `governor run` above it


def places(pid: int, channel: str = "") -> Places:
    """Where the user of an agent may be; `channel` is its terminal as delivery.open_terminal has it."""
    chain = ancestors(pid)
    kind, _, where = channel.partition(":")
    socket, _, pane = where.partition(":")
    is_here = is_in_our_namespaces(pid)
    if kind != "tmux" and is_here:  # others may let whoever reads their environment wait
        socket, pane = environment_of(pid, "TMUX").partition(",")[0], environment_of(pid, "TMUX_PANE")
        pane = pane if re.fullmatch(r"%[0-9]{1,9}", pane) else ""
    try:
        uid = os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116  no path of ours
        runs = [instance.run_directory() / f"run-{above}.sock" for above in chain]
    except OSError:
        return Places()
    if not (socket.startswith("/") and pane and is_here):
        socket = pane = ""
    terminals = tuple({stat.terminal for above in chain if (stat := read_stat(above)) and stat.terminal})
    controls = tuple(str(path) for path in runs if path.exists() and not _shares_our_standard_error(path))
    return Places(socket, pane, uid, terminals, controls)


def show(places: Places, text: str) -> str:
    """Show it at the first place that takes it, and say where; raises ChannelError with what each said instead."""
    refused = []
    if places.socket:
        from governor.channels.tmux import TmuxTerminal  # only the child needs it

        for device in places.terminals:
            try:
                count = TmuxTerminal(places.socket, places.pane, places.uid, device).tell(text, _FOR_MS)
            except ChannelError as error:
                refused.append(str(error))
            else:
                return f"on the status line of {count} tmux client{'s' * (count != 1)}"
    for control in places.controls:
        from governor.channels.pty import PtyTerminal

        try:
            PtyTerminal(control).tell(text)
        except ChannelError as error:
            refused.append(str(error))
        else:
            return "by governor run"
    raise ChannelError("; ".join(refused))


def _shares_our_standard_error(control: Path) -> bool:
    """Whether that `governor run` says nothing elsewhere than where we have said it already: with pipes."""
    run_pid = control.stem.removeprefix("run-")
    try:
        theirs, ours = os.stat(f"/proc/{run_pid}/fd/2"), os.fstat(2)  # noqa: PTH116
    except OSError:
        return False
    return (theirs.st_dev, theirs.st_ino) == (ours.st_dev, ours.st_ino)


class Person:
    """Whoever sits before one agent."""

    def __init__(self, start: Attempt, note: Callable[[str, str], None]) -> None:
        """`start` looks after a child; `note` writes a kind and a text into the journal."""
        self._start, self._note = start, note
        self._places = Places()
        self._waiting: list[str] = []
        self._is_busy = False
        self._shown_ns: dict[str, int] = {}  # by kind

    def at(self, pid: int, channel: str) -> None:
        """The agent is this process now. Once it has ended, who sat before it is still there."""
        self._places = places(pid, channel)

    def show(self, kind: str, text: str, now_ns: int) -> None:
        """Show it, as soon as what is shown now is through; returns at once.

        Of what may come again and again, such as OOM kills, not each: a bell a second helps nobody.
        """
        again = since(self._shown_ns.get(kind), now_ns) < _AGAIN_NS and kind not in _EACH
        if (self._places.socket or self._places.controls) and not again:
            self._shown_ns[kind] = now_ns
            self._waiting = [*self._waiting, f"governor: {printable(text)}"[:_TEXT_LIMIT]][-_WAITING:]
            self._next()

    def _next(self) -> None:
        if self._is_busy or not self._waiting:
            return
        at, lines, self._waiting = self._places, self._waiting, []
        self._is_busy = True
        deadline_ns = time.monotonic_ns() + _DEADLINE_NS
        text = " | ".join(reversed(lines))  # the newest first: there may be little room
        self._start(lambda: fork(lambda: show(at, text).encode(), deadline_ns, "telling the user"), self._ended)

    def _ended(self, ended: Ended) -> None:
        self._is_busy = False
        said = printable(ended.output.decode(errors="replace"))[:_TEXT_LIMIT]
        if ended.ok:
            self._note("shown", f"the user was shown it {said}")
        else:
            self._note("not_shown", f"the user was not shown it: {said or 'over the deadline'}")
        self._next()
