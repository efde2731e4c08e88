"""Whether a governor is alive, and whether it protects: what /healthz and /readyz answer. Pure.

That the loop turns needs no look: it answers itself, so one that stalls does not answer at all, and a probe counts
that as failed once its own timeout is over.
"""

from __future__ import annotations

from dataclasses import dataclass

from governor.policy import SECOND

LATE_NS = 30 * SECOND


@dataclass(frozen=True, slots=True)
class Vitals:
    """What is known of a governor at one moment."""

    reflex_runs: bool
    reflex_silent: bool  # it runs, and has not been heard of for too long
    had_bpf: bool  # since this governor began
    has_bpf: bool
    scanned: bool  # discovery has looked at the whole tree once; True where there is none
    late_ns: int  # how long the look at a target is overdue that is overdue for longest
    waiting: int  # targets of which reflex has not said yet whether it can watch them


def faults(vitals: Vitals) -> list[str]:
    """What a restart may mend; empty when it is well."""
    found = []
    if not vitals.reflex_runs or vitals.reflex_silent:
        found.append("reflex says nothing" if vitals.reflex_runs else "reflex does not run")
    if vitals.had_bpf and not vitals.has_bpf:
        found.append("the BPF programs are gone: polling only")
    if vitals.late_ns > LATE_NS:
        late_s, expected_s = vitals.late_ns // SECOND, LATE_NS // SECOND
        found.append(f"the look at a target is {late_s} s late, expected {expected_s} s at most")
    return found


def not_ready(vitals: Vitals) -> list[str]:
    """Why a start is not over: what is to be protected is not yet; empty when it is.

    Whoever cannot be protected is not waited for: one container of that kind says nothing of the others.
    """
    found = faults(vitals)
    if not vitals.scanned:
        found.append("the first scan for containers is not over")
    if vitals.waiting:
        found.append(f"{vitals.waiting} targets wait for reflex to watch them")
    return found
