"""What governor does when: the built-in policy, as plain values. Pure; reads no file and no clock."""

from __future__ import annotations

from dataclasses import dataclass, field

from governor.record import Levels

MS = 1_000_000
SECOND = 1_000_000_000

# Relative to the home of the agent's user: where the agents that we know keep their sessions.
SESSION_GLOBS = (
    "~/.claude/projects/**/*.jsonl",
    "~/.claude/history.jsonl",
    "~/.codex/sessions/**/*.jsonl",
    "~/.gemini/tmp/*/chats/*.json*",
    "~/.local/share/opencode/opencode.db*",
)


@dataclass(frozen=True, slots=True)
class Policy:
    """The built-in policy protects a bare command; every value can stand as it is."""

    compact_ratio: float = 0.70
    brake_ratio: float = 0.90
    last_ratio: float = 0.97
    release_margin_ratio: float = 0.05
    # Under this a probation is always worth trying; above it only when max is at least probation_room_ns away.
    probation_ratio: float = 0.85
    probation_room_ns: int = 250 * MS
    unknown_rate_ratio: float = 0.93  # under this a probation is tried where no rate is known yet
    unheard_dwell_ns: int = 500 * MS
    probation_ns: int = 10 * SECOND
    compact_argv: tuple[str, ...] = ()
    compact_deadline_ns: int = 60 * SECOND
    compact_cooldown_ns: int = 240 * SECOND
    archive_globs: tuple[str, ...] = SESSION_GLOBS
    archive_deadline_ns: int = 30 * SECOND
    archive_limit_bytes: int = 4 << 30
    grace_ns: int = 10 * SECOND
    # While a terminated agent saves, memory.high is this share of the usage: 9 % over, each thread sleeps half a
    # second for every 64 pages it charges (calculate_high_delay in the kernel), so a burst leaves the handler time,
    # and a handler that needs a few batches still ends within the grace.
    throttle_ratio: float = 0.92
    levels: Levels = field(default_factory=Levels)
