"""The real Claude Code in a memcg with a limit, with governor beside it or before it: BPF, freeze, tmux, a PTY.

Needs root, cgroup v2 and BPF: scripts/agents runs it in the virtual machine.
"""

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from governor import archive, cgroup, state_file
from governor.profile_state import State
from tests.agents.place import Driven, Place
from tests.fakes.stage import TmuxStage
from tests.kernel.conftest import MIB, Container
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(not os.environ.get("GOVERNOR_VM"), reason="use scripts/agents")
COMPACTS = """
[signals]
stalled_compact = 0.4
[compact]
engage = 0.4
release = 0.35
cooldown = "10s"
settle = "5s"
retry = "1s"
deadline = "5m"
efficacy = "useful" # whatever it frees: here it is about what is typed, and when
"""

BURST = """
import time
open("began", "w").write(str(time.monotonic_ns()))
held = []
while True:
    held.append(b"x" * (4 << 20))
"""


class Governed(Driven):
    """Claude Code in a pane of tmux, and what governor says of it."""

    def __init__(self, directory: Path, program: str) -> None:
        super().__init__(Place(directory, {}))
        self.directory, self.program = directory, program
        self.state = directory / "state"
        self.journal = directory / "journal.ndjson"
        path = f"{Path(program).parent}:{os.environ['PATH']}"
        keep = {name: os.environ[name] for name in ("PYTHONPATH", "GOVERNOR_VM") if name in os.environ}
        self.environment = {**self.place.environment, **keep, "PATH": path, "XDG_STATE_HOME": str(self.state)}
        self.stage = self.guard = self.container = None

    def in_a_memcg(self, max_mib: int, *arguments: str) -> None:
        """Without governor."""
        self.container = Container("claude", max_mib)
        self.start(f"echo $$ > {self.container.path}/cgroup.procs", "", arguments)
        self.channel = self.stage.channel
        self.await_prompt(120)

    def start(self, before: str, through: str, arguments: tuple[str, ...]) -> None:
        start = f"{through} claude --permission-mode default {' '.join(arguments)}"
        words = f"{before}\ncd {self.place.work}\n{start}\necho $? > ../status\nsleep 999"
        self.stage = TmuxStage(self.directory, ["sh", "-c", words], self.environment)

    def guarded(self, max_mib: int, *arguments: str, policy: str = "") -> None:
        """With `governor guard` beside it."""
        self.in_a_memcg(max_mib, *arguments)
        command = ["governor", "guard", "--cgroup", str(self.container.path), "--profile", "claude-code"]
        command += ["--channel", self.channel, *self.options(policy)]
        with (self.directory / "guard.log").open("wb") as log:
            self.guard = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log)
        self.await_protection()

    def run(self, max_mib: int, *arguments: str, policy: str = "") -> None:
        """As `governor run` starts it."""
        before = set(Path("/run/governor").glob("run-*.sock"))
        options = " ".join([f"--memory-max {max_mib}MiB", *self.options(policy)])
        self.start("", f"governor run {options} --", arguments)
        [path] = wait_for(lambda: set(Path("/run/governor").glob("run-*.sock")) - before, 60)
        self.channel = f"pty:{path}"
        self.await_prompt(120)
        self.await_protection()

    def await_protection(self) -> None:
        def protecting():
            assert self.guard is None or self.guard.poll() is None, self.log()
            return "bpf" in str(self.lines("protecting"))

        wait_for(protecting, 120)

    def options(self, policy: str) -> list[str]:
        path = self.directory / "policy.toml"
        path.write_text(policy)
        return [
            "--policy",
            str(path),
            "--archive-dir",
            str(self.directory / "archives"),
            "--journal",
            str(self.journal),
        ]

    def lines(self, *kinds: str) -> list[dict]:
        whole = self.journal.read_bytes().rpartition(b"\n")[0] if self.journal.exists() else b""
        return [line for line in map(json.loads, whole.splitlines()) if line["kind"] in kinds]

    def log(self) -> str:
        logs = [self.directory / "guard.log", *(self.state / "governor").glob("run-*.log")]
        return "".join(path.read_text() for path in logs if path.exists())

    def fill_to(self, ratio: float) -> None:
        """Its limit is changed so that it is full to this share."""
        self.container.write("memory.max", "max")
        self.container.write("memory.max", int(self.unreclaimable_bytes() / ratio))

    def unreclaimable_bytes(self) -> int:
        memcg = cgroup.Memcg(str(self.container.path))
        try:
            return memcg.memory_state().unreclaimable_bytes
        finally:
            memcg.close()

    def relieve(self) -> None:
        """Until the episode is over."""
        self.container.write("memory.max", 3 << 30)
        path = self.state / "governor" / state_file.path_for(str(self.container.path)).name
        wait_for(lambda: not json.loads(path.read_text())["state"]["in_episode"], 60)

    def status(self) -> str:
        """The exit status of `governor run`; "" while it runs."""
        path = self.directory / "status"
        return path.read_text().strip() if path.exists() else ""

    def governors(self) -> list[psutil.Process]:
        """The guard and its reflex."""
        pid = int(self.lines("reflex_started")[-1]["pid"])
        guard = psutil.Process(pid).parent()
        return [guard, *guard.children()]

    def figures(self) -> str:
        """Resident memory of the agent and of what governor keeps beside it."""
        guard, reflex = self.governors()
        found = {"the agent": psutil.Process(self.find().pid), "guard": guard, "reflex": reflex}
        if self.guard is None:
            found["governor run"] = guard.parent()
        return "resident: " + ", ".join(
            f"{name} {one.memory_info().rss / MIB:.1f} MiB" for name, one in found.items()
        )

    def told(self, session: str) -> str:
        """All that was said in a session, tools and their results included."""
        records = self.place.transcript(session)
        return "\n".join(str(record["message"]) for record in records if record.get("type") in ("user", "assistant"))

    def close(self) -> None:
        print(self.log())
        if self.stage:
            with suppress(subprocess.SubprocessError):
                print(self.stage.tmux("capture-pane", "-p", "-t", "agent"))
            with suppress(subprocess.SubprocessError):
                self.stage.close()
        if self.guard:
            self.guard.terminate()
            self.guard.wait(60)
        if self.container:
            self.container.close()
        self.place.close()


@pytest.fixture
def claude(program, tmp_path):
    one = Governed(tmp_path, program)
    yield one
    one.close()


def test_when_memory_crosses_the_level_it_is_asked_to_compact_and_never_at_the_wrong_moment(claude):
    claude.guarded(3072, policy=COMPACTS)
    claude.turn("hello")
    claude.turn("and how are you")
    session = claude.seen().session
    claude.fill_to(0.55)
    wait_for(lambda: claude.lines("delivered"), 90)
    assert claude.place.answers().count("compaction") == 1
    claude.relieve()

    claude.turn("more to talk of")
    claude.type("a draft that matters")
    claude.fill_to(0.55)
    wait_for(lambda: len(claude.lines("delivered")) == 2, 90)
    wait_for(lambda: claude.seen().draft == "a draft that matters")
    assert claude.place.answers().count("compaction") == 2
    claude.relieve()

    claude.stage.type("\x15")
    wait_for(lambda: claude.seen().draft == "")
    claude.submit("TOOL touch approved")
    wait_for(lambda: claude.seen().state is State.WAITING, 60)
    claude.fill_to(0.55)
    wait_for(lambda: len(claude.lines("compact_deferred")) >= 2, 90)
    assert all("nothing typed: it is waiting" in line["text"] for line in claude.lines("compact_deferred"))
    assert claude.seen().state is State.WAITING
    assert not (claude.place.work / "approved").exists()
    claude.stage.type("\x1b")  # and when the dialog is gone it is asked
    wait_for(lambda: len(claude.lines("delivered")) == 3, 90)
    claude.relieve()

    claude.submit("SLOW 15")
    wait_for(lambda: claude.seen().state is State.BUSY, 60)
    claude.fill_to(0.55)
    wait_for(lambda: len(claude.lines("delivered")) == 4, 120)
    wait_for(lambda: claude.place.answers()[-2:] == ["slow", "compaction"], 60)
    assert claude.seen().session == session
    assert not claude.lines("braked", "terminating")


@pytest.mark.parametrize("how", [Governed.guarded, Governed.run], ids=["guard", "run"])
def test_a_tool_that_bursts_dies_and_the_turn_goes_on(claude, capsys, how):
    how(claude, 1024, "--allowedTools", "Bash")
    (claude.place.work / "burst.py").write_text(BURST)
    claude.turn("hello")
    agent, session = claude.find(), claude.seen().session
    with capsys.disabled():
        print(f"\n{claude.figures()}")
    claude.turn("TOOL python3 burst.py", within_s=90)
    assert claude.place.answers()[-2:] == ["tool", "text"]
    assert claude.place.asked()[-1]["result"].startswith("Exit code")
    assert (claude.find(), claude.seen().session) == (agent, session)
    assert "python3" in claude.lines("shed")[0]["text"]
    assert not claude.lines("terminating", "oom_kill")
    began_ns = int((claude.place.work / "began").read_text())
    braked = claude.lines("braked")[0]
    with capsys.disabled():
        print(f"held {(braked['frozen_ns'] - began_ns) / 1e6:.0f} ms after the tool began to grow; {braked['text']}")
    claude.turn("TOOL governor why", within_s=120)  # what the agent, or what it runs next, can read
    assert "governor killed python3" in claude.place.asked()[-1]["result"]
    told = claude.told(session)
    assert [
        name for name in ("hello", "burst.py", "Exit code", "governor why", "governor killed") if name not in told
    ] == []


def test_an_agent_at_its_own_limit_is_archived_ended_and_goes_on_under_its_session(claude):
    claude.run(240)
    claude.turn("hello")
    session = claude.seen().session
    claude.submit("BIG 1")
    wait_for(lambda: claude.lines("terminating"), 600)
    wait_for(lambda: len(claude.lines("agent")) >= 2, 120)
    claude.await_prompt(120)
    assert claude.seen().session == session
    claude.turn("SLOW 0", "slow", 120)
    # The prompt that was being answered is in history.jsonl; the program may have had no time for the transcript.
    wait_for(
        lambda: all(each in claude.told(session) for each in ("hello", "It is done.", "SLOW 0", "took a while")), 60
    )
    assert not claude.lines("oom_kill", "oom_killed")
    name = claude.lines("archived")[0]["name"]
    command = ["governor", "archive", "verify", name, "--archive-dir", str(claude.directory / "archives")]
    assert subprocess.run(command, env=claude.environment | {"HOME": "/root"}).returncode == 0
    files = [Path(entry.path).name for entry in archive.read_manifest(claude.directory / "archives", name).files]
    assert f"{session}.jsonl" in files and "history.jsonl" in files


def test_a_killed_governor_leaves_the_agent_alone_and_a_killed_agent_is_not_brought_back(claude):
    claude.run(1024)
    claude.turn("hello")
    agent = claude.find()
    claude.submit("SLOW 10")
    wait_for(lambda: claude.seen().state is State.BUSY, 60)
    for process in claude.governors():
        process.kill()
    wait_for(lambda: claude.seen().state is State.IDLE and claude.place.answers()[-1] == "slow", 120)
    assert claude.find() == agent
    wait_for(lambda: len(claude.lines("protecting")) >= 2, 120)
    os.kill(agent.pid, signal.SIGKILL)
    wait_for(claude.status, 60)
    assert claude.status() == "137"
    assert not claude.place.pids()


def test_without_governor_the_same_growth_ends_in_an_oom_kill(claude):
    claude.in_a_memcg(240)
    claude.turn("hello")
    claude.submit("BIG 1")
    wait_for(claude.status, 600)
    assert (claude.status(), claude.container.events()["oom_kill"]) == ("137", 1)
