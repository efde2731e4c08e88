"""`python -m governor.agent profile script.py ARGUMENTS`: run a script, and say where its memory went.

The report goes to standard error (or to a file) when the script ends, by itself, by Ctrl-C or by SIGTERM; the exit
status is the script's.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn, TextIO

from governor.agent.profiling import Profiler

_FRAMES_LIMIT = (1 << 16) - 1  # tracemalloc's own
_TERMINATED = 128 + signal.SIGTERM


def main(words: list[str] | None = None) -> int:
    """Parse the command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m governor.agent")
    profile = parser.add_subparsers(required=True).add_parser(
        "profile", help="run a script, say where its memory went"
    )
    profile.add_argument("--interval", type=_seconds, default=0.5, metavar="S", help="between two samples (0.5)")
    profile.add_argument(
        "--baseline-after", type=_seconds, default=0.0, metavar="S", help="what warms up is not growth"
    )
    profile.add_argument("--frames", type=_frames, metavar="N", help="kept of each allocation (1; 10 by traceback)")
    profile.add_argument("--top", type=int, default=10, metavar="N", help="places that are shown (10)")
    profile.add_argument("--by", choices=("lineno", "traceback"), default="lineno", help="what a place is (lineno)")
    profile.add_argument("--output", type=Path, metavar="FILE", help="for the report")
    profile.add_argument("script", type=Path)
    profile.add_argument("arguments", nargs=argparse.REMAINDER)
    given = parser.parse_args(words)
    try:
        code = compile(given.script.read_bytes(), str(given.script), "exec", dont_inherit=True)
    except (OSError, SyntaxError, ValueError) as error:
        parser.exit(2, f"{parser.prog}: {given.script}: {error}; expected a Python script\n")
    try:
        output = given.output.open("w") if given.output else None
    except OSError as error:
        parser.exit(2, f"{parser.prog}: --output {given.output}: {error.strerror}; expected a file to write to\n")
    with Profiler(given.frames or (10 if given.by == "traceback" else 1), given.interval) as profiler:
        later = threading.Timer(given.baseline_after, profiler.baseline)
        later.daemon = True
        later.start() if given.baseline_after else profiler.baseline()
        status = _run(given.script, given.arguments, lambda module: exec(code, vars(module)))  # noqa: S102  as asked
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the report is what it asks for
        later.cancel()
        report = profiler.report(given.top, given.by) + "\n"
    _write(report, output)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return status


def _write(report: str, output: TextIO | None) -> None:
    try:
        with output or nullcontext(sys.stderr) as file:
            file.write(report)
    except OSError as error:
        if not output:
            raise
        sys.stderr.write(f"{output.name}: {error.strerror}\n{report}")


def _run(script: Path, arguments: list[str], execute: Callable[[types.ModuleType], None]) -> int:
    """As Python would, with its threads; the module stays as it is at the end: what it holds is still seen."""
    module = types.ModuleType("__main__")
    module.__file__ = str(script)
    sys.modules["__main__"] = module
    sys.argv = [str(script), *arguments]
    sys.path[0] = str(script.resolve().parent)
    signal.signal(signal.SIGTERM, _terminated)
    status = _ended(lambda: execute(module))
    return status if status == _TERMINATED else _ended(_join_threads) or status


def _join_threads() -> None:
    own = threading.current_thread()
    while others := [each for each in threading.enumerate() if each is not own and not each.daemon]:
        others[0].join()


def _ended(run: Callable[[], None]) -> int:
    """The exit status, and what Python says of it."""
    try:
        run()
    except SystemExit as ended:
        return _status(ended)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except BaseException as error:  # noqa: BLE001  as the interpreter does at the top
        frames = error.__traceback__
        while frames and frames.tb_frame.f_code.co_filename == __file__:
            frames = frames.tb_next
        sys.excepthook(type(error), error.with_traceback(frames), frames)
        return 1
    return 0


def _status(ended: SystemExit) -> int:
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    sys.stderr.write(f"{ended.code}\n")
    return 1


def _terminated(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _frames(word: str) -> int:
    value = int(word)
    if not 1 <= value <= _FRAMES_LIMIT:
        raise argparse.ArgumentTypeError(f"found {word}, expected 1 to {_FRAMES_LIMIT}")
    return value


def _seconds(word: str) -> float:
    value = float(word)
    if not 0 <= value <= threading.TIMEOUT_MAX:  # NaN is not, either
        raise argparse.ArgumentTypeError(f"found {word}, expected 0 or more seconds")
    return value


if __name__ == "__main__":
    sys.exit(main())
