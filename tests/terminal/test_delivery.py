"""Guarded delivery to a stand-in agent in a real tmux and on a real PTY: what is typed, and above all what is not."""

import json
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from governor import delivery, profile_file
from governor.channels.terminal import ChannelError
from governor.delivery import Outcome, deliver, open_terminal
from governor.model import Status, Tier
from governor.policy import SECOND
from governor.profile import Profile, WhileBusy
from governor.profile_agent import find_agent
from governor.profile_state import State, look
from tests.fakes.stage import PtyStage, TmuxStage
from tests.waiting import wait_for

FAKES = Path(__file__).resolve().parent.parent / "fakes"
PROFILE = profile_file.load(str(FAKES / "repl.toml")).profile
BY_SCREEN = replace(
    PROFILE,
    state_file=replace(PROFILE.state_file, path=""),
    confirm=replace(PROFILE.confirm, clear_new_session=False, clear_screen=("cleared",)),
)


class Agent:
    """The stand-in on a stage, and what it wrote down."""

    def __init__(self, kind, home: Path, *options: str) -> None:
        self.home, self.record, self.orders_file = home, home / "record", home / "orders"
        shell = f'exec "$0" "$@" --state "{home}/state-$$.json"'
        argv = ["sh", "-c", shell, sys.executable, str(FAKES / "repl.py"), str(self.record)]
        argv += ["--orders", str(self.orders_file), *options]
        self.stage = kind(home, argv, {"HOME": str(home)})
        self.pid = self.stage.pid
        wait_for(lambda: (home / f"state-{self.pid}.json").exists())
        self.agent = find_agent(PROFILE.match, self.pid)
        self.terminal = open_terminal(self.stage.channel, self.agent)
        wait_for(lambda: self.seen().draft is not None)

    def seen(self, profile: Profile = PROFILE):
        return look(profile, self.agent, self.terminal.screen())

    def order(self, **order: object) -> None:
        with self.orders_file.open("a") as file:
            file.write(json.dumps(order) + "\n")

    def done(self) -> list[dict]:
        return [json.loads(line) for line in self.record.read_text().splitlines()] if self.record.exists() else []

    def deliver(self, tier: Tier = Tier.COMPACT, profile: Profile = PROFILE, within_s: float = 30) -> Outcome:
        outcome = deliver(profile, tier, self.agent, self.terminal, time.monotonic_ns() + int(within_s * SECOND))
        assert outcome.reason.isprintable()
        return outcome


@pytest.fixture(params=[TmuxStage, PtyStage], ids=["tmux", "pty"])
def start(request, tmp_path):
    started = []

    def run(*options: str) -> Agent:
        started.append(Agent(request.param, tmp_path, *options))
        return started[-1]

    yield run
    for agent in started:
        agent.stage.close()


@pytest.mark.parametrize("profile", [PROFILE, BY_SCREEN], ids=["state file", "screen alone"])
def test_an_idle_agent_gets_the_command_once_and_its_effect_is_awaited(start, profile):
    agent = start()
    outcome = agent.deliver(profile=profile)
    assert (outcome.status, agent.done()) == (Status.DELIVERED, [{"line": "/compact"}])
    assert "the session was compacted" in outcome.reason
    assert agent.deliver(Tier.CLEAR, profile).status is Status.DELIVERED
    assert agent.done()[1:] == [{"line": "/clear"}]


def test_an_agent_that_is_slow_to_read_gets_the_command_once(start):
    agent = start()
    agent.order(stall=6)
    time.sleep(0.1)
    assert agent.deliver().status is Status.DELIVERED
    assert agent.done() == [{"line": "/compact"}]


@pytest.mark.parametrize("profile", [PROFILE, BY_SCREEN], ids=["state file", "screen alone"])
def test_nothing_is_typed_into_a_dialog(start, profile):
    agent = start()
    agent.order(dialog="Remove all files?")
    wait_for(lambda: agent.seen(profile).state is State.WAITING)
    outcome = agent.deliver(profile=profile)
    assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
    assert outcome.reason.startswith("nothing typed: it is waiting")


def test_a_dialog_that_opens_between_text_and_enter_is_not_approved(start):
    agent = start("--dialog-on", "/compact")
    outcome = agent.deliver()
    assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
    assert outcome.reason.startswith("Enter was not pressed: it is waiting")
    assert "/compact was typed and left there" in outcome.reason
    agent.order(close=1)
    wait_for(lambda: agent.seen().draft == "/compact")
    assert agent.deliver().status is Status.DELIVERED  # with what still stands there
    assert agent.done() == [{"line": "/compact"}]


def test_a_dialog_without_a_state_file_is_seen_between_text_and_enter(start):
    agent = start("--dialog-on", "/compact")
    assert (agent.deliver(profile=BY_SCREEN).status, agent.done()) == (Status.DEFERRED, [])


def test_a_draft_is_kept(start):
    agent = start()
    agent.stage.type("rm the ")
    agent.stage.type("old files")
    wait_for(lambda: agent.seen().draft == "rm the old files")
    assert agent.deliver().status is Status.DELIVERED
    assert agent.done() == [{"line": "/compact"}]
    assert agent.seen().draft == "rm the old files"


def test_a_draft_that_cannot_be_put_aside_is_left_alone(start):
    agent = start()
    agent.stage.type("half a thought")
    wait_for(lambda: agent.seen().draft == "half a thought")
    profile = replace(PROFILE, type=replace(PROFILE.type, stash="", unstash="", stash_returns=False))
    outcome = agent.deliver(profile=profile)
    assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
    assert agent.seen().draft == "half a thought"
    # Keys that do not put it aside: the text comes to stand behind it, and is taken out again.
    profile = replace(PROFILE, type=replace(PROFILE.type, stash="\x06"))
    outcome = agent.deliver(profile=profile)
    assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
    assert "the text was taken out again" in outcome.reason
    assert agent.seen().draft == "half a thought"


def test_a_draft_that_was_put_aside_comes_back_when_the_command_is_given_up(start):
    agent = start("--dialog-on", "never")
    agent.stage.type("a draft")
    wait_for(lambda: agent.seen().draft == "a draft")
    profile = replace(PROFILE, type=replace(PROFILE.type, before="x"))  # what stands there is not the text
    outcome = agent.deliver(profile=profile)
    assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
    assert "instead of /compact" in outcome.reason


def test_a_busy_agent_queues_it_where_it_does(start):
    agent = start()
    agent.order(busy=4)
    wait_for(lambda: agent.seen().state is State.BUSY)
    patient = replace(PROFILE, confirm=replace(PROFILE.confirm, within_ns=20 * SECOND))
    assert agent.deliver(profile=patient).status is Status.DELIVERED
    wait_for(lambda: agent.done() == [{"queued": "/compact"}, {"line": "/compact"}])
    agent.order(busy=600)
    wait_for(lambda: agent.seen().state is State.BUSY)
    short = replace(PROFILE, confirm=replace(PROFILE.confirm, within_ns=SECOND))
    outcome = agent.deliver(profile=short)
    assert (outcome.status, outcome.reason) == (Status.DELIVERED, "/compact waits for the end of the turn")


def test_a_busy_agent_that_would_drop_it_is_not_asked(start):
    agent = start()
    agent.order(busy=600)
    wait_for(lambda: agent.seen().state is State.BUSY)
    outcome = agent.deliver(profile=replace(PROFILE, type=replace(PROFILE.type, while_busy=WhileBusy.REFUSED)))
    assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
    assert "a command would be refused" in outcome.reason


@pytest.mark.parametrize(("key", "state"), [("!", State.SHELL), ("\x1b", State.VIM)])
def test_nothing_is_typed_in_shell_mode_or_vim_normal(start, key, state):
    agent = start()
    agent.stage.type(key)
    wait_for(lambda: agent.seen().state is state)
    assert (agent.deliver().status, agent.done()) == (Status.DEFERRED, [])


def test_a_vim_mode_that_the_screen_does_not_tell_ends_without_enter(start):
    agent = start()
    agent.stage.type("\x1b")
    wait_for(lambda: agent.seen().state is State.VIM)
    blind = replace(PROFILE, screen=replace(PROFILE.screen, vim=()))
    outcome = agent.deliver(profile=blind)
    assert outcome.status is Status.FAILED
    assert [entry for entry in agent.done() if entry != {"vim": entry.get("vim")}] == []
    assert {"vim": "\r"} not in agent.done()


def test_a_command_without_an_effect_has_failed(start):
    agent = start("--compact-s", "600")
    profile = replace(PROFILE, confirm=replace(PROFILE.confirm, within_ns=SECOND // 2))
    outcome = agent.deliver(profile=profile)
    assert outcome.status is Status.FAILED
    assert "nothing shows that it ran" in outcome.reason
    assert "/compact" in outcome.reason


def test_a_refusal_on_the_screen_is_told(start):
    agent = start("--compact-s", "0.1")
    profile = replace(
        PROFILE, confirm=replace(PROFILE.confirm, compact_screen=("never",), refused=("the session was.*",))
    )
    outcome = agent.deliver(profile=profile)
    assert (outcome.status, outcome.reason) == (
        Status.FAILED,
        "/compact was refused: the screen shows 'the session was compacted'",
    )


def test_a_record_in_the_transcript_confirms(start, tmp_path):
    transcript = tmp_path / "talk-session-1.jsonl"
    transcript.write_text('{"subtype":"compact_boundary"}\n')  # of an earlier one: counts for nothing
    agent = start("--transcript", str(transcript))
    confirm = replace(
        PROFILE.confirm, compact_screen=(), transcript="~/talk-{session}.jsonl", compact_record=("compact_boundary",)
    )
    outcome = agent.deliver(profile=replace(PROFILE, confirm=confirm))
    assert (outcome.status, outcome.reason) == (Status.DELIVERED, "/compact: its transcript has 'compact_boundary'")
    none = replace(confirm, compact_record=("never",), within_ns=SECOND)
    assert agent.deliver(profile=replace(PROFILE, confirm=none)).status is Status.FAILED


def test_a_stopped_agent_is_not_typed_to(tmp_path):
    agent = Agent(PtyStage, tmp_path)  # tmux lets one run on that is stopped
    try:
        os.kill(agent.pid, signal.SIGSTOP)
        wait_for(lambda: agent.seen().state is State.STOPPED)
        assert agent.deliver().status is Status.DEFERRED
        os.kill(agent.pid, signal.SIGCONT)
        assert agent.done() == []
    finally:
        agent.stage.close()


def test_without_a_believable_state_nothing_is_typed(start, tmp_path):
    agent = start()
    (tmp_path / f"state-{agent.pid}.json").unlink()
    outcome = agent.deliver()
    assert (outcome.status, agent.done()) == (Status.DEFERRED, [])
    assert "it has no state file" in outcome.reason


def test_copy_mode_is_left_and_the_terminal_of_another_refused(tmp_path):
    agent = Agent(TmuxStage, tmp_path)
    try:
        agent.stage.tmux("copy-mode", "-t", "agent")
        assert agent.deliver().status is Status.DELIVERED
        agent.stage.tmux("new-window", "-t", "agent", "-n", "other", "cat")
        other = open_terminal(f"tmux:{agent.stage.socket}:agent:other", agent.agent)
        with pytest.raises(ChannelError, match="not the agent's terminal"):
            other.screen()
    finally:
        agent.stage.close()


def test_start_delivers_in_a_child_whose_status_tells_the_outcome(tmp_path):
    agent = Agent(TmuxStage, tmp_path)
    try:

        def run(profile: Profile, channel: str) -> tuple[int, str]:
            child = delivery.start(profile, Tier.COMPACT, agent.pid, channel, time.monotonic_ns() + 30 * SECOND)
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
            return child.end(), child.output.decode()

        assert run(PROFILE, agent.stage.channel)[0] == 0
        status, reason = run(PROFILE, f"tmux:{tmp_path}/nobody:x")
        assert (status, "no tmux server" in reason) == (75, True)
        status, reason = run(replace(PROFILE, match=replace(PROFILE.match, process=("other",))), agent.stage.channel)
        assert (status, "expected it or what it started to be called other" in reason) == (1, True)
        assert run(PROFILE, "carrier pigeon")[0] == 1
        agent.order(dialog="Sure?")
        wait_for(lambda: agent.seen().state is State.WAITING)
        assert run(PROFILE, agent.stage.channel)[0] == 75
    finally:
        agent.stage.close()
