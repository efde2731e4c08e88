"""What a recycle goes by: whether the agent is idle, the order for `governor run`, what a process held at most."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from governor import profile_file, recycle, resume, run_resume
from governor.actions import processes
from governor.attribution import Attribution
from governor.guard import Guard, read_policy
from governor.model import Status
from governor.policy import SECOND, Policy
from governor.profile import Confirm, Profile, Screen, Session, StateFile
from governor.profile_agent import Agent
from governor.profile_state import Seen, State

CLAUDE = profile_file.load("claude-code").profile
AT_SCREEN = Profile(screen=Screen(prompt="> (?P<draft>.*)"))


@pytest.mark.parametrize(
    ("profile", "seen", "why"),
    [
        (Profile(), Seen(State.IDLE, "", "s1"), ""),
        (AT_SCREEN, Seen(State.IDLE, "", "s1", draft=""), ""),
        (AT_SCREEN, Seen(State.IDLE, "", "s1"), "no input is on its screen"),
        (AT_SCREEN, Seen(State.IDLE, "", "s1", draft="rm"), "a draft is in its input ('rm')"),
        (Profile(), Seen(State.IDLE, ""), "its session is not known"),
        *(
            (Profile(), Seen(state, "so", "s1"), f"it is {state.value}: so")
            for state in State
            if state is not State.IDLE
        ),
        (Profile(confirm=Confirm(transcript="~/{session}.jsonl")), Seen(State.IDLE, "", "s1"), ""),
        (
            Profile(confirm=Confirm(transcript="~/{session}.jsonl")),
            Seen(State.IDLE, "", "s2"),
            "nothing of its session is written yet",
        ),
    ],
)
def test_only_an_idle_agent_without_a_draft_and_with_a_session_may_be_recycled(tmp_path, profile, seen, why):
    (tmp_path / "s1.jsonl").touch()
    agent = Agent(os.getpid(), 0, os.getpid(), os.getuid(), str(tmp_path), "agent")
    assert recycle.refusal(profile, agent, seen) == why


def test_an_order_of_a_recycle_holds_for_a_late_end_only_if_that_is_by_sigterm(tmp_path):
    path = str(tmp_path / "order")
    wanted = run_resume.Order(resume.RECYCLED, ["go", "on"], "full", ["compact"], 2.5, [])
    for status in (0, 1, 137, 143):
        resume.order(path, resume.RECYCLED, "full", ("go", "on"), ("compact",), 2.5)
        assert run_resume.take(path, status) == wanted
        resume.order(path, resume.RECYCLED, "full", ("go", "on"), ("compact",), 2.5)
        resume.loosen(path)
        assert run_resume.take(path, status) == (wanted._replace(how=resume.LATE) if status == 143 else None)
        assert run_resume.take(path, 143) is None
    resume.order(path, resume.TERMINATED, "full", ("go", "on"))
    resume.loosen(path)
    assert json.loads((tmp_path / "order").read_bytes())["how"] == resume.TERMINATED
    resume.withdraw(path)
    resume.loosen(path)
    assert run_resume.take(path, 143) is None


class AskedAgent:
    """An agent that hears SIGTERM, or is gone."""

    def __init__(self, is_there):
        self.pid, self.is_there = 17, is_there
        self.known = Agent(17, 0, 17, 0, "/", "agent")

    def ask_to_end(self):
        return self.is_there


@pytest.fixture
def asked(tmp_path):
    """A recycle that has just asked an agent to end, its answers, and its order as it is now."""
    answers = []

    def order():
        path = tmp_path / "order"
        return json.loads(path.read_bytes())["how"] if path.exists() else None

    def make(is_there=True):
        session = Session(compact_stopped=("true",), resume=("sleep", "on"))
        made = recycle.Recycle(
            agent=AskedAgent(is_there),
            children=None,
            limits=None,
            note=lambda *_: None,
            feed=None,
            answered=lambda status, why: answers.append(status),
            agent_bytes=None,
            profile=Profile(session=session),
            channel="",
            program="",
            resume_path=str(tmp_path / "order"),
        )
        made.restart("full", Policy())
        return made, answers, order

    return make


LATER_NS = 11 * SECOND


def test_one_that_does_not_end_in_its_grace_has_failed_and_only_a_late_end_is_followed(asked):
    made, answers, order = asked()
    made.prolong(5 * SECOND)  # frozen for so long
    made.check_deadline(time.monotonic_ns() + LATER_NS)
    assert (made.awaits_end, answers, order()) == (True, [], resume.RECYCLED)
    made.check_deadline(time.monotonic_ns() + LATER_NS + 5 * SECOND)
    assert (made.awaits_end, answers, order()) == (False, [Status.FAILED], resume.LATE)


def test_one_that_others_end_meanwhile_goes_on_compacted(asked):
    made, answers, order = asked()
    made.leave()
    made.check_deadline(time.monotonic_ns() + LATER_NS)
    assert (answers, order()) == ([], resume.RECYCLED)


def test_one_that_had_ended_by_itself_does_not_come_back(asked):
    made, answers, order = asked(is_there=False)
    assert (made.awaits_end, answers, order()) == (False, [Status.FAILED], None)


def test_one_that_has_begun_to_work_is_left_alone(asked, tmp_path):
    made, answers, order = asked()
    (tmp_path / "state").write_text('{"status": "busy"}')
    made.profile = replace(
        made.profile, state_file=StateFile(str(tmp_path / "state"), status="status", busy=("busy",))
    )
    made.restart("full", Policy())
    assert (answers, order()) == ([Status.DEFERRED], resume.RECYCLED)  # the order of the first


def test_a_recycle_is_no_failure():
    tries = run_resume.Tries()
    tries.begin(0)
    assert [tries.wait_ns(10**9) is None for _ in range(4)] == [False] * 4
    assert [tries.wait_ns(10**9, is_recycle=True) for _ in range(9)] == [0] * 9
    assert tries.wait_ns(10**9) is None


def test_an_order_of_long_ago_is_about_another_end(tmp_path):
    path = str(tmp_path / "order")
    for age_s, counts in ((1, True), (3600, False), (-3600, False)):
        resume.order(path, resume.TERMINATED, "full", ("go", "on"))
        at_s = time.time() - age_s
        os.utime(path, (at_s, at_s))
        assert (run_resume.take(path, 143) is not None) == counts
        assert not Path(path).exists()


def test_a_session_goes_on_with_the_program_that_was_started(tmp_path):
    program = tmp_path / "claude"
    program.write_text("")
    agent = Agent(os.getpid(), 0, os.getpid(), os.getuid(), str(tmp_path), "agent")
    profile = Profile(session=Session(resume=("claude", "--continue"), compact_stopped=("no-such-program",)))
    assert resume.command(profile, agent, "resume", str(program)) == ()  # nobody may run that
    program.chmod(0o755)
    assert resume.command(profile, agent, "resume", str(program)) == (str(program), "--continue")
    assert resume.command(profile, agent, "compact_stopped", str(program)) == ()


def test_the_peak_is_the_policys_or_the_profiles(tmp_path):
    (tmp_path / "policy.toml").write_text('[recycle]\npeak = "1GiB"\n')
    guard = Guard("/x", "i", "", "", "", policy=str(tmp_path / "policy.toml"))
    assert read_policy(guard, CLAUDE).recycle.peak_bytes == 1 << 30
    guard = Guard("/x", "i", "", "", "")
    assert read_policy(guard, CLAUDE).recycle.peak_bytes == CLAUDE.session.resume_peak_bytes > 400 << 20
    assert read_policy(guard, None).recycle.peak_bytes == 0


def test_what_a_process_held_at_most_is_known_after_it_gave_it_back():
    code = "kept = b'x' * (64 << 20); del kept; print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        assert processes.anonymous_bytes(process.pid) < 60 << 20
        assert 60 << 20 < processes.peak_anonymous_bytes(process.pid) < 120 << 20
        process.stdin.close()
    assert processes.peak_anonymous_bytes(process.pid) == 0


def test_what_descends_from_the_agent_is_its_own(tmp_path):
    code = "import subprocess, sys; kept = b'x' * (32 << 20); {}; print(flush=True); input()"
    child = code.format("pass")
    parent = code.format(f"child = subprocess.Popen([sys.executable, '-c', {child!r}])")
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as agent:
        for _ in range(2):
            agent.stdout.readline()
        below = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
        other = os.getppid()
        (tmp_path / "cgroup.procs").write_text(f"{agent.pid}\n{below[0]}\n{other}\n")
        attribution = Attribution(str(tmp_path), agent.pid)
        attribution.look(1, 10**9)
        own_bytes, below_bytes = attribution.agent_held_bytes()
        assert 32 << 20 <= own_bytes < 64 << 20
        assert 32 << 20 <= below_bytes < 64 << 20
        agent.stdin.close()
