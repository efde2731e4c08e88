"""Whether a governor is alive, and whether it protects: what /healthz and /readyz answer. Pure.

That the loop turns needs no look: it answers itself, so one that stalls does not answer at all, and a probe counts
that as failed once its own timeout is over.
"""

from __future__ import annotations

from dataclasses import dataclass

from governor.policy import SECOND

STALE_NS = 30 * SECOND  # of a look at a target; the slowest usual interval is a few seconds


@dataclass(frozen=True, slots=True)
class Vitals:
    """What is known of a governor at one moment; on the monotonic clock."""

    reflex_runs: bool
    reflex_silent: bool  # it runs, and has not been heard of for too long
    had_bpf: bool  # since this governor began
    has_bpf: bool
    scanned: bool  # discovery has looked at the whole tree once; True where there is none
    oldest_look_ns: int | None  # at a target; None: there is no target
    without_source: int  # targets that reflex does not watch yet


def faults(vitals: Vitals, now_ns: int) -> list[str]:
    """What a restart may mend; empty when it is well."""
    found = []
    if not vitals.reflex_runs or vitals.reflex_silent:
        found.append("reflex says nothing" if vitals.reflex_runs else "reflex does not run")
    if vitals.had_bpf and not vitals.has_bpf:
        found.append("the BPF programs are gone: polling only")
    age_ns = 0 if vitals.oldest_look_ns is None else now_ns - vitals.oldest_look_ns
    if age_ns > STALE_NS:
        found.append(f"a target was not looked at for {age_ns // SECOND} s, expected {STALE_NS // SECOND} s at most")
    return found


def not_ready(vitals: Vitals, now_ns: int) -> list[str]:
    """Why not everything that is to be protected is; empty when it is."""
    found = faults(vitals, now_ns)
    if not vitals.scanned:
        found.append("the first scan for containers is not over")
    if vitals.without_source:
        found.append(f"{vitals.without_source} targets are not watched by reflex yet")
    return found
