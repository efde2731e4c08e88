"""The command line. Parses, checks, prints; everything else is done elsewhere.

Exit status: 0 done (or already done by another instance), 1 it did not work, 2 the command was given wrongly.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import orjson
import typer

from governor import (
    __version__,
    background,
    cgroup,
    guard_options,
    instance,
    leftovers,
    limits,
    pins,
    policy_directory,
    policy_file,
    probe,
    run_memcg,
)
from governor.archive_cli import ArchiveOption, archive_app
from governor.cli_common import JsonOption, fail, out, reason
from governor.guard_options import Wishes
from governor.journal import printable
from governor.policy_cli import policy_app
from governor.profile_cli import profile_app
from governor.run_cli import run
from governor.run_streams import fill_standard_streams
from governor.status_cli import status

if TYPE_CHECKING:
    from governor.replay import Decision

app = typer.Typer(
    help="Keeps AI agents' sessions alive when their containers run out of memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,  # "[default: ...]" is text
    context_settings={"max_content_width": 118},
)
app.add_typer(archive_app, name="archive")
app.add_typer(policy_app, name="policy")
app.add_typer(profile_app, name="profile")
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command()(status)

_UNREADABLE_SHOWN = 5
_NOT_LOADED = "none are loaded, and --no-load was given"
InstanceOption = Annotated[str, typer.Option("--instance", help="Name of the set of BPF programs.")]


@app.callback(invoke_without_command=True)
def _global(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out(f"governor {__version__}, BPF programs {pins.program_version()}")
        raise typer.Exit


@app.command()
def guard(
    target: Annotated[str, typer.Option("--cgroup", help='The memcg to protect: below /sys/fs/cgroup, or "self".')],
    pid: Annotated[int | None, typer.Option(help="The agent's process [default: the memcg's oldest].")] = None,
    archive: Annotated[
        list[str] | None,
        typer.Option(help="Session files, as a glob (~ is the agent user's home, ** any depth); may be repeated."),
    ] = None,
    compact: Annotated[str, typer.Option(help="Command that makes the agent compact its session.")] = "",
    policy: Annotated[str, typer.Option(help="A preset's name or a policy file; SIGHUP reads it again.")] = "default",
    archive_dir: ArchiveOption = None,
    journal: Annotated[Path | None, typer.Option(help="Journal file [default: in the state directory].")] = None,
    name: Annotated[str, typer.Option("--instance", help="[default: guard-<cgroup id>]")] = "",
    source: Annotated[
        str, typer.Option(help="auto (the best there is), bpf, psi or poll [default: the policy's].")
    ] = "",
    profile: Annotated[str, typer.Option(help="What kind of agent it is: governor profile list.")] = "",
    channel: Annotated[str, typer.Option(help="The agent's terminal: tmux:SOCKET:TARGET.")] = "",
    in_background: Annotated[
        bool, typer.Option("--background", help="Go on after this command, which ends once protection has begun.")
    ] = False,
) -> None:
    """Protect the processes of one memcg; "self" is the one that this command runs in, as in a container.

    Example: governor guard --cgroup /sys/fs/cgroup/system.slice/agent.service
    """
    ready_fd = background.detach() if in_background else -1
    try:
        compact_argv = guard_options.split(compact)
        wishes = Wishes(policy, archive or [], compact_argv, archive_dir, journal, source, profile, channel)
        guard_options.check(wishes)
        path, memcg = _check_target(target, pid)
        name = _checked(name or f"guard-{memcg.cgroup_id}")
        wishes = wishes._replace(policy=guard_options.check_policy(policy, memcg.path))
    except ValueError as error:
        fail(f"{error}", 2)
    try:
        _lock(guard_options.lock_name(memcg.cgroup_id))
    except instance.Busy as busy:
        typer.echo(f"governor: {path} is already guarded by process {busy.pid}; leaving it to that", err=True)
        raise typer.Exit(0) from None
    _lock_instance(name)
    leftovers.sweep()
    options = guard_options.build(memcg, name, wishes, pid) | {"ready_fd": ready_fd}
    options["only_pid"] = pid is not None and target == "self"  # who else is there may be anybody
    typer.echo(f"governor: guarding {path}", err=True)
    if in_background:
        _leave(instance.state_directory() / f"{name}.log")
    argument = orjson.dumps(options).decode()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "governor.loop", argument])


def _leave(log: Path) -> None:
    typer.echo(f"governor: in the background; its words go to {log}", err=True)
    try:
        background.leave_streams(log)
    except OSError as error:
        fail(f"no log for the guard: {error.strerror}: {error.filename}")


def _lock(name: str) -> None:
    try:
        instance.lock(name)
    except OSError as error:
        fail(f"{reason(error)}: expected a directory to write to; run it as root, or set XDG_RUNTIME_DIR to one")


def _lock_instance(name: str) -> None:
    """A ring has one reader: an instance that runs is nobody else's to use, load or unload."""
    try:
        _lock(name)
    except instance.Busy as busy:
        fail(f"instance {name!r} is in use by process {busy.pid}; choose another with --instance, or stop it first")


def _check_target(target: str, pid: int | None) -> tuple[Path, cgroup.Memcg]:
    root = Path(cgroup.ROOT)
    try:
        path = Path(run_memcg.own().path if target == "self" else os.path.realpath(target))
    except run_memcg.NoMemcg as error:
        fail(str(error), 2)
    try:
        memcg = cgroup.Memcg(str(path))
    except OSError:
        fail(
            f"found no memcg at {target} that may be read, expected a directory below {root} with a memory.max, or "
            "memory.limit_in_bytes of cgroup v1; governor doctor shows what this machine has",
            2,
        )
    if pid is not None:
        where = cgroup.memcg_of(pid, memcg.v1)
        if where is None:
            fail(f"found no process {pid}", 2)
        if not cgroup.is_inside(where, str(path)):
            fail(f"process {pid} is in {where}, expected it in {path}", 2)
    return path, memcg


def _checked(name: str) -> str:
    try:
        return pins.check_instance(name)
    except ValueError as error:
        fail(str(error), 2)


def _load(name: str, attach: str) -> dict[str, str]:
    result = probe.run_loader(name, attach)
    if error := result.get("error"):
        fail(f"cannot load the BPF programs: {error}; governor doctor shows what is missing")
    return result


@app.command()
def daemon(
    policies: Annotated[
        Path, typer.Option(help="A directory of policies (*.toml); who is selected by none is not governed.")
    ] = policy_directory.DIRECTORY,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and journal, touch nothing.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Where journals and archives are [default: the state directory].")
    ] = None,
    host_root: Annotated[str, typer.Option(help="Where the host's files are, for a daemon in a container.")] = "/",
    source: Annotated[str, typer.Option(help="auto (the best there is), bpf, psi or poll.")] = "auto",
    name: Annotated[str, typer.Option("--instance")] = "node",
    listen: Annotated[
        str, typer.Option(help="Where /metrics, /healthz and /readyz are answered: ADDRESS:PORT [default: nowhere].")
    ] = "",
    no_load: Annotated[
        bool, typer.Option("--no-load", help="Compile nothing: use what governor load has loaded, else poll.")
    ] = False,
) -> None:
    """Protect every container of this node that a policy selects; SIGHUP reads the policies again.

    Example: governor daemon --policies /etc/governor/policies --dry-run
    """
    from governor.http_endpoint import parse_address

    if os.geteuid() != 0:
        fail("governor daemon governs other users' containers: run it as root")
    if source not in guard_options.SOURCES[1:]:
        fail(f"found --source {source!r}, expected auto, bpf, psi or poll", 2)
    try:
        if listen:
            parse_address(listen)
    except ValueError as error:
        fail(f"--listen: {error}", 2)
    try:
        policy_directory.load(policies)
    except policy_directory.PoliciesError as error:
        fail("\n".join(fault.text(each.where) for each in error.errors for fault in each.faults), 2)
    _lock_instance(_checked(name))
    leftovers.sweep()
    v1 = not Path(cgroup.ROOT, "cgroup.controllers").exists()
    wanted = {
        "instance": name,
        "knob_path": str(instance.knob_file(name)),
        "policies": str(policies.absolute()),
        "state": str((state or instance.state_directory()).absolute()),
        "cgroup_root": cgroup.ROOT_V1 if v1 else cgroup.ROOT,
        "host_root": host_root,
        "dry_run": dry_run,
        "source": source,
        "listen": listen,
        "bpf_refused": "" if pins.current(name) else _NOT_LOADED if no_load else guard_options.bpf_refused(v1),
        "unload_at_end": pins.current(name) is None,
    }
    os.execv(sys.executable, [sys.executable, "-P", "-m", "governor.node", orjson.dumps(wanted).decode()])


@app.command()
def load(
    name: InstanceOption = "default",
    attach: Annotated[str, typer.Option(help="auto (fentry, else kprobe), fentry or kprobe.")] = "auto",
    json: JsonOption = False,
) -> None:
    """Compile, attach and pin the BPF programs; they stay until `governor unload`."""
    if attach not in ("auto", "fentry", "kprobe"):
        fail(f"found --attach {attach!r}, expected auto, fentry or kprobe", 2)
    _lock_instance(_checked(name))
    result = _load(name, attach)
    if json:
        typer.echo(orjson.dumps({"instance": name, "modules": result}).decode())
        return
    for module, how in result.items():
        out(f"{module:8} {how}")


@app.command()
def unload(
    name: InstanceOption = "default",
    in_use: Annotated[
        bool, typer.Option("--in-use", help="Also while a governor uses it, which polls from then on.")
    ] = False,
) -> None:
    """Detach and unpin the BPF programs of an instance."""
    _checked(name)
    if not in_use:
        _lock_instance(name)
    if not pins.unload(name):
        known = ", ".join(pins.instances()) or "none"
        fail(f"found no instance {name!r}; loaded: {known}")
    out(f"{name} is unloaded")


@app.command()
def doctor(
    json: JsonOption = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do not try to attach the programs.")] = False,
) -> None:
    """Say what this machine can do, which source governor would use and why, and what is missing.

    Exits 1 if nothing works.
    """
    facts = probe.probe()
    verdict = probe.decide(facts)
    if verdict.source == "bpf" and not quick:
        facts = probe.Facts(**asdict(facts) | {"loaded": probe.try_load()})
        verdict = probe.decide(facts)
    if json:
        typer.echo(orjson.dumps({"facts": asdict(facts), "verdict": asdict(verdict)}).decode())
    else:
        for name, value in asdict(facts).items():
            out(f"{name:20} {_fact(name, value)}")
        out("")
        out(f"source: {verdict.source}: {verdict.reason}")
        out(f"brake: {verdict.brake}")
        for missing in verdict.missing:
            out(f"  - {missing}")
    raise typer.Exit(0 if verdict.source != "none" else 1)


def _fact(name: str, value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if name == "capabilities":
        return f"{value:#x}"
    if isinstance(value, dict):
        return ", ".join(f"{module} {how}" for module, how in value.items()) or "not tried"
    return str(value) if value not in ("", None) else "none"


@app.command()
def watch(
    target: Annotated[str, typer.Argument(metavar="CGROUP", help="A memcg: a path below /sys/fs/cgroup.")],
    json: JsonOption = False,
    seconds: Annotated[float | None, typer.Option("--for", help="Stop after so many seconds.")] = None,
) -> None:
    """Print a line a second and every crossing of a memcg; reads only.

    Example: governor watch /sys/fs/cgroup/system.slice/agent.service
    """
    from governor.watch import run

    path = Path(os.path.realpath(target))
    if not (path / "memory.current").exists():
        fail(f"found no memcg of cgroup v2 at {target}, expected one below {cgroup.ROOT}, with a memory.current", 2)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with suppress(KeyboardInterrupt):
        run(path, json, seconds)


@app.command()
def hold(
    duration: Annotated[str, typer.Argument(metavar="DURATION", help='For how long: "10m", "90s"; "0" ends a hold.')],
    target: Annotated[str, typer.Option("--cgroup", help="Only this memcg [default: all that are guarded].")] = "",
) -> None:
    """Forbid everything but the brake for a while: no compact, clear, shed or terminate.

    Example: governor hold 10m
    """
    from governor import veto
    from governor.policy_keys import Unexpected, duration_ns

    try:
        for_ns = duration_ns(0 if duration == "0" else duration)
    except Unexpected as error:
        fail(f"found {duration!r}, expected {error}", 2)
    if target and not Path(target).is_dir():
        fail(f"found no memcg at {target}, expected a directory below {cgroup.ROOT}", 2)
    guarded = instance.guarded()
    wanted = [Path(os.path.realpath(target)).stat().st_ino] if target else list(guarded)
    held = [cgroup_id for cgroup_id in wanted if cgroup_id in guarded]
    for cgroup_id in held:
        veto.hold(cgroup_id, for_ns)
    if not held:
        fail(f"{target} is not guarded" if target else "nothing is guarded: there is nothing to hold")
    for cgroup_id in held:
        what = f"nothing but the brake for {duration}" if for_ns else "the hold is over"
        out(f"process {guarded[cgroup_id]}: {what}")


@app.command()
def why(
    target: Annotated[str, typer.Option("--cgroup", help="A memcg [default: the one this runs in].")] = "",
) -> None:
    """Say what governor did to tools here, and how to try again; for the agent, or its next tool.

    Example: governor why
    """
    from governor.told import read

    if target and not Path(target).is_dir():
        fail(f"found no memcg at {target}, expected a directory below {cgroup.ROOT}", 2)
    notices = []
    own = (cgroup.memcg_of("self", v1) for v1 in (False, True))  # hybrid: both, and either may be the guarded one
    paths = [os.path.realpath(target)] if target else [path for path in own if path]
    for place in dict.fromkeys(place for path in paths for place in (path, *limits.ancestors(path))):
        with suppress(OSError):
            cgroup_id = os.stat(place).st_ino  # noqa: PTH116
            for directory in dict.fromkeys((Path("/run/governor"), instance.run_directory())):
                notices += read(cgroup_id, directory)
    for notice in notices:
        out(notice)
    if not notices:
        typer.echo("governor: nothing was done to a tool here", err=True)


@app.command()
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


@app.command()
def off(
    name: Annotated[str, typer.Option("--instance", help="Only this one [default: all].")] = "",
) -> None:
    """Stop every governor on this machine, thaw all, restore all knobs, detach all programs.

    Without root only your own.
    """
    from governor.switch_off import switch_off

    for line in switch_off(name and _checked(name)) or ["nothing was on"]:
        out(line)


def main() -> None:
    """Entry point of the `governor` command."""
    fill_standard_streams()
    try:
        app()
    except OSError as error:
        typer.echo(printable(f"governor: {reason(error)}"), err=True)
        sys.exit(1)
