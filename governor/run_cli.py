"""`governor run`: parses, makes the agent's memcg, finds out what guards it, and becomes governor.run by exec."""

from __future__ import annotations

import ctypes
import os
import sys
from fnmatch import fnmatchcase
from json import dumps
from pathlib import Path
from typing import Annotated

import typer

from governor import cgroup, guard_options, instance, kept_options, leftovers, profile_file, run_memcg
from governor.cli_common import fail
from governor.guard_options import Wishes
from governor.policy_keys import Unexpected, duration_ns, size_bytes
from governor.run_agent import NOT_EXECUTABLE

_SET_CHILD_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h; an exec keeps it
_LEAST_BYTES = 1 << 20
_LOGS = 20
# As reflex: without site-packages and environment, several MiB less, and nobody's PYTHONPATH.
_BOOT = "import sys; sys.path.insert(0, {root!r}); from governor.run import main; sys.exit(main(sys.argv[1:]))"


def run(
    command: Annotated[list[str], typer.Argument(metavar="-- COMMAND...", help="The agent, and its arguments.")],
    profile: Annotated[str, typer.Option(help="What kind of agent it is [default: known by its name].")] = "",
    memory_max: Annotated[
        str, typer.Option(help='Give the agent a memcg of its own with this limit, such as "2GiB".')
    ] = "",
    policy: Annotated[str, typer.Option(help="A preset's name or a policy file.")] = "default",
    archive: Annotated[
        list[str] | None,
        typer.Option(help="Session files, as a glob (~ is the agent user's home, ** any depth); may be repeated."),
    ] = None,
    compact: Annotated[str, typer.Option(help="Command that makes the agent compact its session.")] = "",
    archive_dir: Annotated[
        Path | None, typer.Option(help="Where archives are [default: under the state directory].")
    ] = None,
    journal: Annotated[Path | None, typer.Option(help="Journal file [default: in the state directory].")] = None,
    source: Annotated[
        str, typer.Option(help="auto (the best there is), bpf, psi or poll [default: the policy's].")
    ] = "",
    grace: Annotated[str, typer.Option(help="How long the agent has to end after SIGTERM.")] = "10s",
) -> None:
    """Run an agent and protect it: at a desk, or as the entry point of a container.

    Passes the terminal (or pipes), signals and the exit status through; 127: command not found, 126: not executable,
    128 + N: ended by signal N.

    Example: governor run --memory-max 2GiB -- claude
    """
    try:
        profile = profile or _known_by_name(command[0])
        compact_argv = guard_options.split(compact)
        wishes = Wishes(policy, archive or [], compact_argv, archive_dir, journal, source, profile)
        guard_options.check(wishes)
        limit_bytes = _limit(memory_max)
        grace_ns = _grace(grace)
        guard_options.check_policy(policy, "")
    except ValueError as error:
        fail(str(error), 2)
    pid = os.getpid()  # an exec keeps it
    socket_path = _socket_path(pid)
    if wishes.profile and socket_path:
        wishes = wishes._replace(channel=f"pty:{socket_path}")
    made, guard, unprotected = _protection(wishes, limit_bytes)
    if unprotected:
        _say(f"NOT PROTECTED: {unprotected}; the agent runs all the same")
    options = {
        "socket_path": socket_path,
        "log_path": _log_path(pid),
        "memcg": made,
        "guard": guard,
        "grace_ns": grace_ns,
        "without": _added_by_python(),
        "kept": _kept(wishes.profile, command),
    }
    ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    boot = _BOOT.format(root=str(Path(__file__).resolve().parent.parent))
    try:
        # The command as words: one may have 128 KiB, and as JSON it would have more.
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", boot, dumps(options), *command])
    except OSError as error:
        if made:
            run_memcg.remove(made)
        fail(f"the command cannot be started: {error.strerror}", NOT_EXECUTABLE)


def _protection(wishes: Wishes, limit_bytes: int) -> tuple[str, dict[str, object] | None, str]:
    """The memcg made for the agent ("": none), what its guard is told (None: no guard), and why there is none."""
    made = ""
    try:
        if limit_bytes:
            made = _made(limit_bytes)
        memcg = cgroup.Memcg(made) if made else run_memcg.own()
    except run_memcg.NoMemcg as error:
        made = _made(0)  # governor is in the root of cgroup v2, which is none: there one can be made
        if not made:
            return "", None, str(error)
        memcg = cgroup.Memcg(made)
    try:
        leftovers.sweep()
        wishes = wishes._replace(policy=guard_options.check_policy(wishes.policy, memcg.path))
        name = f"guard-{memcg.cgroup_id}"
        guard = guard_options.build(memcg, name, wishes, None)
    except ValueError as error:
        if made:
            run_memcg.remove(made)
        fail(str(error), 2)
    except OSError as error:
        return made, None, f"{error.filename or 'run-time files'}: {error.strerror or error}"
    locks = [guard_options.lock_name(memcg.cgroup_id), name]
    return made, guard | {"only_pid": True, "locks": locks, "resume_path": _resume_path()}, ""


def _made(limit_bytes: int) -> str:
    try:
        return run_memcg.make(limit_bytes)
    except run_memcg.NoMemcg as error:
        if limit_bytes:
            _say(f"no memcg for --memory-max: {error}. The limit of where the agent runs counts")
        return ""


def _limit(text: str) -> int:
    if not text:
        return 0
    try:
        found_bytes = size_bytes(text)
    except Unexpected as error:
        raise ValueError(f"found --memory-max {text!r}, expected {error}") from None
    if found_bytes < _LEAST_BYTES:
        raise ValueError(f'found --memory-max {text!r}, expected at least "1MiB"')
    return found_bytes


def _grace(text: str) -> int:
    try:
        return duration_ns(0 if text == "0" else text)
    except Unexpected as error:
        raise ValueError(f"found --grace {text!r}, expected {error}") from None


def _known_by_name(program: str) -> str:
    """The shipped profile of a program with this name; "" where there is none."""
    name = os.path.basename(program)  # noqa: PTH119  not a path of ours
    for profile in profile_file.profiles():
        if any(fnmatchcase(name, glob) for glob in profile_file.load(profile).profile.match.process):
            return profile
    return ""


def _kept(profile: str, command: list[str]) -> list[int]:
    """Which words of the agent's command it is given again when it is resumed: places, as the words may be long."""
    session = profile_file.load(profile).profile.session if profile else None
    return kept_options.places(session.keep_options, session.resume[0], command) if session and session.resume else []


def _log_path(pid: int) -> str:
    """A new log, "" where there can be none; all but the newest of those that ended are removed."""
    try:
        directory = instance.state_directory()
        logs = sorted(directory.glob("run-*.log*"), key=lambda path: path.lstat().st_mtime)
        for path in logs[:-_LOGS]:
            if not Path("/proc", path.name.split(".")[0].removeprefix("run-")).exists():
                path.unlink(missing_ok=True)
    except OSError:  # no directory: then nothing is guarded either, and that is said; or somebody else tidies up
        return ""
    return str(directory / f"run-{pid}.log")


def _resume_path() -> str:
    """Only a terminal goes on after an agent's end; of a pipe its reader has seen the end."""
    if not os.isatty(0):
        return ""
    return str(instance.run_directory() / f"run-{os.getpid()}.resume")


def _socket_path(pid: int) -> str:
    try:
        return str(instance.run_directory() / f"run-{pid}.sock")
    except OSError:
        return ""


def _added_by_python() -> list[str]:
    """Where the locale is C, Python sets LC_CTYPE for itself (PEP 538): not for the agent."""
    try:
        given = Path("/proc/self/environ").read_bytes()
    except OSError:
        return []
    was_there = any(line.startswith(b"LC_CTYPE=") for line in given.split(b"\0"))
    return ["LC_CTYPE"] if "LC_CTYPE" in os.environ and not was_there else []


def _say(text: str) -> None:
    typer.echo(f"governor: {text}", err=True)
