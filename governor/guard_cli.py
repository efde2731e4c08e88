"""`governor guard`: parses, checks that nobody else guards the memcg, and becomes governor.guard_process by exec."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import orjson
import typer

from governor import background, cgroup, guard_options, instance, leftovers, run_memcg
from governor.archive_cli import ArchiveOption
from governor.cli_common import checked_instance, fail, lock, lock_instance
from governor.guard_options import Wishes


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
        name = checked_instance(name or f"guard-{memcg.cgroup_id}")
        wishes = wishes._replace(policy=guard_options.check_policy(policy, memcg.path))
    except ValueError as error:
        fail(f"{error}", 2)
    try:
        lock(guard_options.lock_name(memcg.cgroup_id))
    except instance.Busy as busy:
        typer.echo(f"governor: {path} is already guarded by process {busy.pid}; leaving it to that", err=True)
        raise typer.Exit(0) from None
    lock_instance(name)
    leftovers.sweep()
    options = guard_options.build(memcg, name, wishes, pid) | {"ready_fd": ready_fd}
    options["only_pid"] = pid is not None and target == "self"  # who else is there may be anybody
    typer.echo(f"governor: guarding {path}", err=True)
    if in_background:
        _leave(instance.state_directory() / f"{name}.log")
    argument = orjson.dumps(options).decode()
    os.execv(sys.executable, [sys.executable, "-P", "-m", "governor.guard_process", argument])


def _leave(log: Path) -> None:
    typer.echo(f"governor: in the background; its words go to {log}", err=True)
    try:
        background.leave_streams(log)
    except OSError as error:
        fail(f"no log for the guard: {error.strerror}: {error.filename}")


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
