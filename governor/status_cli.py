"""`governor status`: asks every governor that runs here, and prints what it answers."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import orjson
import typer

from governor import instance
from governor.cli_common import JsonOption, fail
from governor.journal import printable
from governor.peer import peer_of
from governor.status import NODE_SOCKET

_PATIENCE_S, _LED_PATIENCE_S = 5.0, 1.0
_LINE_LIMIT_BYTES = 64 << 10
_PAGES_LIMIT = 10_000
_NOT_WELL = 3
_GAP_S = 0.012  # a subscriber may say a hundred lines a second
_MIB = 1 << 20
LED = "a governor outside leads: brake, shed and terminate are its own, and only a hold on its node forbids them"

Answer = dict[str, Any]


class Unanswered(Exception):
    """Nobody there, or nobody who answers as a governor would; the text says why."""


def status(json: JsonOption = False) -> None:
    """Say what is governed here, how it stands, and what was decided last.

    Exits 1 if no governor runs here that would tell this user, 3 if one that does is not well (as /healthz has it).
    """
    governors: dict[int, tuple[Answer, list[Answer]]] = {}
    unanswered = []
    for path in sockets():
        try:
            pid, connection = connect(path)
            with connection:
                if pid not in governors:  # a node's daemon tells of all its targets at once
                    governors[pid] = ask(connection)
        except (Unanswered, OSError) as error:
            unanswered.append(f"{path}: {error}")
    for why in unanswered:
        typer.echo(printable(f"governor: no answer from {why}"), err=True)
    if not governors:
        fail("no governor runs here, or none that this user may ask; begin with governor guard --cgroup PATH")
    if json:
        said = [{"governor": about, "targets": targets} for about, targets in governors.values()]
        typer.echo(orjson.dumps(said).decode())
    else:
        for about, targets in governors.values():
            show(about, targets)
    faults = [fault for about, _ in governors.values() for fault in about.get("faults", [])]
    for fault in faults:
        typer.echo(printable(f"governor: not well: {fault}"), err=True)
    if faults:
        raise typer.Exit(_NOT_WELL)


def sockets() -> list[Path]:
    """Where governors may listen, a node's daemon first."""
    found = []
    for directory in dict.fromkeys((Path("/run/governor"), instance.run_directory())):
        found += [
            path for path in (directory / NODE_SOCKET, *sorted(directory.glob("memcg-*.sock"))) if path.exists()
        ]
    return found


def connect(path: Path, patience_s: float = _PATIENCE_S) -> tuple[int, socket.socket]:
    """The pid of the governor that listens there, and the connection; raises Unanswered, OSError."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(patience_s)
    try:
        connection.connect(str(path))
    except OSError:
        connection.close()
        raise
    pid, uid = peer_of(connection)
    if uid not in (0, os.geteuid()):
        connection.close()
        raise Unanswered(f"found a socket of user {uid}, expected root's or one's own")
    return pid, connection


def ask(connection: socket.socket) -> tuple[Answer, list[Answer]]:
    """What it says of itself, and of each of its targets; raises Unanswered, OSError."""
    targets: list[Answer] = []
    with connection.makefile("rb") as lines:
        after = -1
        for _ in range(_PAGES_LIMIT):
            connection.sendall(orjson.dumps({"type": "status", "after": after}) + b"\n")
            for line in _lines(lines):
                if line.get("type") == "target":
                    targets.append(line)
                elif line.get("type") == "status":
                    break
            if line.get("next") is None:
                return line, targets
            after = line["next"]
            time.sleep(_GAP_S)
    raise Unanswered("it never comes to an end")


def _lines(lines: Any) -> Iterator[Answer]:
    while True:
        try:
            data = lines.readline(_LINE_LIMIT_BYTES)
        except (TimeoutError, ConnectionResetError):
            data = b""
        if not data.endswith(b"\n"):
            raise Unanswered("it does not tell this user" if os.geteuid() else "it does not tell")
        try:
            line = orjson.loads(data)
        except ValueError as error:
            raise Unanswered(f"found a line that is no JSON: {error}") from None
        if isinstance(line, dict):
            yield line


def show(about: Answer, targets: list[Answer]) -> None:
    """For people: a table that fits 80 columns, and below it what was decided."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False, emoji=False, markup=False)
    resident_mib, reflex_mib = about["resident_bytes"] / _MIB, about["reflex_resident_bytes"] / _MIB
    typer.echo(
        printable(
            f"governor {about['version']}, process {about['pid']}: {resident_mib:.1f} MiB; "
            f"reflex {about['reflex_pid']}: {reflex_mib:.1f} MiB; {about['targets']} governed"
        )
    )
    table = Table(box=None, pad_edge=False, show_edge=False)
    table.add_column("target", overflow="fold")  # what is too wide goes on in the next line
    for name in ("MiB", "of", "%"):
        table.add_column(name, no_wrap=True, justify="right")
    for name in ("state", "source"):
        table.add_column(name, no_wrap=True)
    table.add_column("policy", overflow="fold")
    table.add_column("agent", no_wrap=True, justify="right")
    for one in targets:
        cells = (
            name_of(one),
            *_memory(one),
            _state(one),
            one["source"] or "none",
            one["policy"],
            str(one["agent_pid"] or "-"),
        )
        table.add_row(*(Text(printable(cell)) for cell in cells))
    console.print(table)
    for one in targets:
        said = [led] if (led := led_by(one)) else []
        if decided := one["decided"]:
            said.append(f"{decided['what']}, {_ago(decided['ago_s'])} ago: {decided['reason']}")
        for text in said:
            console.print(Text(printable(f"{name_of(one)}: {text}")), soft_wrap=True)


def is_led(cgroup_id: int) -> bool:
    """Whether the guard of a memcg says that a governor outside its container leads."""
    try:
        _, connection = connect(instance.run_directory() / f"memcg-{cgroup_id}.sock", _LED_PATIENCE_S)
        with connection:
            return any(one.get("led_from_outside") is True for one in ask(connection)[1])
    except (Unanswered, OSError):  # who is held with its container, say: it is not known
        return False


def led_by(one: Answer) -> str:
    """Who does what where a container has a guard of its own and the node a daemon; "" where one does all."""
    if one.get("led_from_outside"):
        return LED
    if pid := one.get("inside_guard_pid"):
        return f"compact and clear are left to governor run in it (its guard is process {pid})"
    return ""


def name_of(one: Answer) -> str:
    """Namespace, pod and container of a target, or what its cgroup is called."""
    return "/".join(part for part in (one["namespace"], one["pod"], one["container"]) if part)


def _memory(one: Answer) -> tuple[str, str, str]:
    memory = one["memory"]
    if not memory:
        return "?", "?", "?"
    percent = f"{100 * memory['unreclaimable_ratio']:.1f}"
    return str(memory["unreclaimable_bytes"] // _MIB), str(memory["max_bytes"] // _MIB), percent


def _state(one: Answer) -> str:
    """The phase, and what of it a person has to know."""
    state: str = one["phase"]
    if one["frozen_for_ms"] is not None:
        state = f"frozen {one['frozen_for_ms'] / 1000:.1f} s"
    elif state == "watching" and one["in_episode"]:
        state = "in episode"
    return f"{state}, dry" if one["dry_run"] else state


def _ago(seconds: int) -> str:
    for unit_s, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= unit_s:
            return f"{seconds // unit_s} {unit}"
    return f"{seconds} s"
