"""`governor report`: a journal as a page, as Markdown or as JSON, for the post-mortem."""

from __future__ import annotations

import os
import secrets
import stat
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, BinaryIO, TextIO

import orjson
import typer

from governor import instance
from governor.cli_common import fail
from governor.journal import printable

if TYPE_CHECKING:
    from governor.report_words import Document

_LINE_LIMIT_BYTES = 1 << 20
_NODE_STATE = Path("/var/lib/governor")  # of the DaemonSet and of governor.service
_PATTERNS = ("*.ndjson", "containers/*.ndjson")
_OF_NODE = "journal-node.ndjson"  # who came and went; what happened to each is in a journal of its own
_ATTEMPTS, _BETWEEN_S = 20, 0.01  # to open all while the journal is rotated


class Format(Enum):
    """How a report is written."""

    HTML = "html"
    MD = "md"
    JSON = "json"


def report(
    journal: Annotated[
        Path | None,
        typer.Argument(
            metavar="[JOURNAL]",
            help="A journal; the files that were rotated away from it are read first. A pod, as NAMESPACE/POD or "
            "NAMESPACE/POD/CONTAINER, or a directory: the newest of it [default: of the state directories].",
        ),
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="Where to write it; - is standard output.")
    ] = "-",
    form: Annotated[
        Format | None, typer.Option("--format", help="[default: by the output's name, else html]")
    ] = None,
) -> None:
    """Tell from a journal when it started, who grew, what was done, what was lost, and how to get it back.

    HTML is one file with a timeline, and loads nothing from anywhere; Markdown is for an issue or a chat; JSON is
    described in governor/report_json.py.

    Example: governor report ~/.local/state/governor/journal.ndjson -o report.html

    Example: governor report agents/claude-0 --format md | less
    """
    from governor import report_read, report_words

    path = _meant(journal)
    form = form or next((one for one in Format if output.endswith(f".{one.value}")), Format.HTML)
    if form is Format.HTML and output == "-" and sys.stdout.isatty():
        fail("a page is not for a terminal: -o report.html writes it to a file, --format md is for reading here", 2)
    with ExitStack() as opened:
        journals = [opened.enter_context(one) for one in _opened(path)]
        if output != "-" and any(_is_open_as(Path(output), one) for one in journals):
            fail(f"found -o {output}, which is read for it, expected another file", 2)
        found = report_read.read(_lines(journals))
    if not found.histories:
        fail(f"{path}: {found.lines} lines, none of them a governor journal's{_others()}")
    _write(output, _rendered(report_words.document(found), form).encode())
    if output != "-":
        typer.echo(printable(f"governor: {output}: {path} in {form.value}"), err=True)


def _rendered(document: Document, form: Format) -> str:
    if form is Format.JSON:
        from governor import report_json

        return report_json.render(document)
    if form is Format.MD:
        from governor import report_markdown

        return report_markdown.render(document)
    from governor import report_html

    return report_html.render(document)


def _opened(path: Path) -> list[BinaryIO]:
    """A journal and the files rotated away from it, oldest first, all of them open before one is read.

    Raises OSError. The journal itself is opened first, and looked at again last: a rotation between is noticed.
    """
    from governor import replay

    for _ in range(_ATTEMPTS):
        with ExitStack() as opened, suppress(FileNotFoundError):
            newest = opened.enter_context(_open(path))
            older = [opened.enter_context(_open(one)) for one in reversed(replay.files(path)[:-1])]
            if _is_open_as(path, newest):
                opened.pop_all()
                return [one for one in (*reversed(older), newest) if stat.S_ISREG(os.fstat(one.fileno()).st_mode)]
        time.sleep(_BETWEEN_S)
    raise OSError(f"{path}: it is rotated faster than it can be opened")


def _open(path: Path) -> BinaryIO:
    """Without waiting for who might write to a pipe."""
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")


def _lines(journals: Iterable[BinaryIO]) -> Iterator[bytes]:
    for journal in journals:
        yield from iter(partial(journal.readline, _LINE_LIMIT_BYTES), b"")


def _journals(directory: Path | None = None) -> list[Path]:
    """In a directory, or in those where governors keep their state; newest first, but a node's own last."""
    places = [directory] if directory else dict.fromkeys((instance.state_directory(), _NODE_STATE))
    found: list[tuple[bool, float, Path]] = []
    for path in (path for place in places for pattern in _PATTERNS for path in place.glob(pattern)):
        with suppress(OSError):  # removed meanwhile
            found.append((path.name != _OF_NODE, path.stat().st_mtime, path))
    return [path for _, _, path in sorted(found, reverse=True) if path.is_file()]


def _meant(given: Path | None) -> Path:
    """The journal that is named, or the newest of those that are; that is said."""
    if given and given.is_file():
        return given
    if given and given.exists() and not given.is_dir():
        fail(f"{given}: found what is no regular file, expected a journal", 2)
    if given is None:
        found, of = _journals(), f"in {instance.state_directory()}: name one, as governor report JOURNAL"
    elif given.is_dir():
        found, of = _journals(given), f"in {given}"
    else:
        found = [path for path in _journals() if _is_of(path, str(given))]
        if not found:
            fail(f"{given}: found no such file, expected a journal, or a pod of which there is one{_others()}", 2)
    if not found:
        fail(f"found no journal {of}", 2)
    typer.echo(printable(f"governor: the newest journal: {found[0]}"), err=True)
    return found[0]


def _is_of(path: Path, name: str) -> bool:
    """Whether a journal tells of a pod, or a container of it, by its first line; see node's _shown()."""
    with suppress(OSError, ValueError, AttributeError), path.open("rb") as journal:
        target = str(orjson.loads(journal.readline(_LINE_LIMIT_BYTES)).get("target", "")).partition(" (")[0]
        return target == name or target.startswith(f"{name}/")
    return False


def _others() -> str:
    found = ", ".join(str(path) for path in _journals()[:3])
    return f"; there are {found}" if found else ""


def _is_open_as(path: Path, opened: BinaryIO | TextIO) -> bool:
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(opened.fileno()))
    return False


def _write(output: str, data: bytes) -> None:
    """A file is there whole or not at all, and no link that somebody laid there is followed; raises OSError."""
    path = Path(output)
    # Also by their other names: /dev/stdout is a link, which root could replace.
    if sink := next((one for one in (sys.stdout, sys.stderr) if output == "-" or _is_open_as(path, one)), None):
        sink.buffer.write(data)
        sink.flush()
    elif path.exists() and not path.is_file():  # a pipe, a device
        path.write_bytes(data)
    else:
        beside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise OSError(error.errno, error.strerror, output) from None
        try:
            with os.fdopen(fd, "wb") as sink:
                sink.write(data)
            beside.replace(path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
