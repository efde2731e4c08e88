"""A turn that was cut off is typed once into the resumed agent: a stand-in in a real tmux and on a real PTY."""

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from test_delivery import PROFILE, start  # noqa: F401  a fixture

from governor import cut_turn
from governor.profile_state import State
from tests.waiting import wait_for

GO_ON = "Go on with what you were doing."
ASKS = replace(PROFILE, session=replace(PROFILE.session, resubmit=GO_ON))


@pytest.fixture
def order(tmp_path):
    """The path of an order to resume, beside which a turn waits."""
    path = tmp_path / "order"
    Path(f"{path}.turn").write_text("session-1 1 1\n")
    return str(path)


def begin(agent, order, session="session-1"):
    return cut_turn.start(order, ASKS, agent.pid, agent.stage.channel, session)


def ended(child):
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    return child.end(), child.output.decode()


def test_guards_that_follow_one_another_ask_once_when_the_dialog_is_closed(start, order):  # noqa: F811
    agent = start()
    agent.order(dialog="Trust this directory?")
    wait_for(lambda: agent.seen().state is State.WAITING)
    children = [begin(agent, order), begin(agent, order)]  # of a guard that was killed, and of the next
    time.sleep(1.5)
    assert agent.done() == []
    agent.order(close=1)
    assert sorted(ended(child)[0] for child in children) == [0, 1]
    assert agent.done() == [{"line": GO_ON}]
    assert not Path(f"{order}.turn").exists()


def test_an_agent_that_is_at_work_already_is_not_asked_and_never_will_be(start, order):  # noqa: F811
    agent = start()
    agent.order(busy=600)
    wait_for(lambda: agent.seen().state is State.BUSY)
    status, words = ended(begin(agent, order))
    assert (status, words, agent.done()) == (1, "it is at work already", [])
    assert not Path(f"{order}.turn").exists()


def test_another_session_is_not_asked(start, order):  # noqa: F811
    agent = start()
    status, words = ended(begin(agent, order, "session-of-another-day"))
    assert (status, words, agent.done()) == (1, "it is in another session, session-1", [])
