"""`governor replay`: what an old journal would lead to now, or by another policy."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from governor import policy_file
from governor.cli_common import JsonOption, fail
from governor.journal import printable

if TYPE_CHECKING:
    from governor.replay import Decision

_UNREADABLE_SHOWN = 5


def replay(
    journal: Annotated[
        Path, typer.Argument(metavar="JOURNAL", help="A journal; what was rotated away from it is read as well.")
    ],
    policy: Annotated[str, typer.Option(help="Decide by this preset or file instead.")] = "",
    json: JsonOption = False,
) -> None:
    """Decide again what a journal tells of, without a kernel.

    By the policy it was written under: prints what differs, and exits 1 if anything does. With --policy: prints the
    decisions that differ side by side.

    Example: governor replay ~/.local/state/governor/journal.ndjson --policy cautious
    """
    from governor import replay as replaying

    try:
        wanted = policy_file.load(policy).policy if policy else None
        steps = differing = unreadable = 0
        for decision in replaying.replay(replaying.files(journal), wanted):
            if isinstance(decision, replaying.Unreadable):
                unreadable += 1
                if unreadable <= _UNREADABLE_SHOWN:
                    typer.echo(f"governor: {printable(decision.where)} cannot be read: passed over", err=True)
                continue
            steps += 1
            if decision.recorded != decision.replayed:
                differing += 1
                typer.echo(orjson.dumps(decision).decode() if json else _side_by_side(decision))
    except policy_file.PolicyError as error:
        fail(str(error), 2)
    except replaying.ReplayError as error:
        fail(str(error))
    passed_over = f"; {unreadable} lines could not be read" if unreadable else ""
    typer.echo(f"governor: {steps} steps, {differing} of them decided otherwise{passed_over}", err=True)
    raise typer.Exit(1 if differing and not policy else 0)


def _side_by_side(decision: Decision) -> str:
    lines = [f"{decision.time}  {decision.event}"]
    for name, decided in (("recorded", decision.recorded), ("replayed", decision.replayed)):
        lines += [f"  {name}: {each}" for each in decided or ("nothing",)]
    return printable("\n".join(lines)).replace("\\n", "\n")
