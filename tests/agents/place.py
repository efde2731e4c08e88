"""Claude Code in a test: its home, its working directory, the stand-in for its model API, and who sits before it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

from governor import profile_file
from governor.delivery import open_terminal
from governor.profile_agent import Agent, find_agent
from governor.profile_state import Seen, State, look
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


class Place:
    """One home with one stand-in; `settings` go into its ~/.claude.json."""

    def __init__(self, directory: Path, settings: dict[str, object]) -> None:
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
        where = {"HOME": str(self.home), "ANTHROPIC_BASE_URL": f"http://127.0.0.1:{port.read_text()}"}
        self.environment = ENVIRONMENT | where

    def asked(self) -> list[dict[str, str]]:
        """What the model was asked, and its answers' names."""
        lines = self.requests.read_text().splitlines() if self.requests.exists() else []
        return [json.loads(line) for line in lines]

    def answers(self) -> list[str]:
        return [asked["answer"] for asked in self.asked()]

    def pids(self) -> list[int]:
        """Of the programs that say that they run here, and do."""
        found = [int(path.stem) for path in (self.home / ".claude/sessions").glob("*.json")]
        return [pid for pid in found if Path(f"/proc/{pid}").exists()]

    def transcript(self, session: str) -> list[dict[str, object]]:
        """The whole records of a session."""
        [path] = (self.home / ".claude/projects").glob(f"*/{session}.jsonl")
        return [json.loads(line) for line in path.read_text().splitlines()]

    def close(self) -> None:
        self.api.terminate()
        self.api.wait()


class Driven:
    """Somebody who looks at Claude Code and types; `stage` and `channel` are to be set."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def find(self) -> Agent:
        """The running program; there is one."""
        [pid] = self.place.pids()
        return find_agent(PROFILE.match, pid)

    def await_prompt(self, within_s: float = 60) -> None:
        wait_for(self.place.pids, within_s)
        wait_for(lambda: self.seen().open, within_s)

    def seen(self) -> Seen:
        agent = self.find()
        terminal = open_terminal(self.channel, agent)
        return look(PROFILE, agent, terminal.screen() if terminal else None)

    def type(self, text: str) -> None:
        self.stage.type(text)
        wait_for(lambda: self.seen().draft == text)

    def submit(self, text: str) -> None:
        self.type(text)
        time.sleep(0.3)
        self.stage.type("\r")

    def turn(self, text: str, answer: str = "text", within_s: float = 60) -> None:
        """Say something and wait for the end of what follows: an answer of this name, and the prompt."""
        before = self.place.answers().count(answer)
        self.submit(text)
        wait_for(lambda: self.place.answers().count(answer) > before, within_s)
        wait_for(lambda: self.seen().state is State.IDLE and self.seen().draft == "", within_s)
