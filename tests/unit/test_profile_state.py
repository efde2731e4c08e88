"""profile_state and profile_agent: what is believed of what a hostile agent shows, and which process is meant."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from governor.profile import Match, Profile, Screen, StateFile
from governor.profile_agent import Agent, NoAgent, find_agent
from governor.profile_state import State, look, read_screen, read_state_file
from governor.subtree import read_stat

SPEC = StateFile(
    path="~/state-{pid}.json",
    session="sessionId",
    start="procStart",
    status="status",
    detail="waitingFor",
    idle=("idle",),
    busy=("busy",),
    waiting=("waiting",),
)


@pytest.fixture
def own(tmp_path):
    """This very process as the agent."""
    return Agent(os.getpid(), read_stat(os.getpid()).start_ticks, os.getpid(), os.geteuid(), str(tmp_path), "me")


STATES = [
    ("gone", None, "it has no state file"),
    ("a directory", "directory", "it has no state file"),
    ("no JSON", b"{", "is no JSON"),
    ("no object", b"[]", "holds no object"),
    ("another process's", b'{"status":"idle","procStart":"1"}', "another process's"),
    (
        "an unknown status",
        b'{"status":"dancing\\u001b[2J","procStart":"TICKS"}',
        "expected one of idle, busy, waiting",
    ),
    ("another type", b'{"status":["idle"],"procStart":"TICKS"}', "expected one of"),
    ("too large", b"[" * (65 << 10), "larger than"),
    ("a link", "link", "a symbolic link"),
    ("a FIFO", "fifo", "cannot be read"),
    ("deep", b"[" * 60000, "is no JSON"),
]


@pytest.mark.parametrize(("content", "why"), [case[1:] for case in STATES], ids=[case[0] for case in STATES])
def test_a_state_file_that_is_not_what_it_should_be_says_nothing(own, tmp_path, content, why):
    path = tmp_path / f"state-{own.pid}.json"
    if content == "link":
        (tmp_path / "elsewhere").write_text('{"status":"idle"}')
        path.symlink_to(tmp_path / "elsewhere")
    elif content == "fifo":
        os.mkfifo(path)
    elif content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content.replace(b"TICKS", str(own.start_ticks).encode()))
    found = read_state_file(SPEC, own)
    assert (found.state, found.session) == (State.UNKNOWN, "")
    assert why in found.why
    seen = look(Profile(state_file=SPEC, screen=Screen(prompt="(?P<draft>x?)")), own, ["x"])
    assert seen.state is State.UNKNOWN


SAID = [
    ('{"status":"idle","procStart":TICKS,"sessionId":"a-1"}', State.IDLE, "a-1"),
    ('{"status":"busy","procStart":"TICKS","sessionId":"../../etc"}', State.BUSY, ""),
    ('{"status":"waiting","procStart":"TICKS","waitingFor":"dialog open","sessionId":7}', State.WAITING, "7"),
    ('{"status":"idle","procStart":"TICKS","sessionId":{"a":1}}', State.IDLE, ""),
]


@pytest.mark.parametrize(("content", "state", "session"), SAID)
def test_what_a_state_file_says(own, tmp_path, content, state, session):
    (tmp_path / f"state-{own.pid}.json").write_text(content.replace("TICKS", str(own.start_ticks)))
    found = read_state_file(SPEC, own)
    assert (found.state, found.session) == (state, session)


def test_a_state_file_of_another_user_is_not_believed(own, tmp_path):
    (tmp_path / f"state-{own.pid}.json").write_text('{"status":"idle"}')
    found = read_state_file(replace(SPEC, start=""), replace(own, uid=own.uid + 1))
    assert (found.state, "another user" in found.why) == (State.UNKNOWN, True)


SCREEN = Screen(
    prompt=r"^> ?(?P<draft>.*)$", placeholder=("Try .*",), waiting=(r"\[y/N\]",), busy=("working",), shell=("^! ",)
)
SCREENS = [
    ([], State.UNKNOWN, None),
    (["hello"], State.UNKNOWN, None),
    (["> one", "done", ">"], State.IDLE, ""),
    (["> one", "done", "> two  "], State.IDLE, "two"),
    (["> Try this"], State.IDLE, ""),
    (["delete? [y/N]", "yes", "> "], State.IDLE, ""),  # answered long ago: it stands above the input
    (["> rm", "delete? [y/N]"], State.WAITING, "rm"),
    (["working", "> "], State.BUSY, ""),
    (["x" * 10_000, "> a"], State.IDLE, "a"),
    (["> old"] + ["x"] * 1000, State.UNKNOWN, None),
]


@pytest.mark.parametrize(("lines", "state", "draft"), SCREENS)
def test_what_a_screen_says(lines, state, draft):
    found, seen_draft, _ = read_screen(Profile(screen=SCREEN), lines)
    assert (found.state, seen_draft) == (state, draft)


def test_a_wrappers_child_is_the_agent(tmp_path):
    script = tmp_path / "agent.py"
    script.write_text(
        "import subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, *sys.argv]) if len(sys.argv) == 1 else None\n"
        "print(child.pid, flush=True) if child else None\n"
        "time.sleep(600)\n".replace("*sys.argv]", "sys.argv[0], 'inner']")
    )
    outer = subprocess.Popen(["sh", "-c", f"{sys.executable} {script}; true"], stdout=subprocess.PIPE, text=True)
    inner_pid = int(outer.stdout.readline())
    wrapper_pid = read_stat(inner_pid).parent_pid
    try:
        assert find_agent(Match(("agent.py",)), outer.pid).pid == wrapper_pid
        assert find_agent(Match(("agent.py",), wrapped=True), outer.pid).pid == inner_pid
        assert find_agent(Match(("agent.py",), wrapped=True), inner_pid).pid == inner_pid
        assert find_agent(Match(), outer.pid).pid == outer.pid
        with pytest.raises(NoAgent, match="expected it or what it started to be called claude"):
            find_agent(Match(("claude",)), outer.pid)
    finally:
        for pid in (inner_pid, wrapper_pid, outer.pid):
            os.kill(pid, 9)
        outer.wait()
    with pytest.raises(NoAgent, match="found no process"):
        find_agent(Match(), outer.pid)
