"""A turn that was cut off: when it is asked for again, and that this is once."""

import json
import os
from dataclasses import replace

import pytest

from governor import cut_turn, run_resume
from governor.profile import Profile, Session, StateFile
from governor.profile_agent import Agent

PROFILE = Profile(
    state_file=StateFile(path="~/{pid}.json", session="id", status="is", idle=("idle",), busy=("busy",)),
    session=Session(resume=("agent", "{session}"), resubmit="go on"),
)


@pytest.fixture
def place(tmp_path):
    """The order's path, and what makes an agent with a state."""
    home = tmp_path / "home"
    home.mkdir()

    def agent(pid, status, session="abc"):
        (home / f"{pid}.json").write_text(json.dumps({"id": session, "is": status}))
        return Agent(pid, 1000 + pid, pid, os.geteuid(), str(home), "agent")

    return str(tmp_path / "run.resume"), agent


def test_a_busy_agents_turn_is_pending_for_the_next_process_and_taken_once(place):
    path, agent = place
    first = agent(1, "busy")
    assert cut_turn.ended(path, PROFILE, first)
    assert cut_turn.pending(path, first) == ""  # the very agent, should its guard be started again
    assert cut_turn.pending(path, agent(2, "idle")) == "abc"
    assert [cut_turn.claim(path), cut_turn.claim(path)] == [True, False]
    assert cut_turn.pending(path, agent(2, "idle")) == ""


def test_a_second_failure_of_a_session_is_not_asked_for_and_withdraws_the_first(place):
    path, agent = place
    assert cut_turn.ended(path, PROFILE, agent(1, "busy"))
    assert not cut_turn.ended(path, PROFILE, agent(2, "busy"))
    assert cut_turn.pending(path, agent(3, "idle")) == ""
    assert cut_turn.ended(path, PROFILE, agent(3, "busy", "another"))


@pytest.mark.parametrize("status", ["idle", "waiting", "strange"])
def test_who_was_not_busy_was_not_cut_off_and_has_had_its_failure(place, status):
    path, agent = place
    assert not cut_turn.ended(path, PROFILE, agent(1, status))
    assert not cut_turn.ended(path, PROFILE, agent(2, "busy"))


def test_a_profile_that_does_not_ask_leaves_nothing(place):
    path, agent = place
    assert not cut_turn.ended(path, replace(PROFILE, session=Session()), agent(1, "busy"))
    assert not os.path.exists(f"{path}.ended")


def test_a_link_in_its_place_is_not_followed(place, tmp_path):
    path, agent = place
    (tmp_path / "theirs").write_text("abc 9 9")
    os.symlink(tmp_path / "theirs", f"{path}.turn")
    assert cut_turn.pending(path, agent(1, "idle")) == ""


def test_the_end_of_the_run_leaves_nothing(place, tmp_path):
    path, agent = place
    cut_turn.ended(path, PROFILE, agent(1, "busy"))
    run_resume.forget(path)
    run_resume.forget("")
    assert [entry.name for entry in tmp_path.iterdir()] == ["home"]
