"""`governor hold`, `why` and `off`: what a person says to the governors here, of everything or of one TARGET."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from governor import cgroup, guard_options, instance, limits, pins, watch_place
from governor.cli_common import fail, out
from governor.watch_cli import TARGET_WORDS, complete_target, standings
from governor.watch_target import Target, Unknown, resolve


def _argument(default: str) -> typer.models.ArgumentInfo:
    described = f"{TARGET_WORDS} [default: {default}]."
    argument = typer.Argument(metavar="[TARGET]", help=described, autocompletion=complete_target)
    assert isinstance(argument, typer.models.ArgumentInfo)
    return argument


CgroupOption = Annotated[str, typer.Option("--cgroup", help="The same by the memcg's path only.")]


def hold(
    duration: Annotated[str, typer.Argument(metavar="DURATION", help='For how long: "10m", "90s"; "0" ends a hold.')],
    target: Annotated[str | None, _argument("all that are guarded")] = None,
    path: CgroupOption = "",
) -> None:
    """Forbid everything but the brake for a while: no compact, clear, shed or terminate.

    In a container that a node's daemon governs it forbids what is done from there: compact, clear and a recycle.

    \b
    Examples:
      governor hold 10m                     all that you guard
      governor hold 10m agents/claude-0     the containers of this pod
      governor hold 0 agent.service         this one's hold is over
    """
    from governor import status_cli, veto
    from governor.policy_keys import Unexpected, duration_ns

    try:
        for_ns = duration_ns(0 if duration == "0" else duration)
    except Unexpected as error:
        fail(f"found {duration!r}, expected {error}", 2)
    targets = _targets(target, path)
    guarded = instance.guarded()
    found = [_guarded_id(one, guarded) for one in targets] if targets else list(guarded)
    held = list(dict.fromkeys(each for each in found if each in guarded))
    for cgroup_id in held:
        veto.hold(cgroup_id, for_ns)
    if not held:
        fail(_not_guarded(targets) if targets else "nothing is guarded: there is nothing to hold")
    for cgroup_id in held:
        what = f"nothing but the brake for {duration}" if for_ns else "the hold is over"
        out(f"process {guarded[cgroup_id]}: {what}")
    for pid, cgroup_id in {guarded[cgroup_id]: cgroup_id for cgroup_id in held if for_ns}.items():
        if status_cli.is_led(cgroup_id):
            out(f"process {pid}: {status_cli.LED}")


def why(target: Annotated[str | None, _argument("where this runs")] = None, path: CgroupOption = "") -> None:
    """Say what governor did to tools here, and how to try again; for the agent, or its next tool.

    \b
    Examples:
      governor why                     where this runs, as in the agent's shell
      governor why agents/claude-0     in this pod, from its node
    """
    from governor.told import read

    targets = _targets(target, path)
    if not targets:  # hybrid: both, and either may be the guarded one
        targets = [Target(own) for v1 in (False, True) if (own := cgroup.memcg_of("self", v1))]
    notices = []
    for place in dict.fromkeys(place for one in targets for place in _at_or_above(one)):
        with suppress(OSError):
            cgroup_id = os.stat(place).st_ino  # noqa: PTH116
            for directory in dict.fromkeys((Path("/run/governor"), instance.run_directory())):
                notices += read(cgroup_id, directory)
    for notice in notices:
        out(notice)
    if not notices:
        typer.echo("governor: nothing was done to a tool here", err=True)


def off(
    target: Annotated[str | None, _argument("every governor on this machine")] = None,
    name: Annotated[str, typer.Option("--instance", help="Only this one, by its name.")] = "",
) -> None:
    """Stop every governor on this machine, thaw all, restore all knobs, detach all programs.

    Without root only your own. With a TARGET only its guard, and what that held. A node's daemon is stopped for all
    that it governs, or for none: by --instance.

    \b
    Examples:
      governor off
      governor off agent.service
      governor off --instance node
    """
    from governor.switch_off import switch_off

    only: list[str] = []
    if name:
        if target is not None:
            fail("found a TARGET and --instance, expected one of them", 2)
        try:
            only = [pins.check_instance(name)]
        except ValueError as error:
            fail(str(error), 2)
    for one in _targets(target):
        only += _names_of_guard(one)
    for line in switch_off(dict.fromkeys(only)) or ["nothing was on"]:
        out(line)


def _targets(target: str | None, path: str = "") -> list[Target]:
    """Those that were named; none where none was."""
    if target is not None and path:
        fail("found a TARGET and --cgroup, expected one of them", 2)
    if target == "":
        fail(f"found an empty TARGET, expected {TARGET_WORDS}", 2)
    watch_place.see_machine()
    text = os.path.realpath(path) if path else target
    try:
        return resolve(text, standings) if text else []
    except Unknown as unknown:
        fail(str(unknown), 2)


def _at_or_above(target: Target) -> list[str]:
    path = os.path.realpath(target.path)
    return [path, *limits.ancestors(path)]


def _guarded_id(target: Target, guarded: dict[int, int]) -> int:
    """The cgroup id of the nearest memcg, at or above, that is guarded; 0 if none is."""
    for place in _at_or_above(target):
        with suppress(OSError):
            if (cgroup_id := os.stat(place).st_ino) in guarded:  # noqa: PTH116
                return cgroup_id
    return 0


def _not_guarded(targets: list[Target]) -> str:
    names = ", ".join(one.name for one in targets)
    return f"{names}: not guarded, or not by a governor of yours; governor status shows what is"


def _names_of_guard(target: Target) -> list[str]:
    """What the guard of a memcg has locked, its memcg first: of one that was killed, knobs are left by that name."""
    guarded = instance.guarded()
    try:
        cgroup_id = _guarded_id(target, guarded) or os.stat(target.path).st_ino  # noqa: PTH116
    except OSError:
        fail(f"{target.name}: the memcg is gone", 2)
    own = guard_options.lock_name(cgroup_id)
    others = [name for name in instance.held_by(guarded.get(cgroup_id, -1)) if name != own]
    for name in others:
        if instance.knob_file(name).exists():  # one for all that it governs: a guard's is its memcg's
            fail(
                f"{target.name} is governed by the daemon {name!r}, among others: governor off --instance {name} "
                "stops it for all; a policy that does not select it lets go of this one"
            )
    return [own, *others]
