"""What a person hears of a warning: that something comes, how to forbid it, and how the warning ended. Pure."""

from __future__ import annotations

from governor.model import Deliver, Instruction, Phase, Restart, State, Terminate, Tier, TierState, Warn
from governor.policy import SECOND
from governor.tiers import since

SHOWN = frozenset(  # of the journal's kinds: what a person is shown where the agent is
    {"warning", "warning_over", "terminating", "told", "oom_kills", "oom_killed", "nothing_left"}
)
_VETO, _ON_NODE = "to forbid it: governor hold 10m", ", on the node"  # what is in a container forbids nothing outside
_COMES = {
    "recycle": "the agent is restarted with its session compacted",
    "clear": "the agent's context is cleared",
    "terminate": "the agent is ended",
}


def of_a_warning(warning: Warn, on_node: bool = False) -> str:
    """What comes, in how long, how to forbid it, and why: last, as the end is cut off where there is little room.

    `on_node`: whoever reads it in a container cannot forbid it there.
    """
    soon = f"in {warning.in_ns / SECOND:g} s" if warning.in_ns else "now"
    veto = _VETO + _ON_NODE if on_node else _VETO
    return f"warning: {_COMES.get(warning.what, warning.what)} {soon}; {veto}; why: {warning.reason}"


class Warnings:
    """The warnings that were given, until it is known how they ended."""

    def __init__(self) -> None:
        self._of_the_end = False  # of a termination, which the ladder itself does not remember

    def over(self, before: State, after: State, instructions: tuple[Instruction, ...], now_ns: int) -> list[str]:
        """How those ended that this step ended: carried out, vetoed, or not needed any more.

        Of a termination that is carried out nothing is said here: it says so itself.
        """
        vetoed = since(after.veto_from_ns, now_ns) < after.veto_for_ns
        told = []
        now = _tiers(after)
        for what, tier in _tiers(before).items():
            if tier.warned_ns is not None and now[what].warned_ns is None:
                done = any(_carries_out(each, what) for each in instructions)
                told.append(f"{what}: {_outcome(done, vetoed)}")
        for each in instructions:
            if isinstance(each, Warn | Terminate):
                self._of_the_end = isinstance(each, Warn) and each.what == "terminate"
        if self._of_the_end and after.phase is not Phase.HELD:
            self._of_the_end = False
            told.append(f"terminate: {_outcome(False, vetoed)}")
        return told


def _carries_out(instruction: Instruction, what: str) -> bool:
    if what == Tier.RECYCLE.value:
        return isinstance(instruction, Restart)
    return isinstance(instruction, Deliver) and instruction.tier.value == what


def _outcome(done: bool, vetoed: bool) -> str:
    if done:
        return "carried out, as warned of"
    return "vetoed, it does not come" if vetoed else "not needed any more, it does not come"


def _tiers(state: State) -> dict[str, TierState]:
    fields = ((name, getattr(state, name)) for name in State.__dataclass_fields__)
    return {name: value for name, value in fields if isinstance(value, TierState)}
