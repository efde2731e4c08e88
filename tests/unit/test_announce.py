"""What a person hears of a warning and of its end."""

from dataclasses import replace

import pytest
from test_ladder import Run, memory

from governor import announce
from governor.model import Answered, Phase, Sampled, State, Status, Terminate, Tier, Vetoed, Warn
from governor.policy import SECOND, Efficacy, Policy


class Told(Run):
    """A ladder, and what a person hears of it."""

    def __init__(self):
        base = Policy()
        compact = replace(base.compact, efficacy=Efficacy.USELESS)
        clear = replace(base.clear, exec=("clear",))
        super().__init__(replace(base, compact=compact, clear=clear))
        self.warnings, self.heard = announce.Warnings(), []

    def feed(self, event):
        before = self.state
        instructions = super().feed(event)
        self.heard += self.warnings.over(before, self.state, instructions, self.now_ns)
        return instructions

    def sample(self, ratio, passed_s=1):
        self.now_ns += int(passed_s * SECOND)
        return self.feed(Sampled(memory(ratio), self.now_ns))

    def warn(self):
        self.sample(0.87)
        self.sample(0.87)
        assert self.state.clear.warned_ns is not None and not self.heard


def test_a_warning_that_is_carried_out():
    told = Told()
    told.warn()
    told.sample(0.87, 6)
    assert told.heard == ["clear: carried out, as warned of"]
    told.feed(Answered(Tier.CLEAR, Status.DELIVERED))
    assert len(told.heard) == 1


def test_a_warning_that_is_vetoed():
    told = Told()
    told.warn()
    told.feed(Vetoed(600 * SECOND))
    told.sample(0.87)
    told.sample(0.87, 6)
    assert told.heard == ["clear: vetoed, it does not come"]


def test_a_warning_that_is_not_needed_any_more():
    told = Told()
    told.warn()
    told.sample(0.5)
    assert told.heard == ["clear: not needed any more, it does not come"]


ENDS = [
    (Phase.PROBATION, (), ["terminate: not needed any more, it does not come"]),
    (Phase.WATCHING, (), ["terminate: not needed any more, it does not come"]),
    (Phase.HELD, (), []),
    (Phase.TERMINATING, (Terminate("full"),), []),
]


@pytest.mark.parametrize(("phase", "instructions", "heard"), ENDS)
def test_how_the_warning_of_a_termination_ends(phase, instructions, heard):
    warnings, held = announce.Warnings(), State(phase=Phase.HELD)
    assert warnings.over(State(), held, (Warn("terminate", 0, "full"),), 1) == []
    assert warnings.over(held, State(phase=phase), instructions, 2) == heard
    assert warnings.over(State(phase=phase), State(), (), 3) == ([] if phase is not Phase.HELD else ENDS[0][2])


def test_a_warning_says_what_comes_when_why_and_how_to_forbid_it():
    text = announce.of_a_warning(Warn("clear", 5 * SECOND, "86 % of max is in use"))
    assert text.startswith("warning: the agent's context is cleared in 5 s; to forbid it: governor hold 10m")
    assert text.endswith("why: 86 % of max is in use")


def test_a_warning_of_a_node_s_daemon_says_where_to_forbid_it():
    """It is shown inside, too, where a hold does not keep the daemon from anything."""
    text = announce.of_a_warning(Warn("terminate", 0, "92 %"), on_node=True)
    assert text == "warning: the agent is ended now; to forbid it: governor hold 10m, on the node; why: 92 %"
