"""The generic profiles on real programs, in a real tmux and on a real PTY; trying one types nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from governor import delivery
from governor.cli import app
from governor.delivery import deliver, open_terminal
from governor.model import Status, Tier
from governor.policy import SECOND
from governor.profile_agent import find_agent
from governor.profile_file import load
from governor.profile_state import State, look
from tests.fakes.stage import PtyStage, TmuxStage
from tests.waiting import wait_for

FAKES = Path(__file__).resolve().parent.parent / "fakes"


def run(*arguments: str):
    return CliRunner().invoke(app, ["profile", *arguments])


class Lines:
    """The program of lines.py on a stage."""

    def __init__(self, kind, home: Path, *options: str) -> None:
        self.record = home / "record"
        self.stage = kind(home, [sys.executable, str(FAKES / "lines.py"), str(self.record), *options], {})
        self.profile = load("generic-repl").profile
        self.agent = find_agent(self.profile.match, self.stage.pid)
        self.terminal = open_terminal(self.stage.channel, self.agent)
        wait_for(lambda: self.seen().draft == "")

    def seen(self):
        return look(self.profile, self.agent, self.terminal.screen())

    def deliver(self, tier=Tier.COMPACT):
        return deliver(self.profile, tier, self.agent, self.terminal, time.monotonic_ns() + 30 * SECOND)

    def done(self) -> list[str]:
        return self.record.read_text().split("\n")[:-1] if self.record.exists() else []


@pytest.fixture(params=[TmuxStage, PtyStage], ids=["tmux", "pty"])
def lines(request, tmp_path):
    started = []

    def start(*options: str) -> Lines:
        started.append(Lines(request.param, tmp_path, *options))
        return started[-1]

    yield start
    for program in started:
        program.stage.close()


def test_a_program_that_reads_lines_gets_its_commands_and_nothing_in_between(lines):
    program = lines("0.5")
    assert program.deliver().status is Status.DELIVERED
    assert program.deliver(Tier.CLEAR).status is Status.DELIVERED
    program.stage.type("half")
    wait_for(lambda: program.seen().draft == "half")
    outcome = program.deliver()
    assert (outcome.status, "a draft is in its input ('half')" in outcome.reason) == (Status.DEFERRED, True)
    program.stage.type("\x15ask\r")
    wait_for(lambda: program.seen().state is State.UNKNOWN)  # at work: there is no prompt
    assert program.deliver().status is Status.DEFERRED
    wait_for(lambda: program.seen().state is State.WAITING)
    outcome = program.deliver()
    assert (outcome.status, "it is waiting" in outcome.reason) == (Status.DEFERRED, True)
    assert program.done() == ["/compact", "/clear", "ask"]


def test_a_program_in_the_background_of_its_terminal_is_not_typed_to(tmp_path):
    shell = f"set -m; {sys.executable} -c 'import time; time.sleep(600)' & echo $! > {tmp_path}/background; cat"
    stage = PtyStage(tmp_path, ["bash", "-c", shell], {})
    try:
        pid = int(str(wait_for(lambda: (tmp_path / "background").exists() and (tmp_path / "background").read_text())))
        profile = load("generic-repl").profile
        agent = find_agent(profile.match, pid)
        terminal = open_terminal(stage.channel, agent)
        outcome = deliver(profile, Tier.COMPACT, agent, terminal, time.monotonic_ns() + 30 * SECOND)
        assert (outcome.status, "not in the foreground" in outcome.reason) == (Status.DEFERRED, True)
    finally:
        os.kill(pid, signal.SIGKILL)
        stage.close()


def test_signals_reach_who_handles_them_and_nobody_else(tmp_path):
    record = tmp_path / "record"
    heard = subprocess.Popen([sys.executable, str(FAKES / "lines.py"), str(record)], stdin=subprocess.PIPE, stdout=-1)
    deaf = subprocess.Popen(["sleep", "600"])
    profile = load("generic-signal").profile
    try:
        wait_for(lambda: run("try", "generic-signal", "--pid", str(heard.pid)).exit_code == 0)
        for tier, name in ((Tier.COMPACT, "SIGUSR1"), (Tier.CLEAR, "SIGUSR2")):
            outcome = deliver(profile, tier, find_agent(profile.match, heard.pid), None, 0)
            assert (outcome.status, outcome.reason) == (Status.DELIVERED, f"{name} sent")
            wait_for(lambda name=name: record.exists() and name in record.read_text())
        child = delivery.start(profile, Tier.COMPACT, deaf.pid, "", time.monotonic_ns() + SECOND)
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
        assert (child.end(), child.output) == (1, b"the agent does not handle SIGUSR1: not sent")
        tried = run("try", "generic-signal", "--pid", str(deaf.pid))
        assert (tried.exit_code, "does not handle SIGUSR1, SIGUSR2" in tried.stdout) == (1, True)
        assert deaf.poll() is None
    finally:
        for process in (heard, deaf):
            process.kill()
            process.wait()


def test_trying_says_what_it_sees_and_types_nothing(lines, tmp_path):
    program = lines()
    kind, _, where = program.stage.channel.partition(":")
    option = "--tmux" if kind == "tmux" else "--control"
    arguments = ["try", "generic-repl", "--pid", str(program.stage.pid), option, where]
    before = program.terminal.screen()
    done = run(*arguments, "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["state"], told["draft"], told["why_not"]) == (0, "idle", "", "")
    assert told["would_compact"] == "type '/compact', wait 200 ms, look again, press '\\r', await its effect for 50 s"
    assert (program.terminal.screen(), program.done()) == (before, [])
    program.stage.type("a draft")
    wait_for(lambda: program.seen().draft == "a draft")
    done = run(*arguments)
    assert (done.exit_code, "why_not          a draft is in its input" in done.stdout) == (1, True)
