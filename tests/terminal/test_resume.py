"""An agent that governor or the kernel ended goes on under the same session; one that ended by itself does not."""

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

from governor import run_resume
from tests.fakes import resumable_profile
from tests.waiting import wait_for


@pytest.fixture
def desk(tmp_path, memcg):
    """The agent at a terminal, in a memcg of 96 MiB."""
    made = []

    def start(*options, resubmit="", compacts=False, more=()):
        profile = tmp_path / "profile.toml"
        profile.write_text(resumable_profile.profile(tmp_path, compacts, resubmit=resubmit))
        words = [*RUN, "--profile", str(profile), "--memory-max", "96MiB", "--source", "poll", *options]
        environment = {"XDG_STATE_HOME": str(tmp_path / "state"), "TERM": "xterm"}
        command = [*resumable_profile.command(tmp_path), *more]
        made.append(AtTerminal(*words, "--", *command, environment=environment))
        made[-1].await_output(b"agent> ")
        wait_for(lambda: "protecting" in log_of(tmp_path))
        return made[-1]

    yield start
    for one in made:
        one.close()


def log_of(directory):
    return "".join(path.read_text() for path in (directory / "state" / "governor").glob("run-*.log"))


def turns(directory):
    [transcript] = directory.glob("session-*.jsonl")
    return [json.loads(line)["text"] for line in transcript.read_text().splitlines()]


def session_of(output):
    return re.search(rb"(session-\w+) begins", output)[1]


def test_a_terminated_agent_goes_on_under_its_session(desk, tmp_path):
    agent = desk()
    session = session_of(agent.output)
    agent.type(b"grow 200\r")
    agent.await_output(session + b" goes on", 60)
    assert re.search(rb"governor: .* Its session goes on in [0-9.]+ s: ", agent.output)
    assert re.search(rb"governor: [^\r\n\a]*SIGTERM to the agent", agent.output)  # where its user sits
    agent.await_output(b"agent> ")
    assert turns(tmp_path)[0] == "began" and turns(tmp_path)[-1] == "resumed"
    wait_for(lambda: log_of(tmp_path).count("protecting") == 2)
    agent.type(b"exit 5\r")
    assert agent.wait() == 5
    assert not list(Path("/run/governor").glob(f"run-{agent.pid}.resume*"))


def test_a_session_that_filled_memory_is_compacted_before_it_goes_on(desk, tmp_path):
    agent = desk(compacts=True)
    session = session_of(agent.output)
    agent.type(b"grow 200\r")
    agent.await_output(session + b" goes on", 60)
    assert b"Its session is compacted, and goes on in " in agent.output
    assert turns(tmp_path) == ["began", "saved on SIGTERM", "compacted", "resumed"]
    agent.type(b"exit 0\r")
    assert agent.wait() == 0


OPTIONS = ["--model", "large one", "--fast", "--dir", "a", "b", "--dir=c"]


def test_the_users_options_outlast_every_resume_and_the_prompt_does_not(desk, tmp_path):
    given = ["--first", "--model", "large one", "do this", "--fast", "--dir", "a", "b", "--dir=c", "--", "--fast"]
    agent = desk(compacts=True, more=given)
    session = session_of(agent.output)
    for turn in range(2):
        agent.output = b""
        agent.type(b"grow 200\r")
        agent.await_output(session + b" goes on", 60)
        assert f"{tmp_path} ... --resume".encode() in agent.output
        wait_for(lambda turn=turn: log_of(tmp_path).count("protecting") == turn + 2)
    again = [["--compact", *OPTIONS], ["--resume", *OPTIONS]]
    started = [json.loads(line) for line in (tmp_path / "words").read_text().splitlines()]
    assert started == [["", *given], *again, *again]
    agent.type(b"exit 0\r")
    assert agent.wait() == 0


def test_a_turn_that_was_cut_off_is_asked_for_again_once(desk, tmp_path):
    agent = desk(resubmit="Go on with it.")
    session = session_of(agent.output)
    agent.type(b"grow 200\r")
    agent.await_output(session + b" goes on", 60)
    wait_for(lambda: agent.read() is not None and "Go on with it." in turns(tmp_path), 30)
    assert "its turn was cut off" in log_of(tmp_path)
    agent.output = b""
    agent.type(b"grow 200\r")  # a second failure of the same session
    agent.await_output(session + b" goes on", 60)
    wait_for(lambda: log_of(tmp_path).count("protecting") == 3)
    time.sleep(5)
    assert turns(tmp_path).count("Go on with it.") == 1
    agent.type(b"exit 0\r")
    assert agent.wait() == 0
    assert not list(Path("/run/governor").glob(f"run-{agent.pid}.resume*"))


@pytest.mark.parametrize(("resubmit", "times"), [("", 0), ("Go on with it.", 1)])
def test_a_turn_that_the_kernel_cut_off_is_asked_for_only_if_the_profile_says_how(desk, tmp_path, resubmit, times):
    (tmp_path / "policy.toml").write_text('extends = "dry-run"\ndry_run = false\n[brake]\nenabled = false\n')
    agent = desk("--policy", str(tmp_path / "policy.toml"), resubmit=resubmit)
    session = session_of(agent.output)
    agent.type(b"grow 200\r")
    agent.await_output(session + b" goes on", 60)
    wait_for(lambda: log_of(tmp_path).count("protecting") == 2)
    if times:
        wait_for(lambda: agent.read() is not None and "Go on with it." in turns(tmp_path), 30)
    time.sleep(3)
    assert turns(tmp_path).count("Go on with it.") == times


def test_an_agent_that_the_kernel_killed_is_archived_after_the_fact_and_goes_on(desk, tmp_path):
    (tmp_path / "policy.toml").write_text('extends = "dry-run"\ndry_run = false\n[brake]\nenabled = false\n')
    agent = desk("--policy", str(tmp_path / "policy.toml"), compacts=True)
    session = session_of(agent.output)
    agent.type(b"fill 200\r")
    agent.await_output(session + b" goes on", 60)
    # As a line; as a notification, and maybe later, where that was heard of before the agent's end was.
    agent.await_output(b" was killed: the kernel's OOM killer, at the limit of its memcg")
    wait_for(lambda: "after the fact" in log_of(tmp_path) or "archived 1" in log_of(tmp_path))
    assert turns(tmp_path) == ["began", "resumed"]  # a tool may have been at fault
    wait_for(lambda: log_of(tmp_path).count("protecting") == 2)
    agent.output = b""
    agent.type(b"fill 200\r")
    agent.await_output(session + b" goes on", 60)
    assert turns(tmp_path) == ["began", "resumed", "compacted", "resumed"]
    agent.type(b"exit 0\r")
    assert agent.wait() == 0


@pytest.mark.parametrize("how", ["exit 0", "exit 3", "SIGKILL", "SIGTERM"])
def test_an_agent_that_governor_and_kernel_did_not_end_is_not_brought_back(desk, tmp_path, how):
    agent = desk()
    if how.startswith("exit"):
        agent.type(how.encode() + b"\r")
    else:
        [state] = tmp_path.glob("[0-9]*.json")
        os.kill(int(state.stem), getattr(signal, how))
    assert agent.wait() == {"exit 0": 0, "exit 3": 3, "SIGKILL": 137, "SIGTERM": 143}[how]
    assert b"goes on" not in agent.output


def test_after_four_tries_that_did_not_last_it_stays_ended():
    tries, now_ns, waits = run_resume.Tries(), 0, []
    while True:
        tries.begin(now_ns)
        now_ns += 10**9
        waits.append(tries.wait_ns(now_ns))
        if waits[-1] is None:
            break
    assert len(waits) == 5
    assert all(0.5e9 * 4**i <= wait <= 1.5e9 * 4**i for i, wait in enumerate(waits[:3]))
    tries.begin(now_ns)
    assert tries.wait_ns(now_ns + 400 * 10**9) is not None  # it lasted


@pytest.mark.parametrize("said", [b"", b"[]", b"{}", b'{"how": "terminated", "why": 1}', b"\xff", b'{"how": {}}'])
def test_an_order_that_is_none_starts_nothing(tmp_path, said):
    (tmp_path / "order").write_bytes(said)
    assert run_resume.take(str(tmp_path / "order"), 143) is None
    assert run_resume.take(str(tmp_path / "none"), 143) is None
    assert run_resume.take("", 143) is None


WITH_A_SLOW_GUARD = """
import json, os, signal, sys, time
from governor import run, run_one, run_options

path, name, after_s = sys.argv[1], sys.argv[2], float(sys.argv[3])


class Guard:
    '''Orders that the agent comes back, once, and ends a second after it.'''

    orders = 1

    def __init__(self, *_):
        self.pid, self.trouble, self.was_started = 0, "", False

    def due_ns(self):
        return None

    def keep(self, now_ns):
        if self.was_started:
            return
        self.was_started = True
        if Guard.orders:
            Guard.orders -= 1
            with open(path, "w") as order:
                json.dump({"how": "terminated", "command": ["sh", "-c", "echo it came back"], "why": "full"}, order)
        self.pid = os.fork()
        if not self.pid:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(2)
            os._exit(0)

    def ended(self, *_):
        self.pid = 0

    def stop(self):
        pass

    def say(self, text):
        print(text)


run_one.GuardProcess = Guard
if name and os.fork() == 0:
    time.sleep(after_s)
    os.kill(os.getppid(), getattr(signal, name))
    os._exit(0)
agent = ["sh", "-c", "trap '' HUP; sleep 1; exit 143"]
one = run.Run(run_options.Options(agent, guard={"resume_path": path}))
sys.exit(one.run())
"""


@pytest.mark.parametrize(
    ("name", "after_s", "comes_back"),
    [("", 0, True), ("SIGHUP", 0.5, False), ("SIGTERM", 1.5, False), ("SIGINT", 1.5, False)],
)
def test_who_is_told_to_end_while_the_guard_finishes_brings_nothing_back(tmp_path, name, after_s, comes_back):
    command = [sys.executable, "-c", WITH_A_SLOW_GUARD, str(tmp_path / "order"), name, str(after_s)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60)
    assert ("Its session goes on" in done.stderr) == comes_back, done.stderr
    assert done.returncode == (0 if comes_back else 143), done.stderr
