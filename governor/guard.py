"""What a guard was asked to do, and the policy that comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from governor import policy_file, profile_file
from governor.model import Tier
from governor.policy import Delivery, Efficacy, Policy, Source
from governor.profile import Profile


@dataclass(frozen=True, slots=True)
class Guard:
    """What `governor guard` was asked to do; `guard_options` writes it, as JSON."""

    cgroup: str
    instance: str
    knob_path: str
    archive_directory: str
    journal_path: str
    agent_pid: int | None = None
    unload_at_end: bool = True
    source: str = ""  # "": as the policy says
    bpf_refused: str = ""  # why the programs are not to be loaded
    policy: str = "default"  # a preset's name or a file's path
    archive_globs: list[str] = field(default_factory=list)  # these two replace what policy and profile say
    compact_argv: list[str] = field(default_factory=list)
    profile: str = ""  # a profile's name or a file's path; "": none
    only_pid: bool = False  # agent_pid is the only agent there will be: whoever else is in the memcg is none
    resume_path: str = ""  # where governor run looks for what to start after the agent's end; "": nothing is resumed
    program: str = ""  # the agent's, as governor run was given it
    channel: str = ""  # the agent's terminal, as delivery.open_terminal has it
    recycled: str | None = None  # the agent came back by a recycle: "" compacted, else why not
    is_container: bool = False  # and not this one: its paths are not ours
    has_own_mounts: bool = False  # as Container has it
    ready_fd: int = -1  # who waits for protection to begin, as background.ready() tells it; -1: nobody


def read_profile(guard: Guard) -> Profile | None:
    """The profile that a guard names, or else its policy; raises FileError or OSError."""
    name = guard.profile or policy_file.load(guard.policy).policy.profile
    return profile_file.load(name).profile if name else None


def read_policy(guard: Guard, profile: Profile | None) -> Policy:
    """The policy that a guard names, with what the profile knows and its options replace.

    Raises PolicyError or OSError.
    """
    wanted = policy_file.load(guard.policy).policy
    if guard.compact_argv:
        wanted = replace(wanted, compact=replace(wanted.compact, exec=tuple(guard.compact_argv), signal=""))
    if profile:
        wanted = with_profile(wanted, profile)
    if guard.archive_globs:
        wanted = replace(wanted, archive=replace(wanted.archive, globs=tuple(guard.archive_globs)))
    if guard.source:
        wanted = replace(wanted, signals=replace(wanted.signals, source=Source(guard.source)))
    return wanted


def with_profile(wanted: Policy, profile: Profile) -> Policy:
    """A policy with what the profile knows where it leaves that open."""
    globs = tuple(dict.fromkeys((*wanted.archive.globs, *profile.session.globs)))
    return replace(
        wanted,
        compact=_known(wanted.compact, profile, Tier.COMPACT, profile.efficacy.compact),
        recycle=replace(wanted.recycle, peak_bytes=wanted.recycle.peak_bytes or profile.session.resume_peak_bytes),
        clear=_known(wanted.clear, profile, Tier.CLEAR, profile.efficacy.clear),
        archive=replace(wanted.archive, globs=globs),
    )


def _known(delivery: Delivery, profile: Profile, tier: Tier, prior: Efficacy) -> Delivery:
    """What the policy leaves open, as the profile has it; what it knows of its own ways says nothing of others."""
    if delivery.exec or delivery.signal:
        return delivery
    efficacy = prior if delivery.efficacy is Efficacy.UNKNOWN else delivery.efficacy
    return replace(delivery, efficacy=efficacy, signal="" if profile.text(tier) else profile.signal(tier))
