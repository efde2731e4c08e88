"""`governor profile`: list, show and check profiles, and try one on a running agent without typing anything."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict
from json import dumps
from typing import Annotated, Any

import typer

from governor import profile_file
from governor.channels.terminal import ChannelError
from governor.cli_common import JsonOption, by_table, fail, load_or_exit, out
from governor.kept_options import PLACE
from governor.model import Tier
from governor.policy_keys import Key, flatten, written
from governor.profile import Profile
from governor.profile_agent import Agent
from governor.profile_file import KEYS, Loaded
from governor.profile_state import Seen

profile_app = typer.Typer(help="List, show, check and try profiles of agents.", no_args_is_help=True)

ProfileArgument = Annotated[str, typer.Argument(metavar="NAME|FILE", help="A profile's name, or a file.")]
_FILES_SHOWN = 20


@profile_app.command("list")
def list_profiles(json: JsonOption = False) -> None:
    """Print the profiles that come with governor, and whether they are proven."""
    for name, path in profile_file.profiles().items():
        standing = load_or_exit(profile_file.load, name).profile.standing.value
        about = path.read_text().partition("\n")[0].lstrip("# ")
        out(
            dumps({"name": name, "standing": standing, "about": about})
            if json
            else f"{name:15} {standing:12} {about}"
        )


@profile_app.command()
def check(profile: ProfileArgument) -> None:
    """Print every fault of a profile, one a line; exits 2 if there is one.

    Example: governor profile check mine.toml
    """
    loaded = load_or_exit(profile_file.load, profile)
    out(f"{profile}: good: profile {loaded.profile.name}, {loaded.profile.standing.value}")


@profile_app.command()
def show(profile: ProfileArgument, json: JsonOption = False) -> None:
    """Print a profile with every key; the output is a profile itself.

    Example: governor profile show generic-repl > mine.toml
    """
    loaded = load_or_exit(profile_file.load, profile)
    if json:
        typer.echo(dumps(asdict(loaded.profile), default=lambda member: member.value))
        return
    for line in as_toml(loaded):
        out(line)


@profile_app.command("try")
def try_profile(
    profile: ProfileArgument,
    pid: Annotated[int, typer.Option(help="The agent's process, or one that started it.")],
    tmux: Annotated[str, typer.Option(metavar="SOCKET:TARGET", help="The tmux server and pane it is in.")] = "",
    control: Annotated[str, typer.Option(metavar="PATH", help="The control socket of governor run.")] = "",
    json: JsonOption = False,
) -> None:
    """Say what a profile sees of a running agent and what it would do. Types nothing, sends nothing.

    Exits 0 if a command could be delivered now, 1 if not, 2 for a bad profile or argument.

    Example: governor profile try claude-code --pid 4711 --tmux /tmp/tmux-1000/default:0
    """
    if tmux and control:
        fail("found --tmux and --control, expected one of them", 2)
    if tmux and not all(tmux.partition(":")):
        fail(f"found --tmux {tmux!r}, expected SOCKET:TARGET, such as /tmp/tmux-1000/default:0", 2)
    loaded = load_or_exit(profile_file.load, profile)
    channel = f"tmux:{tmux}" if tmux else f"pty:{os.path.abspath(control)}" if control else ""  # noqa: PTH100
    told = attempt(loaded.profile, pid, channel)
    if json:
        typer.echo(dumps(told))
    else:
        for name, value in told.items():
            for line in value if isinstance(value, list) else [value]:
                out(f"{name:16} {line}")
    raise typer.Exit(0 if not told["why_not"] else 1)


def attempt(profile: Profile, pid: int, channel: str) -> dict[str, Any]:
    """What the profile sees of an agent and would do to it, by name; `why_not` is "" where it would be done."""
    from governor.actions.commands import handles
    from governor.delivery import open_terminal, refusal
    from governor.profile_agent import NoAgent, find_agent
    from governor.profile_state import look
    from governor.session_files import find, parse_pattern

    told: dict[str, Any] = {"profile": profile.name, "standing": profile.standing.value}
    try:
        agent = find_agent(profile.match, pid)
        terminal = open_terminal(channel, agent)
    except (NoAgent, ChannelError) as error:
        return told | {"why_not": str(error)}
    told |= {"agent_pid": agent.pid, "agent": f"{agent.name}, user {agent.uid}, home {agent.home}"}
    why_not = ""
    lines = None
    try:
        lines = terminal.screen() if terminal else None
    except ChannelError as error:
        why_not = str(error)
    seen = look(profile, agent, lines)
    told |= {"state": seen.state.value, "why": seen.why, "session": seen.session, "cwd": seen.cwd}
    told |= {"draft": seen.draft} if lines is not None else {}
    files = []
    for found in find([parse_pattern(glob, agent.home) for glob in profile.session.globs]):
        if found.fd is not None:
            files.append(f"{found.path} ({os.fstat(found.fd).st_size} bytes)")
            os.close(found.fd)
        if len(files) > _FILES_SHOWN:
            files[-1] = "..."
            break
    told["would_archive"] = files
    for tier in (Tier.COMPACT, Tier.CLEAR):
        told[f"would_{tier.value}"] = _would(profile, tier)
    told["would_recycle"] = _would_recycle(profile, agent, seen)
    if any(profile.text(tier) for tier in Tier):
        missing = "no terminal was named: give --tmux or --control"
        why_not = why_not or (missing if lines is None else refusal(profile, seen))
        if not why_not and seen.draft and not profile.type.stash:
            why_not = "a draft is in its input, and the profile knows no way to put it aside"
    else:
        names = {name for tier in Tier if (name := profile.signal(tier))}
        unheard = sorted(name for name in names if not handles(agent.pid, name))
        why_not = f"process {agent.pid} does not handle {', '.join(unheard)}" if unheard else ""
    return told | {"why_not": why_not}


def _would_recycle(profile: Profile, agent: Agent, seen: Seen) -> str:
    from governor import recycle, resume

    compacting = resume.command(profile, agent, "compact_stopped")
    again = resume.command(profile, agent, "resume")
    if not (profile.session.compact_stopped and profile.session.resume_peak_bytes):
        return "nothing: not known"
    if why_not := recycle.refusal(profile, agent, seen):
        return f"nothing now: {why_not}"
    peak_mib = profile.session.resume_peak_bytes >> 20
    steps = [
        " ".join(word if word == PLACE else shlex.quote(word) for word in words) for words in (compacting, again)
    ]
    return (
        f"end it with SIGTERM, run {steps[0]}, then {steps[1]}, by governor run only, where "
        f"compact frees nothing and up to {peak_mib} MiB of it fit beside the others"
    )


def _would(profile: Profile, tier: Tier) -> str:
    typing = profile.type
    if text := profile.text(tier):
        steps = [f"put a draft aside with {typing.stash!r}"] if typing.stash else []
        steps += [f"type {typing.before + text!r}", f"wait {typing.pause_ns // 1_000_000} ms", "look again"]
        return ", ".join(
            [*steps, f"press {typing.enter!r}", f"await its effect for {profile.confirm.within_ns // 10**9} s"]
        )
    return f"send {profile.signal(tier)}" if profile.signal(tier) else "nothing: not known"


def as_toml(loaded: Loaded) -> list[str]:
    """Lines of a profile that is read as the same one; keys that the file leaves out are comments."""
    values = flatten(loaded.profile, KEYS)

    def line(path: str, key: Key) -> str:
        given = path in loaded.lines or not key.table
        return f"{'' if given else '# '}{key.name} = {written(key, values[path])}"

    return by_table(KEYS, line)
