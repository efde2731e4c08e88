"""`governor watch` without a target: everything that is governed and the largest others; asks the governors here."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from governor import node_containers, status_cli
from governor.poller import Poller
from governor.status import NODE_SOCKET, PAGE_TARGETS
from governor.watch_all import SORTS, All, Row
from governor.watch_governor import Gone, GovernorLink
from governor.watch_model import LOG, SECOND_NS, Entry, decided_between, short_time
from governor.watch_one import INTERVAL_NS
from governor.watch_target import Target

ROWS = 20  # where nothing says how many fit
_SEARCH_NS = 5 * SECOND_NS
_MANY_NS = 5 * SECOND_NS  # between two questions to a governor of more targets than fit one answer


@dataclass(frozen=True, slots=True)
class Overview:
    """Everything that is shown of many memcgs."""

    time_s: float
    source: str
    title: str
    count: str  # of all, shown or not
    rows: tuple[Row, ...]
    selected: int
    sort: str
    log: tuple[Entry, ...]
    holds: bool = False


class Many:
    """All memcgs, or those of one pod."""

    def __init__(self, poller: Poller, only: Iterable[Target], on_entry: Callable[[Entry], None]) -> None:
        """Reads nothing yet."""
        self._poller, self._on_entry = poller, on_entry
        self._only = tuple(only)
        self._title = f"{self._only[0].namespace}/{self._only[0].pod}" if self._only else "all memcgs"
        self._all = All(node_containers.root(), self._only)
        self._links: dict[int, GovernorLink] = {}
        self._standings: dict[int, list[Mapping[str, Any]]] = {}  # by the governor's pid
        self._asked_ns: dict[int, int] = {}
        self._search_ns = 0
        self._began_ns = 0
        self.due_ns = self.told_ns = 0
        self.shown = ROWS
        self.sort = SORTS[0]
        self.selected = 0
        self._chosen = ""  # the path of what a person has selected
        self.rows: list[Row] = []
        self.log: list[Entry] = []

    @property
    def source(self) -> str:
        """By what it is seen."""
        told = [str(pid) for pid, link in self._links.items() if not link.is_silent]
        return (
            f"governor{'s' * (len(told) > 1)} {', '.join(told)}" if told else "poll; no governor runs here that tells"
        )

    def turn(self, now_ns: int) -> None:
        """A look, and all that is due with it."""
        self._began_ns = self._began_ns or now_ns
        if now_ns >= self._search_ns:
            self._find_governors()
            self._search_ns = now_ns + _SEARCH_NS
        for pid, link in self._links.items():
            many = len(self._standings.get(pid, ())) > PAGE_TARGETS
            if not many or now_ns - self._asked_ns.get(pid, 0) >= _MANY_NS:
                self._asked_ns[pid] = now_ns
                was_silent = link.is_silent
                link.ask()
                if link.is_silent and not was_silent:
                    self._say(Entry(time.time(), "governor_gone", f"governor {pid}: it does not answer"))
                    self._forget(pid)
        self.rows = self._all.look(now_ns, self.shown, self.sort)
        paths = [row.target.path for row in self.rows]
        at = paths.index(self._chosen) if self._chosen in paths else self.selected
        self.selected = max(0, min(at, len(self.rows) - 1))
        self.due_ns = now_ns + INTERVAL_NS

    def select(self, at: int) -> None:
        """The row at this place; it stays selected wherever it is sorted to."""
        self.selected = max(0, min(at, len(self.rows) - 1))
        self._chosen = self.rows[self.selected].target.path if self.rows else ""

    def sort_next(self) -> None:
        """By something else."""
        self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]
        self.due_ns = 0

    def overview(self, time_s: float, holds: bool = False) -> Overview:
        """All that is shown now."""
        rows, log = tuple(self.rows), tuple(self.log)
        return Overview(time_s, self.source, self._title, self._count, rows, self.selected, self.sort, log, holds)

    @property
    def _count(self) -> str:
        left = self._all.left_out
        return f"{self._all.count}{f' and {left} left out for want of descriptors' if left else ''}"

    def summary(self, now_ns: int) -> str:
        """What there was to be seen, in a line."""
        seconds = (now_ns - (self._began_ns or now_ns)) / SECOND_NS
        kinds = Counter(entry.kind for entry in self.log)
        told = "; ".join(f"{kind} {count}" for kind, count in kinds.items()) or "nothing was told of them"
        return f"{self._title}: {self._count}, watched for {short_time(seconds)}; {told}"

    def close(self) -> None:
        """Close everything."""
        for pid in list(self._links):
            self._leave(pid)
        self._all.close()

    def _find_governors(self) -> None:
        paths: list[Path] = []
        with suppress(OSError):
            paths = status_cli.sockets()
        if any(link.path.name == NODE_SOCKET for link in self._links.values()) and not self._standings:
            paths = []  # most of them will turn out to be its own
        of_nodes = {str(one["cgroup_id"]) for told in self._standings.values() for one in told}
        for path in paths:
            cgroup_id = path.stem.removeprefix("memcg-")
            if (path.name == NODE_SOCKET and self._is_linked(path)) or cgroup_id in of_nodes:
                continue
            with suppress(OSError, status_cli.Unanswered):
                link = GovernorLink(path)
                if link.pid in self._links or not link.asks:
                    link.close()
                    continue
                self._links[link.pid] = link
                self._poller.register(link.fd, partial(self._hear, link.pid))

    def _is_linked(self, path: Path) -> bool:
        return any(link.path == path for link in self._links.values())

    def _hear(self, pid: int, _fd: int) -> None:
        link = self._links.get(pid)
        if link is None:
            return
        try:
            lines, standings = link.drain()
        except Gone as gone:
            self._say(Entry(time.time(), "governor_gone", f"governor {pid}: {gone}"))
            self._leave(pid)
            return
        for line in lines:
            if line.get("type") == "event":
                self._say(Entry(time.time(), line["kind"], line["text"]))
        if standings is None:
            return
        before = {one["cgroup_id"]: one for one in self._standings.get(pid, ())}
        for one in standings:
            entry = decided_between(before.get(one["cgroup_id"], one), one)
            if entry:
                name = status_cli.name_of(one)
                self._say(Entry(time.time(), entry.kind, f"{name}: {entry.text}", {"cgroup": one["cgroup"]}))
        self._standings[pid] = list(standings)
        self._all.govern(one for told in self._standings.values() for one in told)

    def _say(self, entry: Entry) -> None:
        self.log = [*self.log, entry][-LOG:]
        self._on_entry(entry)

    def _leave(self, pid: int) -> None:
        link = self._links.pop(pid)
        self._poller.unregister(link.fd)
        link.close()
        self._forget(pid)

    def _forget(self, pid: int) -> None:
        self._standings.pop(pid, None)
        self._all.govern(one for told in self._standings.values() for one in told)
