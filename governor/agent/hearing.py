"""What a running governor says to this agent, heard on its subscribers' socket, and how it is answered.

The protocol is documented in governor/subscribers.py; this side of it needs nothing of governor. A request runs its
hook and is acknowledged: delivered when the hook returns (its text is the reason) or goes on for long, deferred when
it raises NotNow, failed when it raises anything else. Nobody is asked to archive: that is governor's own work, and
what it announces of it is heard.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import logging
import os
import socket
import stat
import struct
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

_VERSION = 1
_LINE_LIMIT_BYTES = 1 << 20
_CREDENTIALS = struct.Struct("=iII")  # struct ucred: pid, uid, gid
_OF_DEADLINE = 0.8  # a hook that takes longer is said to go on: then governor waits for what it brings
_REASON_LIMIT = 300
_TYPES: dict[str, tuple[type, ...]] = {"str": (str,), "bool": (bool,), "int": (int,), "float": (int, float)}
_ARCHIVE = frozenset({"archived", "archive_failed"})
_log = logging.getLogger("governor.agent")


@dataclass(frozen=True, slots=True)
class Crossing:
    """A level of governor's was crossed: below, compact, arm, brake, last. An upper bound: look before acting."""

    level: str
    rising: bool
    unreclaimable_bytes: int
    max_bytes: int
    monotonic_ns: int  # when the kernel saw it


@dataclass(frozen=True, slots=True)
class Announcement:
    """What governor does or is about to do: warning, braked, archived, shed, terminating, ...; for people to read."""

    kind: str
    text: str


@dataclass(frozen=True, slots=True)
class Request:
    """What governor asks the agent to do: "compact" or "clear"."""

    what: str
    reason: str
    deadline_s: float


class NotNow(Exception):
    """Raised by a hook: ask again later; the text says why."""


# Coroutine functions, or plain ones that do not take long.
Answered = Callable[[Request], Awaitable[str | None] | str | None]
Told = Callable[[Announcement], Awaitable[None] | None]
_Said = TypeVar("_Said", Request, Announcement)
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Hooks:
    """What the agent does when governor asks or tells; governor asks for what there is a hook for."""

    compact: Answered | None = None
    clear: Answered | None = None
    warning: Told | None = None
    archive: Told | None = None  # archived, archive_failed
    announced: Told | None = None  # everything, those two included
    crossed: Callable[[Crossing], None] | None = None


class NoGovernor(Exception):
    """What listens there is no governor that may be trusted, or speaks another version; the text says which."""


def socket_paths(memcg_paths: list[str], root: str = "/") -> list[str]:
    """Sockets of governors of these memcgs that are there now, the first memcg's first.

    In /run/governor and where a governor of this user keeps its own; not in a directory that another user could have
    put there.
    """
    at = root.rstrip("/")
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    bases = ("/run", own if own.startswith("/") else f"/tmp/governor-{os.geteuid()}")  # noqa: S108  as governor has it
    directories = [
        f"{at}{base}/governor" for base in bases if _is_ours(at + base) and _is_ours(f"{at}{base}/governor")
    ]
    found = []
    for memcg_path in memcg_paths:
        with suppress(OSError):
            name = f"memcg-{os.stat(at + memcg_path).st_ino}.sock"  # noqa: PTH116  the inode is the cgroup id
            found += [f"{directory}/{name}" for directory in directories]
    return [path for path in found if os.path.exists(path)]  # noqa: PTH110


class Hearing:
    """One agent's hooks, and the connection to governor while there is one."""

    def __init__(self, hooks: Hooks) -> None:
        self._hooks = hooks
        self._running: dict[str, asyncio.Task[str | None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.is_connected = False

    @property
    def tasks(self) -> list[asyncio.Task[Any]]:
        """The hooks that run now, and what waits for them."""
        return [*self._running.values(), *self._tasks]

    async def hear(self, path: str, crossed: Callable[[Crossing], None]) -> bool:
        """Until governor goes away, when what hooks had begun goes on; whether it had said anything.

        Raises OSError, NoGovernor.
        """
        reader, writer = await asyncio.open_unix_connection(path, limit=_LINE_LIMIT_BYTES)
        try:
            _check_peer(writer.get_extra_info("socket"))
            can = [what for what in ("compact", "clear") if getattr(self._hooks, what)]
            _say(writer, {"type": "subscribe", "can": can})
            while line := await reader.readline():
                self._on_line(line, writer, crossed)
        except ValueError as error:  # a line over the limit, no JSON, fields that are not the protocol's
            raise NoGovernor(f"{path}: found no line of its protocol: {error}") from error
        else:
            return self.is_connected
        finally:
            self.is_connected = False
            writer.close()

    def _on_line(self, line: bytes, writer: asyncio.StreamWriter, crossed: Callable[[Crossing], None]) -> None:
        try:
            said = json.loads(line)
            kind = said["type"]
            if kind == "hello":
                if said["version"] != _VERSION:
                    raise ValueError(f"version {said['version']!r}, expected {_VERSION}")
                self.is_connected = True
            elif kind == "memory":
                crossing = Crossing(**_fields(said, Crossing))
                crossed(crossing)
                if self._hooks.crossed:
                    asyncio.get_running_loop().call_soon(self._hooks.crossed, crossing)  # its faults are the loop's
            elif kind == "event":
                self._announce(Announcement(**_fields(said, Announcement)))
            elif kind == "request":
                request = Request(**_fields(said, Request))
                self._spawn(self._answer(said["id"], request, writer))
        except (KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error

    def _announce(self, announcement: Announcement) -> None:
        told = [self._hooks.announced]
        if announcement.kind == "warning":
            told.append(self._hooks.warning)
        if announcement.kind in _ARCHIVE:
            told.append(self._hooks.archive)
        for hook in told:
            if hook:
                self._spawn(_logged(hook, announcement))

    async def _answer(self, number: int, request: Request, writer: asyncio.StreamWriter) -> None:
        hook: Answered | None = getattr(self._hooks, request.what, None)
        if request.what in self._running:
            status, reason = "deferred", f"the last {request.what} is not done yet"
        elif hook is None:
            status, reason = "failed", f"no hook for {request.what}"
        else:
            status, reason = await self._run(hook, request)
        if not writer.is_closing():
            _say(writer, {"type": "ack", "id": number, "status": status, "reason": reason[:_REASON_LIMIT]})

    async def _run(self, hook: Answered, request: Request) -> tuple[str, str]:
        task = self._running[request.what] = asyncio.create_task(_result_of(hook, request))
        task.add_done_callback(lambda _: self._running.pop(request.what))
        done, _ = await asyncio.wait({task}, timeout=max(0.0, request.deadline_s * _OF_DEADLINE))
        if not done:
            task.add_done_callback(_log_failure)
            return "delivered", "begun, and not done yet"
        if task.cancelled():
            return "failed", "cancelled"
        error = task.exception()
        if isinstance(error, NotNow):
            return "deferred", str(error)
        if error:
            _log_failure(task)
            return "failed", f"{type(error).__name__}: {error}"
        return "delivered", str(task.result() or "")

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


async def _result_of(hook: Callable[[_Said], Awaitable[_Result] | _Result], said: _Said) -> _Result:
    """A coroutine function or a plain one."""
    result = hook(said)
    return await result if inspect.isawaitable(result) else result


async def _logged(hook: Told, announcement: Announcement) -> None:
    try:
        await _result_of(hook, announcement)
    except Exception:  # noqa: BLE001  the agent's own code: its fault must not end the watch
        _log.exception("the hook for %r failed", announcement.kind)


def _log_failure(task: asyncio.Task[str | None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        _log.error("a hook for governor's request failed", exc_info=error)


def _say(writer: asyncio.StreamWriter, message: dict[str, object]) -> None:
    writer.write(json.dumps(message).encode() + b"\n")


def _fields(said: dict[str, Any], noun: type) -> dict[str, Any]:
    """What a noun has of what was said, of the right types; more may be said by a later governor."""
    found = {name: said[name] for name in noun.__annotations__}
    for name, of_type in noun.__annotations__.items():
        if not isinstance(found[name], _TYPES[of_type]):
            raise TypeError(f"{name} is {found[name]!r}, expected {of_type}")
    return found


def _check_peer(connection: socket.socket) -> None:
    """Who asks an agent to drop its context must be root or this user; raises NoGovernor."""
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid = _CREDENTIALS.unpack(found)[1]
    if uid not in (0, os.geteuid()):
        raise NoGovernor(f"uid {uid} listens there, expected root or {os.geteuid()}")


def _is_ours(path: str) -> bool:
    try:
        about = os.lstat(path)
    except OSError:
        return False
    return stat.S_ISDIR(about.st_mode) and about.st_uid in (0, os.geteuid())
