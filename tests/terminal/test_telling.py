"""What an agent is told by its own input of a tool that was shed: a stand-in in a real tmux and on a real PTY."""

import json
import os
import sys
import threading
import time
from dataclasses import replace

import pytest
from desk import RUN, AtTerminal
from test_delivery import FAKES, PROFILE, Agent, start  # noqa: F401  a fixture

from governor import telling, told
from governor.children import Deferred, Ended
from governor.delivery import alone_with, type_line
from governor.model import Growth, Status
from governor.policy import SECOND
from governor.profile import WhileBusy
from governor.profile_state import State
from tests.fakes.stage import PtyStage, wait_for

MIB = 1 << 20
GROWTH = Growth(77, 1, "make", 300 * MIB, 400 * MIB, 0, 300 * MIB, SECOND // 2, 1.0)
TEXT = told.typed(told.of_a_shed(["make", "cc1"], GROWTH, 1024 * MIB))


def say(agent, profile=PROFILE):
    outcome = type_line(profile, TEXT, agent.agent, agent.terminal, time.monotonic_ns() + 20 * SECOND)
    assert outcome.reason.isprintable()
    return outcome


def run(agent, within_s, profile=PROFILE):
    """The child's exit status and words."""
    attempt = telling.say(profile, TEXT)
    child = telling.start(profile, agent.pid, agent.stage.channel, attempt, int(within_s * SECOND), "a test")
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    return child.end(), child.output.decode()


def test_an_idle_agent_is_told_once_in_a_line_that_is_longer_than_its_input(start):  # noqa: F811
    agent = start()
    assert len(TEXT) > 200
    assert say(agent).status is Status.DELIVERED
    assert agent.done() == [{"line": TEXT}]


def test_a_draft_is_kept_and_a_busy_agent_queues_it(start):  # noqa: F811
    agent = start()
    agent.order(busy=600)
    wait_for(lambda: agent.seen().state is State.BUSY)
    agent.stage.type("a draft")
    wait_for(lambda: agent.seen().draft == "a draft")
    assert say(agent).status is Status.DELIVERED
    assert agent.done() == [{"queued": TEXT}]
    wait_for(lambda: agent.seen().draft == "a draft")


def test_where_enter_cannot_be_pressed_the_line_is_taken_out_again(tmp_path):
    agent = Agent(PtyStage, tmp_path)
    try:
        agent.stage.type("a draft")
        wait_for(lambda: agent.seen().draft == "a draft")
        stuck = replace(PROFILE, type=replace(PROFILE.type, stash="\x06"))  # puts nothing aside
        outcome = say(agent, stuck)
        assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
        assert "the text was taken out again" in outcome.reason
        assert agent.seen().draft == "a draft"
    finally:
        agent.stage.close()


def test_it_waits_until_a_dialog_is_closed_and_nothing_is_approved(start):  # noqa: F811
    agent = start()
    agent.order(dialog="Remove all files?")
    wait_for(lambda: agent.seen().state is State.WAITING)
    threading.Timer(2.5, lambda: agent.order(close=1)).start()
    status, words = run(agent, 30)
    assert (status, agent.done()) == (0, [{"line": TEXT}]), words


def test_it_is_given_up_when_it_cannot_be_typed_in_time(start):  # noqa: F811
    agent = start()
    agent.order(busy=600)
    wait_for(lambda: agent.seen().state is State.BUSY)
    refuses = replace(PROFILE, type=replace(PROFILE.type, while_busy=WhileBusy.REFUSED))
    status, words = run(agent, 1, refuses)
    assert (status, agent.done()) == (75, [])
    assert "nothing typed: it is busy" in words


def test_two_do_not_type_at_once(start):  # noqa: F811
    agent = start()
    with alone_with(agent.agent):
        with pytest.raises(Deferred, match="something else is being typed"):
            alone_with(agent.agent)
        status, words = run(agent, 1)
    assert (status, agent.done()) == (75, []), words
    assert run(agent, 1)[0] == 0


def test_a_loop_of_sheds_is_told_once_in_a_while():
    notes, started = [], []
    at = telling.Telling(lambda make, on_end: started.append(on_end), lambda kind, text: notes.append(kind))
    for second in (1, 2, 119, 125):
        at.tell(PROFILE, 1, "pty:x", "killed", second * SECOND)
    assert len(started) == 2
    assert notes == ["agent_not_told", "agent_not_told"]
    started[0](Ended(0, b"taken while it was idle", False))
    started[1](Ended(75, b"it is waiting", False))
    assert notes[2:] == ["agent_told", "agent_not_told"]


TOOL = """
import sys, time
from pathlib import Path
while not Path(sys.argv[1]).exists():
    time.sleep(0.05)
held = []
while True:
    held.append(b"x" * (4 << 20))
    time.sleep(0.05)
"""


def test_a_tool_that_bursts_is_shed_and_its_agent_hears_of_it_in_its_input(memcg, tmp_path):
    profile = tmp_path / "repl.toml"
    takes_words = (FAKES / "repl.toml").read_text().replace("[confirm]", "tell = true\n[confirm]")
    profile.write_text(f'{takes_words}[efficacy]\ncompact = "useless"\nclear = "useless"\n')
    repl = f'exec "$0" {FAKES}/repl.py {tmp_path}/record --state {tmp_path}/state-$$.json'
    command = ["sh", "-c", f'"$0" -c "$1" {tmp_path}/go & {repl}', sys.executable, TOOL]
    options = ["--profile", str(profile), "--memory-max", "256MiB", "--source", "poll"]
    environment = {
        "HOME": str(tmp_path),
        "XDG_STATE_HOME": f"{tmp_path}/state",
        "TERM": "xterm",
        "TMUX": "",
        "STY": "",
    }
    run = AtTerminal(*RUN, *options, "--", *command, environment=environment)
    try:
        wait_for(lambda: run.read() is not None and "protecting" in log_of(tmp_path))
        time.sleep(2)  # for looks at a tool that does not grow
        (tmp_path / "go").touch()
        wait_for(lambda: run.read() is not None and (tmp_path / "record").exists(), 40)
        [heard] = [json.loads(line) for line in (tmp_path / "record").read_text().splitlines()]
        assert heard["line"].startswith("governor killed python")
        assert "256 MiB" in heard["line"] and "fewer parallel jobs" in heard["line"]
        wait_for(lambda: "the agent was told by its terminal" in (run.read() or b"").decode() + log_of(tmp_path))
        assert b"\x1b]9;governor: governor killed python" in run.output
    finally:
        run.close()


def log_of(directory):
    return "".join(path.read_text() for path in (directory / "state" / "governor").glob("run-*.log"))
