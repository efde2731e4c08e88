"""governor.agent in real memcgs: a leaky agent that sheds load, crossings by governor's socket, `memory.events`."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import MIB

from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

FAKES = Path(__file__).parent.parent / "fakes"
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}

# Fills so much that the container holds a share of its limit, when told, in steps of 1 MiB
HOLDS = """
import mmap, sys, time
at_start = mmap.mmap(-1, int(sys.argv[1]) << 20)
for i in range(0, len(at_start), 4096): at_start[i] = 1
print("held", flush=True)
for line in sys.stdin:
    more = mmap.mmap(-1, int(line) << 20)
    block = b"1" * (1 << 20)
    for _ in range(int(line)):
        more.write(block)
        time.sleep(0.005)
    print("more", flush=True)
    sys.stdin.readline()
    more.close()
    print("less", flush=True)
"""


def test_a_leaky_agent_sheds_load_recovers_and_is_never_killed(container):
    pods = [container(64), container(64)]
    protected, naive = (
        pod.start(sys.executable, FAKES / "leaky_agent.py", 1000, *options, stdout=subprocess.PIPE, env=ENVIRONMENT)
        for pod, options in zip(pods, [["--protected"], []], strict=True)
    )
    assert naive.wait(timeout=120) == -9
    assert pods[1].events()["oom_kill"] == 1
    said = json.loads(protected.stdout.readline())
    assert protected.wait(timeout=120) == 0
    assert pods[0].events()["oom_kill"] == 0
    assert said["served"] == 1000  # 250 MiB through 64
    assert said["refused"] > 0
    assert said["recovered"] >= 3
    assert 0.85 <= said["highest"] < 1
    assert said["bound_by"] == str(pods[0].path)
    print(said)


class Watching:
    """A watching agent in a pod, and what it has said."""

    def __init__(self, pod, *options):
        command = [sys.executable, FAKES / "watching_agent.py", *options]
        self.process = pod.start(*command, stdout=subprocess.PIPE, env=ENVIRONMENT)
        self.said = []
        self.reader = threading.Thread(target=self.read, daemon=True)
        self.reader.start()

    def read(self):
        for line in self.process.stdout:
            self.said.append(json.loads(line))

    def lines(self, key, value):
        return [line for line in self.said if line.get(key) == value]

    def await_line(self, key, value, count=1):
        return wait_for(lambda: self.lines(key, value)[count - 1 : count], 60, f"{key} {value}")[0]

    def end(self):
        self.process.kill()
        self.reader.join()


def holding(pod, mib):
    process = pod.start(sys.executable, "-c", HOLDS, mib, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout.readline() == "held\n"

    def say(line, answer):
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{answer}\n"

    process.say = say
    return process


def test_a_crossing_is_heard_from_governor_though_it_looks_seldom_and_its_requests_are_done(container, guard):
    pod = container(256)
    holder = holding(pod, 130)
    governor = guard(pod).ready()
    polling, hearing = Watching(pod, "--seldom", "--alone"), Watching(pod, "--seldom")
    for agent in (polling, hearing):
        agent.await_line("ready", True)
    holder.say(round((0.74 - pod.ratio()) * 256), "more")
    seen = hearing.await_line("status", "warning")
    assert polling.lines("status", "warning") == []
    crossed = [line["at_ns"] for line in hearing.lines("crossed", "compact") if line["rising"]]
    print(f"{(seen['ns'] - crossed[0]) / 1e6:.1f} ms after the crossing")
    hearing.await_line("asked", "compact")
    assert governor.await_line("delivered")["output"] == "as asked"
    for agent in (hearing, polling):
        agent.end()


def test_what_the_kernel_counts_at_max_is_seen_though_it_looks_seldom(container, tmp_path):
    pod = container(64)
    agent = Watching(pod, "--alone", "--seldom")
    agent.await_line("ready", True)
    holder = holding(pod, round((0.82 - pod.ratio()) * 64) - 8)  # and the holder itself
    assert pod.ratio() > 0.72
    large = tmp_path / "large"
    with large.open("wb") as file:
        file.truncate(128 * MIB)
    assert not [line for line in agent.said if "status" in line]
    reading = pod.start("cat", large, stdout=subprocess.DEVNULL)
    assert reading.wait(timeout=60) == 0
    assert pod.events()["max"] > 0
    seen = wait_for(lambda: [line for line in agent.said if "status" in line])[0]
    assert seen["ns"] - agent.lines("ready", True)[0]["ns"] < 25e9
    holder.kill()
    agent.end()
