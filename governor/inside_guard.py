"""The guard that a `governor run` keeps in a container: found, and handed what is best done from there.

It has the agent's terminal, profile and state files at hand, so it delivers compact and clear; brake, archive and
tier 3 stay here. `led` is the other end and has the protocol. A connection is made by a child that has entered the
container's mounts as the agent's user, so that no link leads out of it, on a socket that is ours all along; before
a word is said, whoever listens must be a process of that memcg. All of it may lie: what it answers counts for the
outcome of a delivery and nothing else. Its lines are bounded, and nobody waits for it.
"""

from __future__ import annotations

import resource
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import orjson

from governor import cgroup, subtree
from governor.agent_process import AgentProcess
from governor.children import Attempt, Ended, fork
from governor.inside import Door
from governor.inside_connect import VISIT_S, connect_inside
from governor.journal import Note, printable
from governor.line_socket import Bounds, Garbled, LineSocket
from governor.model import Status, Tier
from governor.peer import peer_of
from governor.policy import SECOND
from governor.poller import Poller
from governor.subscribers import ANSWERS, ASKED_FOR, Answer

_AGAIN_NS = tuple(seconds * SECOND for seconds in (1, 1, 2, 5, 10, 30, 300))  # from a failure to the next attempt
_LASTED_NS = 60 * SECOND
_LOOK_AGAIN_NS = 600 * SECOND  # whether a `governor run` is above the agent: whoever is above one mostly stays
_LEAD_S, RENEW_NS = 30, 10 * SECOND  # how long it stands back unless that is said again, and how often it is
_BOUNDS = Bounds(line_bytes=4 << 10, lines=20, backlog_bytes=64 << 10)
_REASON_LIMIT = 300
_FAMILY_BYTES = 64 << 20  # resident, of each


class InsideGuard:
    """The guard in one container, on the loop's poller; not connected at first."""

    def __init__(self, memcg: cgroup.Memcg, poller: Poller, attempt: Attempt, note: Note) -> None:
        self.on_answer: Answer = lambda *_: None
        self.on_change: Callable[[], None] = lambda: None  # what it can do is different now; from turn()
        self._memcg, self._poller, self._attempt, self._note = memcg, poller, attempt, note
        self._socket: socket.socket | None = None
        self._link: LineSocket | None = None  # over it; None: a child is about to connect it
        self._agent_pid = 0
        self._family: list[tuple[int, int]] = []  # pids and starts
        self._peer_pid = 0
        self._can: frozenset[Tier] | None = None  # None: it does not stand back
        self._has_changed = False
        self._requests: dict[Tier, tuple[int, int]] = {}  # number and deadline
        self._numbers = 0
        self._second = 0
        self._renewed_ns = self._begun_ns = self._due_ns = 0
        self._failures = 0

    @property
    def can(self) -> frozenset[Tier]:
        """What it can be asked for."""
        return self._can or frozenset()

    @property
    def pid(self) -> int:
        """Of whoever stands back for us; 0: nobody does."""
        return self._peer_pid if self._can is not None else 0

    def family(self, agent_pid: int) -> list[int]:
        """The guard that stands back and who keeps it; nobody where the agent is one of them, or one is too large.

        Who was there when this was asked first stays it until there is another agent: the guard ends with the agent.
        """
        if self.pid:
            above = [pid for pid in subtree.ancestors(self.pid) if self._is_of_the_memcg(pid)]
            self._family = [(stat.pid, stat.start_ticks) for pid in above if (stat := subtree.read_stat(pid))]
        found = [(stat, start) for pid, start in self._family if (stat := subtree.read_stat(pid))]
        there = [stat for stat, start in found if stat.start_ticks == start]
        most_pages = _FAMILY_BYTES // resource.getpagesize()
        is_one = all(stat.pid != agent_pid and stat.rss_pages <= most_pages for stat in there)
        return [stat.pid for stat in there] if is_one else []

    @property
    def are_none(self) -> bool:
        """Whether nothing is asked of it."""
        return not self._requests

    def turn(self, now_ns: int, agent: AgentProcess, leads: bool) -> None:
        """Whatever is due: connect, go on leading, give up what was not answered. `leads`: it is to stand back."""
        if self._has_changed:
            self._has_changed = False
            self.on_change()
        if agent.pid != self._agent_pid:
            self._agent_pid = agent.pid
            self._family = []
            if self._failures < len(_AGAIN_NS):  # another agent has another guard; a liar's container stays a liar's
                self._failures = self._due_ns = 0
        if not leads:
            self.close()
            self._due_ns = 0
        elif self._link:
            self._go_on(now_ns)
        elif not self._socket and now_ns >= self._due_ns:
            self._due_ns = now_ns + _LOOK_AGAIN_NS
            if agent.lives_elsewhere and self._is_run(agent.pid) and (door := agent.way_in()):
                self._connect(door, now_ns)

    def ask(self, tier: Tier, reason: str, deadline_ns: int, now_ns: int) -> bool:
        """Have it deliver; on_answer hears what becomes of it. False where it cannot."""
        if tier not in self.can:
            return False
        self._numbers += 1
        self._requests[tier] = (self._numbers, deadline_ns)
        deadline_s = round((deadline_ns - now_ns) / 1e9, 3)
        self._say("deliver", id=self._numbers, what=tier.value, reason=reason, deadline_s=deadline_s)
        return True

    def tell(self, message: str, /, **fields: object) -> bool:
        """Say something that is not answered; False where nobody stands back."""
        if self._can is not None:
            self._say(message, **fields)
        return self._can is not None

    def prolong(self, by_ns: int) -> None:
        """The target was frozen for so long: deadlines stood still."""
        for tier, (number, deadline_ns) in self._requests.items():
            self._requests[tier] = (number, deadline_ns + by_ns)

    def drop_requests(self) -> None:
        """The agent has ended: what was asked is nobody's any more."""
        self._requests.clear()

    def close(self, in_silence: bool = False) -> None:
        """Hang up: it does everything itself again. What was asked has failed; `in_silence`: nobody hears of it."""
        if self._socket and self._link:
            self._poller.unregister(self._socket.fileno())
        if self._socket:
            self._socket.close()
        self._socket = self._link = None
        self._peer_pid = 0
        self._has_changed |= bool(self._can)
        self._can = None
        asked, self._requests = self._requests, {}
        for tier in asked if not in_silence else ():
            self.on_answer(tier, Status.FAILED, "the guard in the container is gone")

    # The way there

    def _is_run(self, agent_pid: int) -> bool:
        """Whether a `governor run` started the agent, or whoever calls itself so."""
        return any(
            subtree.comm_of(pid) == subtree.RUN_COMM and self._is_of_the_memcg(pid)
            for pid in subtree.ancestors(agent_pid)[1:]
        )

    def _is_of_the_memcg(self, pid: int) -> bool:
        return cgroup.is_inside(cgroup.memcg_of(pid, self._memcg.v1), self._memcg.path)

    def _connect(self, door: Door, now_ns: int) -> None:
        made = self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        name = f"memcg-{self._memcg.cgroup_id}.sock"
        deadline_ns = now_ns + round(2 * VISIT_S * SECOND)
        keep = (made.fileno(), *door.fds)
        what = "the way to the guard in the container"
        self._attempt(
            lambda: fork(lambda: connect_inside(made, door, name), deadline_ns, what, keep=keep),
            lambda ended: self._connected(made, ended),
        )

    def _connected(self, made: socket.socket, ended: Ended) -> None:
        if made is not self._socket:  # closed since
            return
        pid = 0
        if ended.ok:
            with suppress(OSError):
                pid = peer_of(made).pid
        if ended.ok and not self._is_of_the_memcg(pid):
            self._failed(f"whoever listens there is process {pid}, which is none of the container", is_wrong=True)
        elif not ended.ok:
            self._failed(ended.why)
        else:
            self._link, self._peer_pid = LineSocket(made, self._poller, _BOUNDS), pid
            self._begun_ns = time.monotonic_ns()
            self._poller.register(made.fileno(), self._on_ready)
            self._lead(self._begun_ns)

    def _failed(self, why: str, is_wrong: bool = False) -> None:
        """Try again later; who was wrong is not asked again soon."""
        now_ns = time.monotonic_ns()
        if self._link and now_ns - self._begun_ns >= _LASTED_NS:
            self._failures = 0
        if is_wrong:
            self._failures = len(_AGAIN_NS) - 1
        self._due_ns = now_ns + _AGAIN_NS[min(self._failures, len(_AGAIN_NS) - 1)]
        is_late = self._failures == len(_AGAIN_NS) - 2  # a guard takes a while to start
        if is_wrong or is_late or self._can is not None:
            self._note("inside_guard", f"nothing is handed to the guard in the container: {printable(why)}")
        self._failures += 1
        self.close()

    # What is said

    def _go_on(self, now_ns: int) -> None:
        if now_ns - self._renewed_ns >= RENEW_NS:
            self._lead(now_ns)
        for tier in [tier for tier, (_, deadline_ns) in self._requests.items() if now_ns >= deadline_ns]:
            del self._requests[tier]
            self.on_answer(tier, Status.FAILED, "the guard in the container did not answer in time")

    def _lead(self, now_ns: int) -> None:
        self._renewed_ns = now_ns
        self._say("lead", for_s=_LEAD_S)

    def _say(self, message: str, /, **fields: object) -> None:
        assert self._link
        try:
            self._link.say(message, fields)
        except OSError as error:
            self._failed(error.strerror or "it does not read")

    def _on_ready(self, fd: int) -> None:
        if not self._socket or not self._link or self._socket.fileno() != fd:
            return
        second = time.monotonic_ns() // SECOND
        if second != self._second:
            self._second, self._link.lines = second, 0
        try:
            self._link.flush()
            for line in self._link.hear():
                self._on_line(line)
        except EOFError:
            self._failed("it has hung up")
        except OSError as error:
            self._failed(error.strerror or "it is gone")
        except Garbled:
            self._failed("it said what is no line of the protocol", is_wrong=True)

    def _on_line(self, line: bytes) -> None:
        try:
            said = orjson.loads(line)
            if said["type"] == "led":
                can = frozenset(ASKED_FOR[what] for what in said["can"])
                if self._can is None:
                    text = "the guard in the container stands back, and delivers"
                    self._note("inside_guard", text, pid=self._peer_pid)
                self._has_changed |= can != self.can
                self._can = can
            elif said["type"] == "ack":
                self._answered(said["id"], ANSWERS[said["status"]], said.get("reason", ""))
            elif said["type"] not in ("hello", "event", "memory"):  # before it stands back we are a subscriber
                raise Garbled
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Garbled from error

    def _answered(self, number: object, status: Status, reason: object) -> None:
        if not isinstance(reason, str):
            raise Garbled
        for tier in [tier for tier, (asked, _) in self._requests.items() if asked == number]:
            del self._requests[tier]
            self.on_answer(tier, status, printable(reason[:_REASON_LIMIT])[:_REASON_LIMIT])
