"""What the targets of one governor have in common."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from governor.actions.commands import Commands
from governor.brake import KnobFile
from governor.poller import Poller
from governor.tally import Tally
from governor.turns import Turns


@dataclass(frozen=True, slots=True)
class Shared:
    """Made by the loop, given to each."""

    poller: Poller
    knob_file: KnobFile
    commands: Commands
    send: Callable[[bytes], bool]  # to reflex
    reflex_pid: Callable[[], int]  # 0: it does not run
    tally: Tally
    source_name: Callable[[int], str]  # a source in words
    protected: Callable[[], None]  # called when a target's protection has begun
    calm_interval_ns: Callable[[], int]  # a calm target need not be sampled more often: others want their turn
    lively_interval_ns: Callable[[], int]  # the same of one that is held, on probation, or about to end
    is_pressed: Callable[[], bool]  # whether there are some who wait to be governed at all
    look_at: Callable[[int], None]  # a slot is to have its turn now
    archives: Turns  # a few at a time
