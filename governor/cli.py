"""The command line. Parses, checks, prints; everything else is done elsewhere.

Exit status: 0 done (or already done by another instance), 1 it did not work, 2 the command was given wrongly.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import orjson
import typer

from governor import (
    __version__,
    cgroup,
    guard_options,
    instance,
    leftovers,
    pins,
    policy_directory,
    probe,
)
from governor.archive_cli import archive_app
from governor.cli_common import JsonOption, checked_instance, fail, lock_instance, out, reason
from governor.guard_cli import guard
from governor.journal import printable
from governor.policy_cli import policy_app
from governor.profile_cli import profile_app
from governor.replay_cli import replay
from governor.report_cli import report
from governor.run_cli import run
from governor.run_streams import fill_standard_streams
from governor.status_cli import status
from governor.target_cli import hold, off, why
from governor.watch_cli import watch
from governor.watch_place import HOST_ROOT

app = typer.Typer(
    help="Keeps AI agents' sessions alive when their containers run out of memory.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=True,
    rich_markup_mode=None,  # "[default: ...]" is text
    context_settings={"max_content_width": 118},
)
app.add_typer(archive_app, name="archive")
app.add_typer(policy_app, name="policy")
app.add_typer(profile_app, name="profile")
app.command(context_settings={"allow_interspersed_args": False})(run)
app.command()(status)
app.command()(report)
app.command()(watch)
app.command()(guard)
app.command()(hold)
app.command()(why)
app.command()(off)

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
def daemon(
    policies: Annotated[
        Path, typer.Option(help="A directory of policies (*.toml); who is selected by none is not governed.")
    ] = policy_directory.DIRECTORY,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Decide and journal, touch nothing.")] = False,
    state: Annotated[
        Path | None, typer.Option(help="Where journals and archives are [default: the state directory].")
    ] = None,
    host_root: Annotated[
        str, typer.Option(envvar=HOST_ROOT, help="Where the host's files are, for a daemon in a container.")
    ] = "/",
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
    lock_instance(checked_instance(name))
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
    lock_instance(checked_instance(name))
    result = probe.run_loader(name, attach)
    if error := result.get("error"):
        fail(f"cannot load the BPF programs: {error}; governor doctor shows what is missing")
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
    checked_instance(name)
    if not in_use:
        lock_instance(name)
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
    if name in ("freezer", "cgroup_kill"):
        return "not known: there is no memcg to look at"
    if isinstance(value, dict):
        return ", ".join(f"{module} {how}" for module, how in value.items()) or "not tried"
    return str(value) if value not in ("", None) else "none"


app.command()(replay)


def main() -> None:
    """Entry point of the `governor` command."""
    fill_standard_streams()
    try:
        app()
    except OSError as error:
        typer.echo(printable(f"governor: {reason(error)}"), err=True)
        sys.exit(1)
