"""An idle agent whose compact frees nothing is restarted with its session compacted; any other is left alone."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from desk import RUN, AtTerminal

from tests.fakes import resumable_profile
from tests.waiting import wait_for

POLICY = """
[recycle]
retry = "1s"
warning = "1s"
settle = "2s"
{recycle}
[terminate]
grace = "2s"
"""


class Desk:
    """The agent at a terminal, in a memcg of 160 MiB."""

    def __init__(self, directory, peak, recycle, more, above):
        self.directory = directory
        profile, policy = directory / "profile.toml", directory / "policy.toml"
        profile.write_text(resumable_profile.profile(directory, peak=peak))
        policy.write_text(POLICY.format(recycle=recycle))
        words = [*RUN, "--profile", str(profile), "--policy", str(policy), "--memory-max", "160MiB"]
        environment = {"XDG_STATE_HOME": str(directory / "state"), "TERM": "xterm"}
        command = [*words, "--source", "poll", "--", *above, *resumable_profile.command(directory), *more]
        self.terminal = AtTerminal(*command, environment=environment)
        self.await_output(b"agent> ")
        wait_for(lambda: "protecting" in self.log)
        self.session = re.search(rb"(session-\w+) begins", self.terminal.output)[1]

    def await_output(self, wanted, seconds=60):
        return self.terminal.await_output(wanted, seconds)

    def type(self, text):
        self.terminal.type(text.encode())

    def do(self, line):
        """Type a line and await the next prompt."""
        before = self.terminal.output.count(b"agent> ")
        self.type(f"{line}\r")
        wait_for(lambda: self.terminal.read(0.05) is not None and self.terminal.output.count(b"agent> ") > before, 60)

    @property
    def log(self):
        state = self.directory / "state" / "governor"
        return "".join(path.read_text() for path in state.glob("run-*.log"))

    @property
    def journal(self):
        [path] = (self.directory / "state" / "governor").glob("journal-*.ndjson")
        return path

    def await_log(self, wanted):
        def found():
            self.terminal.read(0.05)
            return wanted in self.log

        wait_for(found, 60, wanted)

    @property
    def turns(self):
        [transcript] = self.directory.glob("session-*.jsonl")
        return [json.loads(line)["text"] for line in transcript.read_text().splitlines()]


@pytest.fixture
def desk(tmp_path, memcg):
    made = []

    def start(*more, peak="40MiB", recycle="", above=()):
        made.append(Desk(tmp_path, peak, recycle, more, above))
        return made[-1]

    yield start
    for one in made:
        one.terminal.close()


def test_an_idle_agent_goes_on_compacted_under_its_session(desk):
    agent = desk()
    agent.type("grow 122\r")
    agent.await_output(agent.session + b" goes on")
    assert re.search(rb"governor: .* Its session is compacted, and goes on in 0.0 s: ", agent.terminal.output)
    assert agent.turns == ["began", "saved on SIGTERM", "compacted", "resumed"]
    agent.await_log("recycle freed")
    assert "governor: warning: " in agent.log and "archived 1 session files" in agent.log
    assert float(re.search(r"recycle freed ([0-9.]+) MiB: of use", agent.log)[1]) > 80
    agent.type("exit 5\r")
    assert agent.terminal.wait() == 5
    replayed = subprocess.run(
        [sys.executable, "-m", "governor", "replay", str(agent.journal)], capture_output=True, text=True
    )
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    state = json.loads(next((agent.directory / "state" / "governor").glob("state-*.json")).read_text())["state"]
    assert 1 << 20 < state["resumed_peak_bytes"] < 80 << 20


def test_one_that_works_or_has_a_draft_is_left_alone_until_it_is_idle(desk):
    agent = desk()
    agent.do("grow 122")
    agent.do("work 4")  # the warning gives a person the time for it
    agent.type("draft")
    agent.await_log("recycle was deferred: it is busy: its state file says busy")
    agent.await_log("recycle was deferred: a draft is in its input ('draft')")
    assert agent.turns == ["began"]
    agent.type("\x15")  # Ctrl-U: it is gone
    agent.await_output(agent.session + b" goes on")


def test_below_a_shell_that_goes_on_nobody_would_come_back_and_it_is_left_alone(desk):
    agent = desk(above=("sh", "-c", '"$@"; read line; exit 6', "sh"))
    agent.do("grow 122")
    time.sleep(10)  # without the shell it is over in three seconds
    agent.terminal.read()
    assert agent.turns == ["began"] and "recycle" not in agent.log
    agent.type("exit 0\r")
    agent.type("\r")
    assert agent.terminal.wait() == 6


def test_one_that_ignores_sigterm_stays_and_what_was_ordered_does_not_come(desk):
    agent = desk()
    agent.do("deaf")
    agent.do("grow 122")
    agent.await_log("recycle was failed: the agent has not ended after SIGTERM")
    agent.type("exit 0\r")
    assert agent.terminal.wait() == 0
    assert agent.turns == ["began"]
    assert not list(Path("/run/governor").glob(f"run-{agent.terminal.pid}.resume"))


@pytest.mark.parametrize(
    ("why", "said"),
    [("overloaded", b"ended with status 1: the model is ?[31moverloaded"), ("refuses", b'said: "too short"}')],
)
def test_a_session_that_cannot_be_compacted_goes_on_and_that_is_said_and_learned(desk, why, said):
    agent = desk()
    (agent.directory / why).touch()
    agent.type("grow 122\r")
    agent.await_output(agent.session + b" goes on")
    assert b"its session was not compacted, and goes on as it is: " in agent.terminal.output
    assert said in agent.terminal.output
    assert agent.turns == ["began", "saved on SIGTERM", "resumed"]
    agent.await_log("recycle was failed: ")


def test_a_compaction_that_hangs_is_ended_in_time(desk):
    agent = desk(recycle='compacting = "2s"')
    (agent.directory / "hangs").touch()
    agent.type("grow 122\r")
    agent.await_output(agent.session + b" goes on")
    assert b"took longer than 2 s" in agent.terminal.output


def test_sigterm_while_it_is_compacted_ends_everything(desk):
    agent = desk()
    (agent.directory / "hangs").touch()
    agent.type("grow 122\r")
    agent.await_output(b"Its session is compacted")
    wait_for(lambda: "--compact" in "".join(map(command_of, os.listdir("/proc"))))
    os.kill(agent.terminal.pid, signal.SIGTERM)
    assert agent.terminal.wait() == 143
    assert agent.turns == ["began", "saved on SIGTERM"]


def command_of(pid):
    try:
        return Path("/proc", pid, "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def test_one_that_is_predicted_not_to_fit_is_left_alone_and_that_is_said(desk):
    agent = desk(peak="150MiB")
    agent.type("grow 122\r")
    agent.await_log("no recycle: ")
    assert re.search(r"no recycle: 7\d\.\d % of max is in use; it would come back with up to 150 MiB", agent.log)
    agent.type("exit 0\r")
    assert agent.terminal.wait() == 0
    assert agent.turns == ["began"]
