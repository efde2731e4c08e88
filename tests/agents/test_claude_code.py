"""The profile claude-code on the real Claude Code, against a stand-in for its model API on loopback.

Not part of scripts/check: needs the program, from GOVERNOR_CLAUDE (its path) or else installed from the npm
registry for the run (GOVERNOR_CLAUDE_VERSION [default: the newest]). Skips, with the reason, where it cannot be
had.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from governor import cut_turn, profile_file, telling, told
from governor.delivery import deliver, open_terminal
from governor.model import Growth, Status, Tier
from governor.policy import SECOND
from governor.profile_agent import find_agent
from governor.profile_cli import attempt
from governor.profile_state import State, look
from tests.fakes.stage import PtyStage, TmuxStage
from tests.waiting import wait_for

FAKES = Path(__file__).resolve().parent.parent / "fakes"
PROFILE = profile_file.load("claude-code").profile
KEY = "sk-ant-api03-made-up-key-for-tests-0123456789abcdef"
ENVIRONMENT = {
    "ANTHROPIC_API_KEY": KEY,
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_AUTOUPDATER": "1",
    "DISABLE_TELEMETRY": "1",
    "DISABLE_ERROR_REPORTING": "1",
    "IS_SANDBOX": "1",
}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if given := os.environ.get("GOVERNOR_CLAUDE"):
        return given
    if not shutil.which("npm"):
        pytest.skip("npm is not installed")
    version = os.environ.get("GOVERNOR_CLAUDE_VERSION", "latest")
    prefix = tmp_path_factory.mktemp("npm")
    argv = ["npm", "install", "--prefix", str(prefix), "--no-audit", "--no-fund"]
    done = subprocess.run([*argv, f"@anthropic-ai/claude-code@{version}"], capture_output=True, text=True)
    found = [
        path for path in prefix.glob("node_modules/@anthropic-ai/claude-code-*/claude") if os.access(path, os.X_OK)
    ]
    if not found:
        pytest.skip(f"Claude Code cannot be installed: {done.stderr[-300:]}")
    return str(found[0])


class Claude:
    """A running Claude Code and the record of what it asked its model."""

    def __init__(self, kind, program: str, directory: Path, settings: dict) -> None:
        self.home, self.work, self.requests = directory / "home", directory / "work", directory / "requests"
        self.home.mkdir()
        self.work.mkdir()
        port = directory / "port"
        self.api = subprocess.Popen([sys.executable, str(FAKES / "model_api.py"), str(port), str(self.requests)])
        wait_for(lambda: port.exists() and port.read_text())
        project = {"hasTrustDialogAccepted": True, "hasCompletedProjectOnboarding": True, "allowedTools": []}
        config = {
            "hasCompletedOnboarding": True,
            "lastOnboardingVersion": "99.0.0",
            "theme": "dark",
            "autoUpdates": False,
            "customApiKeyResponses": {"approved": [KEY[-20:]], "rejected": []},
            "projects": {str(self.work): {**project, "mcpServers": {}}},
        }
        (self.home / ".claude.json").write_text(json.dumps(config | settings))
        environment = ENVIRONMENT | {
            "HOME": str(self.home),
            "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port.read_text()}",
        }
        self._start = lambda *more: kind(directory, ["sh", "-c", f"{command} {' '.join(more)}"], environment)
        command = f'cd "{self.work}" && exec "{program}" --permission-mode default'
        self.stage = self._start()
        self._await_prompt()

    def again(self, *options: str) -> None:
        """Another one in its place, with these options."""
        with suppress(subprocess.CalledProcessError):  # tmux's server has ended with the one before
            self.stage.close()
        (self.home.parent / "pid").unlink(missing_ok=True)
        (self.home.parent / "control.sock").unlink(missing_ok=True)
        self.stage = self._start(*options)
        self._await_prompt()

    def _await_prompt(self) -> None:
        wait_for(lambda: (self.home / f".claude/sessions/{self.stage.pid}.json").exists(), 60)
        self.agent = find_agent(PROFILE.match, self.stage.pid)
        self.terminal = open_terminal(self.stage.channel, self.agent)
        wait_for(lambda: self.seen().open, 60)

    def seen(self):
        return look(PROFILE, self.agent, self.terminal.screen())

    def type(self, text: str) -> None:
        self.stage.type(text)
        wait_for(lambda: self.seen().draft == text)

    def submit(self, text: str) -> None:
        self.type(text)
        time.sleep(0.3)
        self.stage.type("\r")

    def turn(self, text: str) -> None:
        before = self.answers().count("text")
        self.submit(text)
        wait_for(lambda: self.answers().count("text") > before)
        wait_for(lambda: self.seen().state is State.IDLE and self.seen().draft == "")

    def answers(self) -> list[str]:
        return [request["answer"] for request in self._requests()]

    def asked(self) -> list[str]:
        return [request["text"] for request in self._requests()]

    def _requests(self) -> list[dict]:
        lines = self.requests.read_text().splitlines() if self.requests.exists() else []
        return [json.loads(line) for line in lines]

    def deliver(self, tier=Tier.COMPACT, profile=PROFILE, within_s=90):
        outcome = deliver(profile, tier, self.agent, self.terminal, time.monotonic_ns() + within_s * SECOND)
        print(outcome)
        return outcome

    def close(self) -> None:
        self.stage.close()
        self.api.terminate()
        self.api.wait()


@pytest.fixture(params=[TmuxStage, PtyStage], ids=["tmux", "pty"])
def start(request, program, tmp_path):
    started = []

    def run(**settings: object) -> Claude:
        started.append(Claude(request.param, program, tmp_path, settings))
        return started[-1]

    yield run
    for claude in started:
        claude.close()


def test_a_session_is_compacted_a_draft_is_kept_and_it_is_cleared(start):
    claude = start()
    claude.turn("hello")
    claude.turn("and how are you")
    told = attempt(PROFILE, claude.stage.pid, claude.stage.channel)
    assert (told["why_not"], told["state"], told["agent_pid"]) == ("", "idle", claude.agent.pid)
    assert any(told["session"] in file for file in told["would_archive"])
    assert claude.deliver().status is Status.DELIVERED
    assert claude.answers().count("compaction") == 1
    claude.turn("more to talk of")
    claude.type("a draft that matters")
    session = claude.seen().session
    assert claude.deliver().status is Status.DELIVERED
    wait_for(lambda: claude.seen().draft == "a draft that matters")
    assert claude.answers().count("compaction") == 2
    assert claude.deliver(Tier.CLEAR).status is Status.DELIVERED
    assert claude.seen().session not in ("", session)
    wait_for(lambda: claude.seen().draft == "a draft that matters")


def test_nothing_is_typed_into_a_permission_dialog(start):
    claude = start()
    claude.submit("TOOL touch approved")
    wait_for(lambda: claude.seen().state is State.WAITING)
    before = claude.terminal.screen()[-6:]  # the dialog: above it something blinks
    outcome = claude.deliver()
    assert outcome.status is Status.DEFERRED
    assert outcome.reason.startswith("nothing typed: it is waiting")
    assert claude.terminal.screen()[-6:] == before
    time.sleep(1)
    assert not (claude.work / "approved").exists()


def test_a_permission_dialog_that_opens_between_text_and_enter_is_not_approved(start):
    claude = start()
    claude.submit("SLOW 6 TOOL touch approved")
    wait_for(lambda: claude.seen().state is State.BUSY)
    slow = replace(PROFILE, type=replace(PROFILE.type, pause_ns=8 * SECOND))
    outcome = claude.deliver(profile=slow)
    assert outcome.status is Status.DEFERRED
    assert outcome.reason.startswith("Enter was not pressed: it is waiting")
    time.sleep(1)
    assert not (claude.work / "approved").exists()
    assert claude.seen().state is State.WAITING


def test_a_busy_agent_queues_it(start):
    claude = start()
    claude.turn("hello")
    claude.turn("hello again")
    claude.submit("SLOW 5")
    wait_for(lambda: claude.seen().state is State.BUSY)
    assert claude.deliver().status is Status.DELIVERED
    assert claude.answers()[-2:] == ["slow", "compaction"] or "compaction" in claude.answers()
    claude.submit("SLOW 600")
    wait_for(lambda: claude.seen().state is State.BUSY)
    claude.type("a draft")
    short = replace(PROFILE, confirm=replace(PROFILE.confirm, within_ns=2 * SECOND))
    outcome = claude.deliver(profile=short)
    assert (outcome.status, "waits for the end of the turn" in outcome.reason) == (Status.DELIVERED, True)
    wait_for(lambda: claude.seen().draft == "a draft")


def test_nothing_is_typed_in_the_model_picker_nor_in_shell_mode(start):
    claude = start()
    claude.submit("/model")
    wait_for(lambda: claude.seen().state is State.WAITING)
    assert claude.deliver().status is Status.DEFERRED
    claude.stage.type("\x1b")
    wait_for(lambda: claude.seen().open)
    claude.stage.type("!")
    wait_for(lambda: claude.seen().draft is None)
    outcome = claude.deliver()
    assert (outcome.status, "shell" in outcome.reason) == (Status.DEFERRED, True)


def test_enter_is_not_pressed_in_vims_normal_mode(start):
    claude = start(editorMode="vim")
    claude.stage.type("\x1b")
    time.sleep(1)
    outcome = claude.deliver()
    assert outcome.status is Status.FAILED
    assert outcome.reason.startswith("Enter was not pressed")
    assert not claude.requests.exists()


def test_a_session_too_short_to_compact_is_told(start):
    claude = start()
    outcome = claude.deliver()
    assert (outcome.status, "refused" in outcome.reason) == (Status.FAILED, True)


# Told of a shed

GROWTH = Growth(77, 1, "make", 300 << 20, 400 << 20, 0, 300 << 20, SECOND // 2, 1.0)
SHED = told.typed(told.of_a_shed(["make", "cc1"], GROWTH, 1 << 30))


def tell(claude) -> tuple[int, str]:
    """The exit status and the words of the child that tells it."""
    attempt = telling.say(PROFILE, SHED)
    child = telling.start(PROFILE, claude.stage.pid, claude.stage.channel, attempt, 40 * SECOND, "a test")
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    status = child.end()
    print(status, child.output)
    return status, child.output.decode()


def heard(claude) -> int:
    """How often its model was told; a title for the session is asked for as well."""
    return sum(SHED[:60] in text and "<session>" not in text for text in claude.asked())


def test_told_of_a_shed_while_idle_with_a_draft_and_while_busy(start):
    claude = start()
    claude.turn("hello")
    assert tell(claude)[0] == 0
    wait_for(lambda: heard(claude))
    wait_for(lambda: claude.seen().state is State.IDLE and claude.seen().draft == "")
    assert heard(claude) == 1
    claude.type("a draft that matters")
    assert tell(claude)[0] == 0
    wait_for(lambda: heard(claude) == 2)
    wait_for(lambda: claude.seen().draft == "a draft that matters" and claude.seen().state is State.IDLE)
    claude.stage.type("\x15")
    wait_for(lambda: claude.seen().draft == "")
    claude.submit("SLOW 8")
    wait_for(lambda: claude.seen().state is State.BUSY)
    assert tell(claude)[0] == 0
    assert claude.seen().state is State.BUSY  # it was queued
    wait_for(lambda: heard(claude) == 3)


def test_told_of_a_shed_at_a_dialog_only_when_that_is_closed(start):
    claude = start()
    claude.submit("TOOL touch approved")
    wait_for(lambda: claude.seen().state is State.WAITING)
    threading.Timer(6, lambda: claude.stage.type("\x1b")).start()  # no, says the user
    assert tell(claude)[0] == 0
    wait_for(lambda: heard(claude))
    assert not (claude.work / "approved").exists()


def test_a_turn_that_sigkill_cut_off_is_asked_for_again_once_in_the_resumed_session(start):
    claude = start()
    claude.turn("hello")
    claude.submit("SLOW 600")
    wait_for(lambda: claude.seen().state is State.BUSY)
    session = claude.seen().session
    asks = replace(PROFILE, session=replace(PROFILE.session, resubmit="Go on where the machine stopped you."))
    order = str(claude.home.parent / "order")
    os.kill(claude.stage.pid, signal.SIGKILL)
    assert cut_turn.ended(order, asks, claude.agent)  # by the state file that it left behind
    claude.again("--resume", session)
    assert cut_turn.pending(order, claude.agent) == session

    def ask() -> tuple[int, str]:
        child = cut_turn.start(order, asks, claude.stage.pid, claude.stage.channel, session)
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
        return child.end(), child.output.decode()

    assert ask()[0] == 0
    wait_for(lambda: any("Go on where the machine" in text for text in claude.asked()))
    wait_for(lambda: claude.seen().state is State.IDLE and claude.seen().draft == "")
    assert claude.seen().session == session
    assert "it was asked for before" in ask()[1]
    assert sum("Go on where the machine" in text and "<session>" not in text for text in claude.asked()) == 1
