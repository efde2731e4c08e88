"""Agents in real terminals under `governor run`: asked where they can be, told, ended, and passed through."""

import itertools
import json
import os
import pty
import select
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import AGENT

from tests.fakes import resumable_profile
from tests.journal_lines import lines_of
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

LINES = AGENT.with_name("lines.py")
POLICY = '[compact]\nsettle = "2s"\n[clear]\nwarning = "1s"\nsettle = "2s"\n'


class Desk:
    """`governor run` under a terminal of its own, as a person has it."""

    def __init__(self, directory, *argv):
        self.state = directory / "state" / "governor"
        self.shown = b""
        self.status = None
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "XDG_STATE_HOME": str(directory / "state"), "TERM": "xterm"}
            os.execvpe("governor", ["governor", "run", "--source", "psi", *map(str, argv)], environment)

    def look(self):
        """What the terminal has shown so far."""
        while select.select([self.master], [], [], 0)[0]:
            try:
                self.shown += os.read(self.master, 65536)
            except OSError:  # its end
                break
        return self.shown.decode(errors="replace")

    def shows(self, text, seconds=120):
        wait_for(lambda: text in self.look(), seconds, f"{text!r} on the terminal")

    def type(self, text):
        os.write(self.master, text.encode())

    def lines(self, *kinds):
        found = itertools.chain.from_iterable(map(lines_of, self.state.glob("journal-*.ndjson")))
        return [line for line in found if line["kind"] in kinds]

    def ended(self):
        self.look()
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            self.status = os.waitstatus_to_exitcode(status)
        return bool(pid)

    def close(self):
        if self.status is None:
            os.kill(self.pid, signal.SIGTERM)
            wait_for(self.ended, 60)
        os.close(self.master)


@pytest.fixture
def desk(tmp_path):
    made = []

    def make(*argv):
        made.append(Desk(tmp_path, *argv))
        return made[-1]

    yield make
    for one in made:
        one.close()
        for log in one.state.glob("run-*.log"):
            print(log.read_text())


def test_a_repl_is_asked_to_compact_in_its_terminal(desk, tmp_path):
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    options = ("--profile", "generic-repl", "--memory-max", "512MiB", "--policy", policy)
    run = desk(*options, "--", sys.executable, LINES, tmp_path / "record")
    run.shows("agent> ")
    wait_for(lambda: run.lines("protecting"), 60)
    run.type("fill 360\r")  # of so much that no early brake comes first
    run.shows("did /compact")
    wait_for(lambda: run.lines("settled"), 60)
    assert (tmp_path / "record").read_text().split("\n")[:2] == ["fill 360", "/compact"]
    assert "of use" in run.lines("settled")[0]["text"]
    assert not run.lines("braked", "terminating")
    run.type("\x04")
    wait_for(run.ended, 60)
    assert run.status == 1  # of the program, which was not prepared for the end of its input
    assert not list(Path("/sys/fs/cgroup").glob("governor-run-*"))


def test_a_draft_is_never_glued_to(desk, tmp_path):
    run = desk(
        "--profile", "generic-repl", "--memory-max", "128MiB", "--", sys.executable, LINES, tmp_path / "record"
    )
    run.shows("agent> ")
    wait_for(lambda: run.lines("protecting"), 60)
    run.type("fill 88\r")
    run.shows("did fill 88")
    run.type("half a sentence")
    deferred = wait_for(lambda: run.lines("compact_deferred"), 60)[0]
    assert "nothing typed: a draft is in its input" in deferred["text"]
    run.type(" that ends\r")
    run.shows("did /compact")
    assert (tmp_path / "record").read_text().split("\n")[1:3] == ["half a sentence that ends", "/compact"]


def test_a_burst_of_the_agent_is_archived_and_its_status_passed_on(desk, tmp_path):
    session = tmp_path / "session.jsonl"
    begin = tmp_path / "begin"
    options = ("--memory-max", "128MiB", "--archive", f"{tmp_path}/*.jsonl")
    run = desk(*options, "--", sys.executable, AGENT, session, "touch", "--begin", begin)
    run.shows("ready")
    wait_for(lambda: run.lines("agent") and run.lines("protecting"), 60)
    begin.touch()
    wait_for(run.ended, 60)
    assert run.status in (143, 137)
    assert run.lines("archived")
    assert (run.state / "archive").is_dir()


def test_a_tool_that_bursts_is_shed_and_the_agent_is_told(desk, tmp_path):
    begin = tmp_path / "begin"
    run = desk("--memory-max", "128MiB", "--", sys.executable, AGENT, tmp_path / "s", "tool", "--begin", begin)
    run.shows("ready")
    wait_for(lambda: run.lines("agent") and run.lines("protecting"), 60)
    begin.touch()
    run.shows("tool ended with -9")
    told = wait_for(lambda: run.lines("told"), 60)[0]
    assert "Try again with less at a time" in told["text"]
    cgroup_id = os.stat(told["target"]).st_ino
    assert told["text"][:40] in Path(f"/run/governor/memcg-{cgroup_id}.told").read_text()
    time.sleep(0.5)
    assert run.status is None and not run.ended()


def test_an_idle_agent_is_recycled_in_its_memcg(desk, tmp_path):
    profile, policy = tmp_path / "profile.toml", tmp_path / "policy.toml"
    profile.write_text(resumable_profile.profile(tmp_path, peak="40MiB"))
    policy.write_text('[recycle]\nretry = "1s"\nwarning = 0\nsettle = "2s"\n')
    options = ["--profile", profile, "--policy", policy, "--memory-max", "100MiB"]
    terminal = desk(*options, "--", *resumable_profile.command(tmp_path))
    terminal.shows("agent> ")
    wait_for(lambda: terminal.lines("protecting"), 60)
    terminal.type("grow 76\r")
    terminal.shows("goes on in 0.0 s")
    wait_for(lambda: terminal.look() and terminal.lines("settled"), 120)
    [transcript] = tmp_path.glob("session-*.jsonl")
    turns = [json.loads(line)["text"] for line in transcript.read_text().splitlines()]
    assert turns == ["began", "saved on SIGTERM", "compacted", "resumed"]
    assert "of use" in terminal.lines("settled")[0]["text"]
    assert not terminal.lines("killed", "terminating")
    terminal.type("exit 0\r")
    wait_for(lambda: terminal.look() is not None and terminal.ended(), 60)
    assert terminal.status == 0
