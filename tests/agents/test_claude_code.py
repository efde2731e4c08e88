"""The profile claude-code on the real Claude Code, against a stand-in for its model API on loopback.

Not part of scripts/check: scripts/agents installs the program and runs these.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from governor import cut_turn, telling, told
from governor.actions.processes import anonymous_bytes
from governor.delivery import deliver, open_terminal
from governor.model import Growth, Status, Tier
from governor.policy import SECOND
from governor.profile_cli import attempt
from governor.profile_state import State
from governor.subtree import read_stat
from tests.agents.place import PROFILE, Driven, Place
from tests.fakes.stage import PtyStage, TmuxStage
from tests.waiting import wait_for

ROOT = Path(__file__).resolve().parents[2]


class Claude(Driven):
    """Claude Code in a terminal, with nobody beside it."""

    def __init__(
        self, kind, program: str, directory: Path, settings: dict, before: str = "", options: tuple[str, ...] = ()
    ) -> None:
        """`before`: words of a shell before the program."""
        super().__init__(Place(directory, settings))
        command = f'cd "{self.place.work}" && exec {before} "{program}" --permission-mode default'
        self._start = lambda *more: kind(
            directory, ["sh", "-c", f"{command} {' '.join(more)}"], self.place.environment
        )
        self._sit_down(*options)

    def _sit_down(self, *options: str) -> None:
        self.stage = self._start(*options)
        self.channel = self.stage.channel
        self.await_prompt()
        self.agent = self.find()

    def again(self, *options: str) -> None:
        """Another one in its place, with these options."""
        with suppress(subprocess.CalledProcessError):  # tmux's server has ended with the one before
            self.stage.close()
        for name in ("pid", "control.sock"):
            (self.place.home.parent / name).unlink(missing_ok=True)
        self._sit_down(*options)

    def deliver(self, tier=Tier.COMPACT, profile=PROFILE, within_s=90):
        terminal = open_terminal(self.channel, self.agent)
        outcome = deliver(profile, tier, self.agent, terminal, time.monotonic_ns() + within_s * SECOND)
        print(outcome)
        return outcome

    def screen(self):
        return open_terminal(self.channel, self.agent).screen()


@pytest.fixture(params=[TmuxStage, PtyStage], ids=["tmux", "pty"])
def start(request, program, tmp_path):
    started = []

    def run(**settings: object) -> Claude:
        started.append(Claude(request.param, program, tmp_path, settings))
        return started[-1]

    yield run
    for claude in started:
        claude.stage.close()
        claude.place.close()


def test_a_session_is_compacted_a_draft_is_kept_and_it_is_cleared(start):
    claude = start()
    claude.turn("hello")
    claude.turn("and how are you")
    told = attempt(PROFILE, claude.stage.pid, claude.stage.channel)
    assert (told["why_not"], told["state"], told["agent_pid"]) == ("", "idle", claude.agent.pid)
    assert any(told["session"] in file for file in told["would_archive"])
    assert claude.deliver().status is Status.DELIVERED
    assert claude.place.answers().count("compaction") == 1
    claude.turn("more to talk of")
    claude.type("a draft that matters")
    session = claude.seen().session
    assert claude.deliver().status is Status.DELIVERED
    wait_for(lambda: claude.seen().draft == "a draft that matters")
    assert claude.place.answers().count("compaction") == 2
    assert claude.deliver(Tier.CLEAR).status is Status.DELIVERED
    assert claude.seen().session not in ("", session)
    wait_for(lambda: claude.seen().draft == "a draft that matters")


def test_nothing_is_typed_into_a_permission_dialog(start):
    claude = start()
    claude.submit("TOOL touch approved")
    wait_for(lambda: claude.seen().state is State.WAITING)
    before = claude.screen()[-6:]  # the dialog: above it something blinks
    outcome = claude.deliver()
    assert outcome.status is Status.DEFERRED
    assert outcome.reason.startswith("nothing typed: it is waiting")
    assert claude.screen()[-6:] == before
    time.sleep(1)
    assert not (claude.place.work / "approved").exists()


def test_a_permission_dialog_that_opens_between_text_and_enter_is_not_approved(start):
    claude = start()
    claude.submit("SLOW 6 TOOL touch approved")
    wait_for(lambda: claude.seen().state is State.BUSY)
    slow = replace(PROFILE, type=replace(PROFILE.type, pause_ns=8 * SECOND))
    outcome = claude.deliver(profile=slow)
    assert outcome.status is Status.DEFERRED
    assert outcome.reason.startswith("Enter was not pressed: it is waiting")
    time.sleep(1)
    assert not (claude.place.work / "approved").exists()
    assert claude.seen().state is State.WAITING


def test_a_busy_agent_queues_it(start):
    claude = start()
    claude.turn("hello")
    claude.turn("hello again")
    claude.submit("SLOW 5")
    wait_for(lambda: claude.seen().state is State.BUSY)
    assert claude.deliver().status is Status.DELIVERED
    assert claude.place.answers()[-2:] == ["slow", "compaction"] or "compaction" in claude.place.answers()
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
    assert not claude.place.requests.exists()


def test_a_session_too_short_to_compact_is_told(start):
    claude = start()
    outcome = claude.deliver()
    assert (outcome.status, "refused" in outcome.reason) == (Status.FAILED, True)


RECYCLE_SOON = """
[compact]
engage = 0.02
release = 0.01
[signals]
stalled_compact = 0.02
[recycle]
engage = 0.03
release = 0.02
peak = "100MiB"
freed = 0.001
dwell = "45s"
warning = "1s"
settle = "15s"
"""


def test_an_idle_agent_is_recycled_its_session_compacted_while_stopped(program, tmp_path):
    """Under `governor run`, whose policy says that it is time, and that there is room."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "claude").symlink_to(program)
    policy = tmp_path / "policy.toml"
    policy.write_text(RECYCLE_SOON)
    environment = f'env XDG_STATE_HOME={tmp_path}/state PYTHONPATH={ROOT} PATH="{tmp_path}/bin:$PATH"'
    run = f"{environment} {sys.executable} -m governor run --memory-max 3GiB --source poll --policy {policy} --"
    options = ("--model", "sonnet", "--append-system-prompt", "'be brief'", "--allowedTools", "Bash", "Read")
    claude = Claude(PtyStage, "claude", tmp_path, {}, run, options)

    def log():
        return "".join(file.read_text() for file in (tmp_path / "state" / "governor").glob("run-*.log"))

    try:
        claude.turn("hello")
        claude.turn("BIG 0.3", "big", 120)
        session, pid, held = claude.seen().session, claude.agent.pid, []

        def ended():
            held.append(anonymous_bytes(pid) or 0)  # it goes on growing for a moment after the turn
            return read_stat(pid) is None

        wait_for(lambda: attempt(PROFILE, claude.stage.pid, claude.channel)["would_recycle"].startswith("end it"))
        wait_for(ended, 120)
        held_bytes = max(held)
        wait_for(lambda: "recycle freed" in log(), 120)
        claude.await_prompt()
        agent = claude.find()
        print(f"{held_bytes >> 20} MiB before, {anonymous_bytes(agent.pid) >> 20} MiB after")
        assert (claude.seen().session, agent.pid != pid) == (session, True)
        assert claude.place.answers().count("compaction") == 1
        assert "compact_boundary" in [record.get("subtype") for record in claude.place.transcript(session)]
        assert anonymous_bytes(agent.pid) < held_bytes
        assert "of use" in log()
        words = Path(f"/proc/{agent.pid}/cmdline").read_bytes().decode().split("\0")[1:-1]
        kept = ["--permission-mode", "default", "--model", "sonnet", "--append-system-prompt", "be brief"]
        assert words == [*kept, "--allowedTools", "Bash", "Read", "--resume", session]
        claude.turn("TOOL touch allowed")  # asks nobody
        assert (claude.place.work / "allowed").exists()
    finally:
        print(log())
        os.kill(claude.stage.pid, signal.SIGTERM)
        wait_for(lambda: read_stat(claude.stage.pid).ended)
        claude.stage.close()
        claude.place.close()


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


def asked(claude) -> list[str]:
    return [asked["text"] for asked in claude.place.asked()]


def heard(claude) -> int:
    """How often its model was told; a title for the session is asked for as well."""
    return len([text for text in asked(claude) if SHED[:60] in text and "<session>" not in text])


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
    assert not (claude.place.work / "approved").exists()


def test_a_turn_that_sigkill_cut_off_is_asked_for_again_once_in_the_resumed_session(start):
    claude = start()
    claude.turn("hello")
    claude.submit("SLOW 600")
    wait_for(lambda: claude.seen().state is State.BUSY)
    session = claude.seen().session
    asks = replace(PROFILE, session=replace(PROFILE.session, resubmit="Go on where the machine stopped you."))
    order = str(claude.place.home.parent / "order")
    os.kill(claude.stage.pid, signal.SIGKILL)
    assert cut_turn.ended(order, asks, claude.agent)  # by the state file that it left behind
    claude.again("--resume", session)
    assert cut_turn.pending(order, claude.agent) == session

    def ask() -> tuple[int, str]:
        child = cut_turn.start(order, asks, claude.stage.pid, claude.stage.channel, session)
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
        return child.end(), child.output.decode()

    assert ask()[0] == 0
    wait_for(lambda: any("Go on where the machine" in text for text in asked(claude)))
    wait_for(lambda: claude.seen().state is State.IDLE and claude.seen().draft == "")
    assert claude.seen().session == session
    assert "it was asked for before" in ask()[1]
    assert sum("Go on where the machine" in text and "<session>" not in text for text in asked(claude)) == 1
