"""What the modules of the command line share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, NoReturn, TypeVar

import typer

from governor import instance, pins
from governor.journal import printable
from governor.policy_keys import Key
from governor.toml_file import FileError

Loaded = TypeVar("Loaded")

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def out(text: str) -> None:
    """A line for people on standard output; what could steer a terminal is escaped."""
    typer.echo(printable(text))


def by_table(keys: dict[str, Key], line: Callable[[str, Key], str]) -> list[str]:
    """Lines of a TOML file: what `line` says of each path and its key, below the heading of its table."""
    lines: list[str] = []
    table = ""
    for path, key in keys.items():
        if key.table != table:
            table = key.table
            lines += ["", f"[{table}]"]
        lines.append(line(path, key))
    return lines


def load_or_exit(load: Callable[[str], Loaded], name_or_path: str) -> Loaded:
    """What a policy or a profile is read into; every fault of it is said, and the exit status is 2."""
    try:
        return load(name_or_path)
    except FileError as error:
        say_faults(error)
        raise typer.Exit(2) from None


def say_faults(error: FileError) -> None:
    """Every fault of a file, one a line, escaped as in `out`."""
    for fault in error.faults:
        typer.echo(printable(fault.text(error.where)), err=True)


def reason(error: OSError) -> str:
    """What is wrong with which file."""
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


def fail(text: str, status: int = 1) -> NoReturn:
    """Say what is wrong, escaped as in `out`, and exit."""
    typer.echo(printable(f"governor: {text}"), err=True)
    raise typer.Exit(status)


def lock(name: str) -> None:
    """Raises instance.Busy where a process has it."""
    try:
        instance.lock(name)
    except OSError as error:
        fail(f"{reason(error)}: expected a directory to write to; run it as root, or set XDG_RUNTIME_DIR to one")


def lock_instance(name: str) -> None:
    """A ring has one reader: an instance that runs is nobody else's to use, load or unload."""
    try:
        lock(name)
    except instance.Busy as busy:
        fail(f"instance {name!r} is in use by process {busy.pid}; choose another with --instance, or stop it first")


def checked_instance(name: str) -> str:
    """A name that an instance may have."""
    try:
        return pins.check_instance(name)
    except ValueError as error:
        fail(str(error), 2)
