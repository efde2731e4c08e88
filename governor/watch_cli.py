"""`governor watch`: the command. What TARGET means is in watch_target, what is shown in watch_session."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Annotated, Any

import typer

from governor.cli_common import JsonOption, fail

TARGET_WORDS = "NAMESPACE/POD, NAMESPACE/POD/CONTAINER, a cgroup path, a pid, a systemd unit, or self"
TARGET_HELP = f"{TARGET_WORDS} [default: all that are governed, and the largest others]."

_LONGEST_S = 1e9  # of --for

# A shell puts what is completed into the command line as it is: a container's cgroup named "$(...)" would run.
_HARMLESS = re.compile(r"[A-Za-z0-9_@%.:/+=,-]+")


def complete_target(incomplete: str) -> list[str]:
    """For the shell: pods that are governed here, services and scopes, or directories below a cgroup path."""
    from governor import node_containers
    from governor.watch_all import leaves
    from governor.watch_target import directories, target_of

    if incomplete.startswith("/"):
        found = directories(incomplete.rpartition("/")[0] or "/")
    else:
        found = [one.name for one in map(target_of, standings()) if one.pod]
        units = (path for path in leaves(node_containers.root()) if path.endswith((".service", ".scope")))
        found += [path.rsplit("/", 1)[-1] for path in units]
    return sorted({name for name in found if name.startswith(incomplete) and _HARMLESS.fullmatch(name)})


def standings() -> Iterator[dict[str, Any]]:
    """How everything stands that the governors here would tell this user of."""
    from governor import status_cli

    seen = set()
    with suppress(OSError):
        for path in status_cli.sockets():
            with suppress(OSError, status_cli.Unanswered):
                pid, connection = status_cli.connect(path)
                with connection:
                    if pid not in seen:
                        seen.add(pid)
                        yield from status_cli.ask(connection)[1]


def watch(
    target: Annotated[
        str | None, typer.Argument(metavar="[TARGET]", help=TARGET_HELP, autocompletion=complete_target)
    ] = None,
    json: JsonOption = False,
    once: Annotated[bool, typer.Option("--once", help="One line, and an exit status by level.")] = False,
    seconds: Annotated[float | None, typer.Option("--for", min=0, help="End after so many seconds.")] = None,
    until: Annotated[
        str, typer.Option("--until", metavar="crossing", help="End at the next level that is crossed upwards.")
    ] = "",
    source: Annotated[
        str, typer.Option(help="auto (a governor that runs here, else the best there is), bpf, psi or poll.")
    ] = "auto",
    plain: Annotated[bool, typer.Option("--plain", help="Lines, at a terminal as well.")] = False,
    ascii_only: Annotated[bool, typer.Option("--ascii", help="A picture of ASCII characters only.")] = False,
) -> None:
    """See what memory does, live: a picture at a terminal, a line a second elsewhere. Reads only.

    Keys: space holds the picture, s sorts, arrows and Enter open one, b or Escape goes back, q quits.

    Exits by the highest level with --once, and by the one that was crossed with --until: 0 below all, 10 compact,
    20 clear, 30 brake, 40 kill, 50 held or being ended just now (--once). 1: gone, or nothing was crossed in the
    time of --for, or --source bpf cannot be had; 2: no such target.

    \b
    Examples:
      governor watch                                   all that is governed, and the largest others
      governor watch agents/claude-0                   a pod; also agents/claude-0/agent
      governor watch agent.service                     a unit of systemd; also a pid, or a cgroup's path
      governor watch self                              where it runs, as over kubectl exec
      governor watch self --json --for 60 | jq .memory.unreclaimable_ratio
      governor watch agent --once > /dev/null; [ $? -ge 30 ] && echo "it is close"
      governor watch agent --until crossing --for 600; [ $? -ge 10 ] && echo "it grew"
    """
    from governor import watch_place, watch_target
    from governor.watch_one import SOURCES, NoBpf
    from governor.watch_session import Session, Wanted

    if source not in SOURCES:
        fail(f"found --source {source!r}, expected {', '.join(SOURCES[:-1])} or {SOURCES[-1]}", 2)
    if until not in ("", "crossing"):
        fail(f"found --until {until!r}, expected crossing", 2)
    if once and source == "bpf":
        fail(
            "--source bpf loads programs, which takes longer than --once: expected --for SECONDS, or another source",
            2,
        )
    if target == "":
        fail(f"found an empty TARGET, expected {TARGET_WORDS}", 2)
    if seconds is not None and not seconds <= _LONGEST_S:
        fail(f"found --for {seconds:g}, expected at most {_LONGEST_S:g}", 2)
    if until and not target:
        fail("--until needs a TARGET: levels are a memcg's own", 2)
    watch_place.see_machine()
    try:
        targets = watch_target.resolve(target, standings) if target else []
        if until and len(targets) > 1:
            names = ", ".join(one.name for one in targets)
            fail(f"--until needs one container, {target} has {len(targets)}: {names}", 2)
        wanted = Wanted(
            targets=targets,
            source=source,
            as_json=json,
            as_lines=plain,
            ascii_only=ascii_only or "utf" not in (sys.stdout.encoding or "").lower(),
            once=once,
            for_ns=None if seconds is None else round(seconds * 1e9),
            until_crossing=bool(until),
            again=lambda: watch_target.resolve(target, standings) if target else [],
        )
        status = Session(wanted).run()
    except watch_target.Unknown as unknown:
        fail(str(unknown), 2)
    except NoBpf as error:
        fail(f"--source bpf: {error}")
    raise typer.Exit(status)
