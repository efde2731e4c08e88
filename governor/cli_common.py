"""What the modules of the command line share."""

from __future__ import annotations

from typing import Annotated, NoReturn

import typer

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def out(text: str) -> None:
    """A line on standard output."""
    typer.echo(text)


def fail(text: str, status: int = 1) -> NoReturn:
    """Say what is wrong, and exit."""
    typer.echo(f"governor: {text}", err=True)
    raise typer.Exit(status)
