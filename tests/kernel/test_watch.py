"""`governor watch` on a real burst, at a real terminal, as somebody sees it who opens it when a pod misbehaves."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from governor import record
from tests.screen import Screen
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel


@pytest.fixture
def kept():
    """Where screens are kept to be looked at: scripts/vm brings them back."""
    directory = Path("/out/screens") if os.access("/out", os.W_OK) else None
    if directory:
        directory.mkdir(exist_ok=True)
    return lambda name, text: directory and (directory / f"{name}.txt").write_text(text)


def test_a_burst_that_is_governed(container, guard, tmp_path, kept):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--start-mb", "20", "--total-mb", "140", "--rate-mb", "12")
    governor = guard(pod).ready()
    screen = Screen(tmp_path, ["governor", "watch", pod.path], lines=40)
    try:
        calm = screen.shows("by governor", "watching", "compact at 70 %", "python3", "agent")
        kept("calm", calm)
        assert re.search(r"unreclaimable \d+\.\d of 128\.0 MiB", calm)
        assert "stalls" in calm
        assert "oom_kill 0" in calm
        agent.go()
        kept("growing", screen.shows("rising to compact", "in episode", "bursts"))
        kept("held", screen.shows("braked", "archived", seconds=60))
        kept("over", screen.shows("terminating", "agent_ended", seconds=60))
        screen.keys("q")
        end = screen.shows("ended with 0")
        kept("summary", end)
        assert re.search(r"\d crossings? upwards", end)
        assert "terminating 1" in end
    finally:
        screen.close()
    assert governor.lines("terminating")
    pids = [line["pid"] for line in governor.lines("reflex_started")]
    assert len(pids) == 1, "who watches disturbs nobody"


def test_one_that_nobody_governs_is_killed_and_seen(container, tmp_path, loaded):
    """By the BPF programs of watch itself, which are gone when it has ended; --until ends at the first crossing."""
    from governor import pins

    pod = container(64)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "15")
    out = tmp_path / "watched"
    with out.open("w") as sink:
        watching = subprocess.Popen(["governor", "watch", pod.path, "--json", "--for", "90"], stdout=sink)
        crossing = subprocess.Popen(
            ["governor", "watch", str(agent.pid), "--until", "crossing", "--source", "psi", "--for", "90"],
            stdout=subprocess.DEVNULL,
        )
    try:
        wait_for(lambda: "bpf (fentry)" in out.read_text(), 80, "the programs of watch")
        agent.go()
        assert agent.wait(timeout=60) == -9  # watch only reads
        wait_for(lambda: '"kind":"oom_kill"' in out.read_text(), 20, "the victim")
    finally:
        watching.send_signal(2)
        assert watching.wait(timeout=20) == 0
    assert crossing.wait(timeout=20) in (10, 20, 30, 40)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert {line["type"] for line in lines} == {"source", "sample", "crossing", "event", "end"}
    assert [line["pids"] for line in lines if line.get("kind") == "oom_kill"] == [[agent.pid]]
    levels = [line["level"] for line in lines if line["type"] == "crossing" and line["rising"]]
    assert levels[-1] == record.LEVEL_NAMES[record.LEVEL_LAST]
    samples = [line for line in lines if line["type"] == "sample"]
    assert samples[0]["processes"][0]["pid"] == agent.pid
    assert samples[0]["target"]["cgroup"] == str(pod.path)
    assert lines[-1]["type"] == "end"
    assert lines[-1]["changes"]["oom_kill"] == 1
    assert not any(name.startswith("watch") for name in pins.instances())
