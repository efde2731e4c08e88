"""SIGKILL of governor, of reflex, or of both at random instants of bursts: nothing is stranded or done twice.

As many as fit in half a minute; `scripts/bench storm` does 200. GOVERNOR_STORM_COUNT and GOVERNOR_STORM_SEED say how
many and which.
"""

import os
import random
import re
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from conftest import AGENT, Guard

from governor import archive, cgroup, state_file
from tests.waiting import wait_for

COUNT = int(os.environ.get("GOVERNOR_STORM_COUNT", "0"))
SEED = int(os.environ.get("GOVERNOR_STORM_SEED") or time.time())
SECONDS = 20.0
VICTIMS = ("governor", "reflex", "governor", "reflex", "both")

# One episode, one compact in it: memory never stays below the release level, and nothing waives the cooldown.
POLICY = """
clear_after_compact = "2h"
[compact]
cooldown = "1h"
cooldown_waived = 1.0
settle = "1s"
efficacy = "useful"
exec = ["sh", "-c", "echo $GOVERNOR_TIER >> {done}; sleep 4"]
[brake]
probation = "2s"
[terminate]
grace = "5s"
"""


class Storm:
    """A memcg with one agent after the other, and one governor after the other."""

    def __init__(self, pod, directory):
        self.pod, self.directory = pod, directory
        self.policy = directory / "policy.toml"
        self.policy.write_text(POLICY.format(done=directory / "done"))
        self.sessions, self.agent, self.governor = [], None, None

    def keep_agent(self):
        """Another agent where the last one has ended. It may be frozen at birth: nothing here waits for that."""
        while self.agent is None or self.agent.poll() is not None:
            session = self.directory / f"session-{len(self.sessions)}.jsonl"
            command = [sys.executable, AGENT, session, "waves", "--start-mb", 86, "--total-mb", 29, "--rate-mb", 40]
            inside = 'echo $$ > "$0" && exec "$@"'
            self.agent = subprocess.Popen(
                ["sh", "-c", inside, self.pod.path / "cgroup.procs", *map(str, (*command, "--save-s", 0.2))],
                stdout=subprocess.PIPE,
            )
            self.pod.started.append(self.agent)
            self.sessions.append(session)
            assert select.select([self.agent.stdout], [], [], 30)[0], "the agent is stuck"
            self.agent.stdout.readline()

    def start(self):
        self.governor = Guard(self.directory, self.pod, "--policy", self.policy)
        self.wait_for_line("protecting")

    def journal_bytes(self):
        with suppress(FileNotFoundError):
            return self.governor.journal_path.read_bytes()
        return b""

    def wait_for_line(self, kind, from_bytes=None):
        begins = len(self.journal_bytes()) if from_bytes is None else from_bytes

        def found():
            assert self.governor.process.poll() is None, self.governor.log()
            return f'"kind":"{kind}"'.encode() in self.journal_bytes()[begins:]

        wait_for(found, 60, f"journal line {kind!r}")

    def held(self):
        return self.pod.read("cgroup.freeze") != "0" or self.pod.read("memory.high") != "max"

    def kill(self, victim):
        """Whether it was held, and milliseconds until everything was as it should be; governor runs again."""
        was_held = self.held()
        begins = len(self.journal_bytes())
        reflex_pid = self.governor.reflex_pid()
        pids = {"governor": [self.governor.process.pid], "reflex": [reflex_pid]}
        killed_ns = time.monotonic_ns()
        for pid in pids.get(victim) or [reflex_pid, self.governor.process.pid]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if victim != "reflex":
            self.governor.process.wait()
        if victim == "both":
            self.start()
        wait_for(lambda: not self.held(), 20, f"release after SIGKILL of {victim}")
        took_ms = (time.monotonic_ns() - killed_ns) / 1e6
        if victim == "reflex":
            self.wait_for_line("protecting", begins)
        elif victim == "governor":
            wait_for(lambda: not os.path.exists(f"/proc/{reflex_pid}"), what="the end of reflex")
            self.start()
        return was_held, took_ms


def test_nothing_is_stranded_done_twice_or_forgotten(container, tmp_path, loaded):
    chance = random.Random(SEED)
    print(f"\nseed {SEED}", flush=True)
    pod = container(128)
    storm = Storm(pod, tmp_path)
    storm.keep_agent()
    storm.start()
    try:
        releases = kill_again_and_again(storm, chance)
        storm.agent.kill()
        storm.agent.wait()
    finally:
        status = storm.governor.stop()
    lines = storm.governor.lines()
    tell(releases, storm, lines)
    assert status == 0 and not storm.held()
    assert not {"fault", "state_aside", "state_not_saved", "reflex_garbled"} & {line["kind"] for line in lines}
    asked = [re.search(r"process (\d+)", line["text"])[1] for line in lines if line["kind"] == "terminating"]
    assert len(asked) == len(set(asked)), "an agent was asked to end twice"
    for session in storm.sessions:
        saved = session.with_name(session.name + ".saved")
        assert not saved.exists() or saved.read_text().count("\n") == 1
    delivered = [line["kind"] for line in lines].count("deliver")
    assert delivered <= len(storm.sessions)  # to an agent, one that was killed on its way is not made again
    done = (tmp_path / "done").read_text().split() if (tmp_path / "done").exists() else []
    assert set(done) <= {"compact"} and len(done) <= delivered
    assert pod.events()["oom_kill"] == 0
    assert list(Path(cgroup.ROOT).glob("governor-exec-*")) == []
    for name in archive.names(storm.governor.directory):
        archive.verify(storm.governor.directory, name)
    replayed = subprocess.run(["governor", "replay", storm.governor.journal_path], capture_output=True, text=True)
    assert replayed.returncode == 0, replayed.stdout[-2000:] + replayed.stderr[-2000:]
    assert " 0 of them decided otherwise" in replayed.stderr


def test_a_compact_that_was_under_way_is_not_delivered_again(container, tmp_path, loaded):
    pod = container(128)
    storm = Storm(pod, tmp_path)
    storm.keep_agent()
    storm.start()
    try:
        wait_for((tmp_path / "done").exists, what="the compact command")
        assert not storm.governor.lines("delivered")  # it goes on for four seconds
        storm.kill("governor")
        time.sleep(5)
        assert (tmp_path / "done").read_text().split() == ["compact"]
        assert storm.governor.lines("begin")[-1]["state"]["compact"]["status"] == "delivered"
    finally:
        storm.governor.stop()


def kill_again_and_again(storm, chance):
    """A (victim, whether it was held, milliseconds to the release) for each SIGKILL."""
    state_path = state_file.path_for(str(storm.pod.path))
    releases, delivered_ns = [], None
    until = time.monotonic() + SECONDS
    while len(releases) < COUNT if COUNT else time.monotonic() < until:
        time.sleep(chance.uniform(0, 1.5))
        victim = VICTIMS[len(releases) % len(VICTIMS)]
        releases.append((victim, *storm.kill(victim)))
        saved, warning = state_file.load(state_path, str(storm.pod.path))
        assert saved and not warning
        assert saved.state.compact.delivered_ns or not delivered_ns, "a delivery was forgotten"
        delivered_ns = saved.state.compact.delivered_ns
        storm.keep_agent()
    return releases


def tell(releases, storm, lines):
    for victim in dict.fromkeys(VICTIMS):
        took = [(held, ms) for name, held, ms in releases if name == victim]
        held_ms = [ms for held, ms in took if held]
        longest_ms = max(held_ms, default=0)
        print(f"{len(took)} SIGKILLs of {victim}: {len(held_ms)} while held, released within {longest_ms:.0f} ms")
    kinds = [line["kind"] for line in lines]
    counts = [f"{kinds.count(kind)} {kind}" for kind in ("braked", "archived", "shed", "terminating", "killed")]
    print(f"{len(storm.sessions)} agents, {', '.join(counts)}", flush=True)
