"""The socket of a governed memcg: programs hear what happens, and agents do what they are asked to.

A Unix socket `memcg-<cgroup id>.sock` in the run-time directory; JSON, one object a line, both ways. Root, governor's
own user and the agent's user may connect; others are refused.

governor says:

    {"type": "hello", "version": 1, "cgroup": PATH, "agent_pid": PID}
    {"type": "memory", "level": LEVEL, "rising": true, "unreclaimable_bytes": N, "max_bytes": N, "monotonic_ns": T}
                                        a level was crossed: below, compact, arm, brake, last
    {"type": "event", "kind": KIND, "text": TEXT}
                                        warning, braked, thawed, archived, shed, terminating, killed, oom_kill, ...:
                                        kinds and texts as in the journal
    {"type": "request", "id": N, "what": "compact", "reason": TEXT, "deadline_s": SECONDS}
                                        compact or clear; to one subscriber that said it can do it

A subscriber says:

    {"type": "subscribe", "can": ["compact", "clear"]}
                                        what it can do, [] to listen only; the last to say so is asked
    {"type": "ack", "id": N, "status": "delivered", "reason": TEXT}
                                        delivered, deferred (not now: ask again) or failed; once a request
    {"type": "status", "after": SLOT}   how things stand, answered as `status` has it; only to root and
                                        governor's own user

A governor outside the container that this one is in leads it instead: see `led`.

An acknowledgement ends a request and nothing else: brake, archive and terminate wait for nobody. Who sends what is no
such line, or more than 100 lines a second, or does not read, is cut off. Of the 32 places 8 are root's, and no other
user has more than 12; who has said nothing yet makes room for who comes later.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from governor.line_socket import Bounds, Garbled, LineSocket
from governor.model import Status, Tier
from governor.peer import Peer, peer_of
from governor.poller import Poller
from governor.record import LEVEL_NAMES, PAGE_BYTES, Record

VERSION = 1
_SUBSCRIBERS_LIMIT = 32
_ROOTS_PLACES = 8  # of these
_PLACES_EACH = 12  # of a user who is not root
_LINES_A_SECOND = 100
_BOUNDS = Bounds(line_bytes=16 << 10, lines=_LINES_A_SECOND, backlog_bytes=256 << 10)
_CHANGE_NS = 1_000_000_000  # who can do what is told on no more often: each time costs a line and a file
_REASON_LIMIT = 300
ASKED_FOR = {tier.value: tier for tier in (Tier.COMPACT, Tier.CLEAR)}
ANSWERS = {"delivered": Status.DELIVERED, "deferred": Status.DEFERRED, "failed": Status.FAILED}

TOLD = frozenset(  # of the journal's kinds
    {
        *("warning", "warning_over", "braked", "thawed", "archived", "archive_failed", "shed", "told", "terminating"),
        *("killed", "recycling", "withheld", "agent", "agent_ended", "nothing_left", "oom_kill", "oom_kills"),
        *("oom_killed", "veto", "stopping"),
    }
)

Answer = Callable[[Tier, Status, str], None]


@dataclass(slots=True, eq=False)
class _Subscriber:
    connection: socket.socket
    link: LineSocket  # over it
    peer: Peer
    can: frozenset[Tier] = frozenset()
    has_spoken: bool = False


@dataclass(slots=True)
class _Request:
    number: int
    subscriber: _Subscriber
    deadline_ns: int


class Subscribers:
    """Everybody who listens to one governed memcg, on the loop's poller."""

    def __init__(self, poller: Poller, hello: Callable[[], dict[str, object]]) -> None:
        """`hello` gives the fields of the first line. Nobody can connect before listen()."""
        self._poller = poller
        self._hello = hello
        self._path: Path | None = None
        self._server: socket.socket | None = None
        self._subscribers: dict[int, _Subscriber] = {}
        self._requests: dict[Tier, _Request] = {}
        self._numbers = 0
        self._has_changed = False
        self._change_told_ns: int | None = None
        self._second = 0
        self.allowed_uids: frozenset[int] = frozenset({0, os.geteuid()})
        self.on_answer: Answer = lambda *_: None
        self.on_status: Callable[[int], Iterable[tuple[str, Mapping[str, object]]]] = lambda after: ()
        # What only somebody outside our PID namespace may say, and that somebody has left: by their descriptors
        self.on_leader: Callable[[int, Mapping[str, object]], bool] = lambda fd, said: False  # whether it is known
        self.on_left: Callable[[int], None] = lambda fd: None
        self.leader_fd = -1  # it hears what is said to it, and nothing else
        self.on_change: Callable[[], None] = lambda: None  # who can do what is different now; from check_deadlines()

    def listen(self, path: Path) -> None:
        """Make the socket; raises OSError where there can be none."""
        path.unlink(missing_ok=True)  # the memcg's lock is ours: nobody listens there any more
        server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            server.bind(str(path))
            path.chmod(0o666)  # who may connect is decided by its credentials
            path.parent.chmod(0o711)  # and they must get there
            server.listen(8)
        except OSError:
            server.close()
            raise
        self._path, self._server = path, server
        self._poller.register(server.fileno(), lambda _: self._accept(server))

    @property
    def are_none(self) -> bool:
        """Whether nobody listens, and nobody has just left."""
        return not self._subscribers and not self._has_changed

    @property
    def can(self) -> frozenset[Tier]:
        """What somebody can be asked for."""
        return frozenset().union(*(subscriber.can for subscriber in self._subscribers.values()))

    def tell(self, message: str, /, **fields: object) -> None:
        """Say it to everybody."""
        for fd, subscriber in list(self._subscribers.items()):
            if fd != self.leader_fd:
                self._say(subscriber, message, fields)

    def say_to(self, fd: int, message: str, /, **fields: object) -> None:
        """Say it to one, if it is still there."""
        if subscriber := self._subscribers.get(fd):
            self._say(subscriber, message, fields)

    def hear(self, fd: int) -> None:
        """Take what one has said by now; no longer a subscriber: nothing happens."""
        self._on_ready(fd)

    def drop(self, fd: int) -> None:
        """Hang up on one."""
        if subscriber := self._subscribers.get(fd):
            self._drop(subscriber)

    def tell_level(self, crossing: Record) -> None:
        """A level was crossed."""
        self.tell(
            "memory",
            level=LEVEL_NAMES[crossing.level],
            rising=crossing.rising,
            unreclaimable_bytes=crossing.bound_pages * PAGE_BYTES,
            max_bytes=crossing.max_pages * PAGE_BYTES,
            monotonic_ns=crossing.ktime_ns,
        )

    def ask(self, tier: Tier, reason: str, deadline_ns: int, now_ns: int) -> bool:
        """Ask one who can; on_answer hears what becomes of it. False when there is nobody."""
        asked = next((one for one in reversed(self._subscribers.values()) if tier in one.can), None)
        if asked is None:
            return False
        self._numbers += 1
        self._requests[tier] = _Request(self._numbers, asked, deadline_ns)
        deadline_s = round((deadline_ns - now_ns) / 1e9, 3)
        request = {"id": self._numbers, "what": tier.value, "reason": reason, "deadline_s": deadline_s}
        self._say(asked, "request", request)  # where that fails, on_answer has heard of it
        return True

    def drop_requests(self) -> None:
        """The agent has ended: what it was asked is nobody's any more."""
        self._requests.clear()

    def prolong(self, by_ns: int) -> None:
        """The target was frozen for so long: deadlines stood still."""
        for request in self._requests.values():
            request.deadline_ns += by_ns

    def check_deadlines(self, now_ns: int) -> None:
        """Requests that nobody acknowledged in time have failed; and what else is due now and then."""
        if now_ns // 1_000_000_000 != self._second:
            self._second = now_ns // 1_000_000_000
            for subscriber in self._subscribers.values():
                subscriber.link.lines = 0
        if self._has_changed and (self._change_told_ns is None or now_ns - self._change_told_ns >= _CHANGE_NS):
            self._has_changed, self._change_told_ns = False, now_ns
            self.on_change()
        for tier in [tier for tier, request in self._requests.items() if now_ns >= request.deadline_ns]:
            self._requests.pop(tier)
            self.on_answer(tier, Status.FAILED, "nobody acknowledged it in time")

    def close(self) -> None:
        """Tell nobody; the socket goes."""
        if self._path and self._server:
            with suppress(OSError):
                self._path.unlink()
            self._poller.unregister(self._server.fileno())
            self._server.close()
        for subscriber in self._subscribers.values():
            self._poller.unregister(subscriber.connection.fileno())
            subscriber.connection.close()
        self._subscribers.clear()

    def _accept(self, server: socket.socket) -> None:
        try:
            connection, _ = server.accept()
        except OSError:  # gone again, or no descriptor left
            return
        peer = peer_of(connection)
        if peer.uid not in self.allowed_uids or not self._has_room(peer.uid):
            connection.close()
            return
        connection.setblocking(False)
        link = LineSocket(connection, self._poller, _BOUNDS)
        subscriber = _Subscriber(connection, link, peer)
        self._subscribers[connection.fileno()] = subscriber
        self._poller.register(connection.fileno(), self._on_ready)
        self._say(subscriber, "hello", {"version": VERSION, **self._hello()})

    def _on_ready(self, fd: int) -> None:
        if subscriber := self._subscribers.get(fd):
            try:
                subscriber.link.flush()
                self._hear(subscriber)
            except (OSError, EOFError, Garbled):
                self._drop(subscriber)

    def _has_room(self, uid: int) -> bool:
        """Whether one more of this user may come, where need be in the place of who has said nothing yet."""
        among = list(self._subscribers.values())
        limit = _SUBSCRIBERS_LIMIT
        if uid != 0:
            among = [one for one in among if one.peer.uid != 0]
            limit -= _ROOTS_PLACES
            own = [one for one in among if one.peer.uid == uid]
            if len(own) >= _PLACES_EACH:
                among, limit = own, _PLACES_EACH
        if len(among) < limit:
            return True
        silent = next((one for one in among if not one.has_spoken), None)
        if silent:
            self._drop(silent)
        return silent is not None

    def _say(self, subscriber: _Subscriber, message: str, fields: Mapping[str, object]) -> None:
        try:
            subscriber.link.say(message, fields)
        except OSError:
            with suppress(OSError, EOFError, Garbled):  # an acknowledgement that it sent before it left
                self._hear(subscriber)
            self._drop(subscriber)

    def _hear(self, subscriber: _Subscriber) -> None:
        """Raises as LineSocket.hear()."""
        for line in subscriber.link.hear():
            self._on_line(subscriber, line)

    def _on_line(self, subscriber: _Subscriber, line: bytes) -> None:
        try:
            said = orjson.loads(line)
            if said["type"] == "subscribe":
                can = frozenset(ASKED_FOR[what] for what in said["can"])
                self._has_changed |= can != subscriber.can
                subscriber.can, subscriber.has_spoken = can, True
                fd = subscriber.connection.fileno()
                self._subscribers[fd] = self._subscribers.pop(fd)  # the last to say so is asked
            elif said["type"] == "ack":
                reason = said.get("reason", "")
                if not isinstance(reason, str):
                    raise Garbled
                self._acknowledged(subscriber, said["id"], ANSWERS[said["status"]], reason)
            elif said["type"] == "status" and subscriber.peer.uid in (0, os.geteuid()):
                subscriber.has_spoken = True
                for message, fields in self.on_status(_integer(said["after"])):
                    self._say(subscriber, message, fields)
            elif subscriber.peer.pid == 0 and self.on_leader(subscriber.connection.fileno(), said):
                subscriber.has_spoken = True
            else:
                raise Garbled
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise Garbled from error

    def _acknowledged(self, subscriber: _Subscriber, number: int, status: Status, reason: str) -> None:
        for tier, request in self._requests.items():
            if request.number == number and request.subscriber is subscriber:
                del self._requests[tier]
                self.on_answer(tier, status, reason[:_REASON_LIMIT])
                return

    def _drop(self, subscriber: _Subscriber) -> None:
        fd = subscriber.connection.fileno()
        if self._subscribers.pop(fd, None) is None:
            return
        self._poller.unregister(fd)
        subscriber.connection.close()
        for tier in [tier for tier, request in self._requests.items() if request.subscriber is subscriber]:
            del self._requests[tier]
            self.on_answer(tier, Status.FAILED, "who was asked for it is gone")
        self._has_changed |= bool(subscriber.can)
        self.on_left(fd)


def _integer(value: object) -> int:
    if not isinstance(value, int):
        raise Garbled
    return value
