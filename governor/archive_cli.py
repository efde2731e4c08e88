"""`governor archive`: list, verify and restore archived sessions."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import orjson
import typer

from governor import archive, instance
from governor.cli_common import JsonOption, fail, out
from governor.journal import printable
from governor.report_figures import plural

archive_app = typer.Typer(help="List, verify and restore archived sessions.", no_args_is_help=True)

ArchiveOption = Annotated[
    Path | None,
    typer.Option("--archive-dir", help="Where archives are [default: under the state directory]."),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="An archive, as list names it.")]


@archive_app.command("list")
def archive_list(directory: ArchiveOption = None, json: JsonOption = False) -> None:
    """Archives, oldest first."""
    where = _archives(directory)
    usual = _archives(None)
    others = archive.names(usual) if where.resolve() != usual.resolve() else []
    if others:
        typer.echo(
            f"governor: {len(others)} more in {usual}, the usual place and the one when another is full", err=True
        )
    names = archive.names(where)
    if not names:
        typer.echo(printable(f"governor: no archives in {where}"), err=True)
    for name in names:
        try:
            manifest = archive.read_manifest(where, name)
        except archive.ArchiveError as error:
            typer.echo(f"governor: {error}", err=True)
            continue
        if json:
            typer.echo(orjson.dumps(manifest).decode())
        else:
            size_bytes = sum(entry.size_bytes for entry in manifest.files)
            out(f"{name}  {plural(len(manifest.files), 'file')}, {size_bytes} bytes  {manifest.reason}")


@archive_app.command("verify")
def archive_verify(name: NameArgument, directory: ArchiveOption = None) -> None:
    """Read an archive and compare every file with the manifest."""
    try:
        manifest = archive.verify(_archives(directory), name)
    except archive.ArchiveError as error:
        fail(str(error))
    files = plural(len(manifest.files), "file is", "files are")
    out(f"{name}: {files} as the manifest says")


@archive_app.command("restore")
def archive_restore(
    name: NameArgument,
    to: Annotated[Path, typer.Option(help="Directory below which the files are written; / for where they were.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there.")] = False,
    directory: ArchiveOption = None,
) -> None:
    """Verify an archive, then write its files below a directory."""
    try:
        written = archive.restore(_archives(directory), name, to, overwrite)
    except archive.ArchiveError as error:
        fail(str(error))
    for path in written:
        out(str(path))


def _archives(directory: Path | None) -> Path:
    return directory or instance.state_directory() / "archive"
