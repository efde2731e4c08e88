"""What a guard is told, from what the command line was given: `governor guard` and `governor run` say it alike.

Does not take the guard's locks: the process that becomes the guard does (see lock()).
"""

from __future__ import annotations

import os
import shlex
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

from governor import cgroup, instance, pins, policy_file, probe, profile_file
from governor.session_files import parse_pattern

SOURCES = ("", "auto", "bpf", "psi", "poll")


class Wishes(NamedTuple):
    """The options that both commands have, as they were given."""

    policy: str = "default"
    archive_globs: list[str] = []  # noqa: RUF012  never changed
    compact_argv: list[str] = []  # noqa: RUF012
    archive_directory: Path | None = None
    journal: Path | None = None
    source: str = ""
    profile: str = ""
    channel: str = ""  # as delivery.open_terminal has it


def split(compact: str) -> list[str]:
    """The words of a command that is written as for a shell; raises ValueError."""
    try:
        return shlex.split(compact)
    except ValueError as error:
        raise ValueError(f"found --compact {compact!r}, expected a command as for a shell: {error}") from None


def check(wishes: Wishes) -> None:
    """Raises ValueError for a source or a glob that is none."""
    if wishes.source not in SOURCES:
        raise ValueError(f"found --source {wishes.source!r}, expected auto, bpf, psi or poll")
    for glob in wishes.archive_globs:
        parse_pattern(glob, "/")
    if wishes.profile:
        try:
            profile_file.load(wishes.profile)
        except profile_file.ProfileError as error:
            raise ValueError(f"found --profile {wishes.profile!r}: {error}") from None
    kind, _, where = wishes.channel.partition(":")
    if wishes.channel and not ((kind == "tmux" and ":" in where) or (kind == "pty" and where)):
        raise ValueError(f"found channel {wishes.channel!r}, expected tmux:SOCKET:TARGET or pty:CONTROL_SOCKET")
    if wishes.channel and not wishes.profile:
        raise ValueError("found a channel without a profile: what to type is not known; governor profile list")


def check_policy(policy: str, target: str) -> str:
    """The preset's name, or the absolute path of a good file that is for this target ("": any); raises ValueError."""
    try:
        loaded = policy_file.load(policy).policy
    except policy_file.PolicyError as error:
        raise ValueError(str(error)) from None
    if not target:
        return policy
    below = str(Path(target).relative_to(cgroup.ROOT)) if Path(target).is_relative_to(cgroup.ROOT) else target
    globs = loaded.select.cgroup
    if globs and not any(fnmatchcase(below, glob) for glob in globs):
        raise ValueError(f"policy {loaded.name!r} selects {', '.join(globs)}, which {below} is not")
    return policy if policy in policy_file.presets() else os.path.abspath(policy)  # noqa: PTH100  no link is followed


def build(memcg: cgroup.Memcg, name: str, wishes: Wishes, agent_pid: int | None) -> dict[str, object]:
    """The fields of guard.Guard; `name` is an instance's. Raises OSError where there can be no run-time files."""
    loaded_before = pins.current(name) is not None and not name.startswith("guard-")
    state = instance.state_directory()
    return {
        "cgroup": memcg.path,
        "instance": name,
        "knob_path": str(instance.knob_file(lock_name(memcg.cgroup_id))),
        "archive_directory": str((wishes.archive_directory or state / "archive").absolute()),
        "journal_path": str((wishes.journal or state / f"journal-{name}.ndjson").absolute()),
        "agent_pid": agent_pid,
        "unload_at_end": not loaded_before,
        "source": wishes.source,
        "bpf_refused": "" if pins.current(name) else _bpf_refused(memcg),
        "policy": wishes.policy,
        "archive_globs": wishes.archive_globs,
        "compact_argv": wishes.compact_argv,
        "profile": _absolute(wishes.profile),
        "channel": wishes.channel,
    }


def _absolute(profile: str) -> str:
    known = not profile or profile in profile_file.profiles()
    return profile if known else os.path.abspath(profile)  # noqa: PTH100  no link is followed


def lock_name(cgroup_id: int) -> str:
    """The lock of whoever guards a memcg."""
    return f"memcg-{cgroup_id}"


def _bpf_refused(memcg: cgroup.Memcg) -> str:
    if not memcg.v1 and cgroup.is_inside(cgroup.memcg_of("self"), memcg.path):
        return "governor runs inside the memcg, and compiling would take 160 MiB of it"
    return bpf_refused(memcg.v1)


def bpf_refused(v1: bool) -> str:
    """Why the programs are not to be loaded; "" where they are to be tried."""
    if v1:
        return "the programs watch memcgs of cgroup v2"
    verdict = probe.decide(probe.probe())
    return "" if verdict.source == "bpf" else verdict.reason.removeprefix("no BPF: ")
