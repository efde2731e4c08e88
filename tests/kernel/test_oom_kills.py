"""OOM kills that got through, by the real killer: whose limit it was, counted, and archived after the fact."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Guard

AGENT = """
import os, sys, time

def first_to_go():
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")

sys.stdin.readline()
if not os.fork():
    first_to_go()
    held = b"x" * (200 << 20)
os.wait()
first_to_go()
print("its tool died", flush=True)
time.sleep(600)
"""
POLICY = "[brake]\nenabled = false\n[terminate]\nenabled = false\n"


@pytest.fixture
def watched(container, tmp_path):
    """An agent in 64 MiB, and a guard that only looks."""
    (tmp_path / "policy.toml").write_text(POLICY)
    (tmp_path / "session.jsonl").write_text("a turn\n")
    memcg = container(64)
    agent = memcg.start(sys.executable, "-c", AGENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    guard = Guard(tmp_path, memcg, "--source", "poll", "--policy", tmp_path / "policy.toml", loaded=False)
    yield agent, guard.ready()
    print(guard.log())
    guard.stop()
    agent.stdin.close()


@pytest.mark.skipif(
    not os.environ.get("GOVERNOR_VM"), reason="makes the machine's OOM killer choose: only in scripts/vm"
)
def test_a_kill_at_the_limit_and_one_for_want_of_memory_on_the_machine(watched):
    agent, guard = watched
    agent.stdin.write("\n")
    agent.stdin.flush()
    assert agent.stdout.readline() == "its tool died\n"
    told = guard.await_line("oom_kills")["text"]
    assert (
        "at the limit of its memcg: 1 process here (1 since governor guards this memcg, 1 since it was made)" in told
    )
    assert not guard.lines("oom_killed", "agent_ended")
    Path("/proc/sysrq-trigger").write_text("f")  # the machine's OOM killer takes the one with the highest score
    assert agent.wait(timeout=30) == -9
    told = guard.await_line("oom_kills", count=2)["text"]
    assert "for want of memory on the machine: 1 process here (2 since governor guards this memcg, 2" in told
    assert "for want of memory on the machine" in guard.await_line("oom_killed")["text"]
    assert guard.await_line("archived")["files"] == 1
