"""SIGKILL of either process while a brake is held; readers that come back."""

import os
import signal
import subprocess
import time

import pytest

from tests.waiting import wait_for

PICTURE_MB = "64"  # makes an archive that takes a while: the brake is held meanwhile


def held(pod, guard, tmp_path, *options):
    """A guard that holds a brake, and its agent, which does not grow further by itself."""
    agent = pod.agent(
        tmp_path / "session.jsonl", "touch", "--total-mb", "225", "--picture-mb", PICTURE_MB, "--rate-mb", "200"
    )
    governor = guard(pod, *options).ready()
    agent.go()
    governor.await_line("braked")
    assert pod.read("cgroup.freeze") == "1"
    return governor, agent


def is_released(pod):
    return pod.read("cgroup.freeze") == "0" and pod.read("memory.high") == "max"


def gone(pid):
    return not os.path.exists(f"/proc/{pid}")


@pytest.mark.parametrize("victim", ["governor", "reflex"])
def test_whoever_survives_restores(container, guard, tmp_path, victim):
    pod = container(256)
    governor, agent = held(pod, guard, tmp_path)
    reflex_pid = governor.reflex_pid()
    pid = governor.process.pid if victim == "governor" else reflex_pid
    os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: is_released(pod), seconds=5, what="thawing")
    took = time.monotonic() - killed
    print(f"thawed and restored {took * 1000:.0f} ms after SIGKILL of {victim}")
    assert took < 1.0
    assert agent.poll() is None
    if victim == "governor":
        wait_for(lambda: gone(reflex_pid), what="the end of reflex")
        governor.process.wait()
    else:
        governor.await_line("reflex_gone")
        again = governor.await_line("reflex_started", count=2)
        governor.await_line("protecting", count=2)
        assert not gone(again["pid"])


def test_records_wait_for_a_reader_that_comes_back(container, guard, tmp_path):
    pod = container(256)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--total-mb", "185")
    governor = guard(pod).ready()
    reflex_pid = governor.reflex_pid()
    for pid in (reflex_pid, governor.process.pid):
        os.kill(pid, signal.SIGKILL)
    governor.process.wait()
    wait_for(lambda: gone(reflex_pid))
    agent.go()
    wait_for(lambda: pod.ratio() > 0.71, what="growth with nobody reading")
    restarted_ns = time.monotonic_ns()
    again = guard(pod).ready()
    crossing = again.await_line("crossing")
    assert crossing["record"]["ktime_ns"] < restarted_ns
    assert crossing["record"]["level"] == 1


def test_a_second_guard_leaves(container, guard, tmp_path):
    pod = container(64)
    pod.agent(tmp_path / "session.jsonl", "none")
    governor = guard(pod).ready()
    second = subprocess.run(
        ["governor", "guard", "--cgroup", pod.path, "--instance", "other"], capture_output=True, text=True, timeout=60
    )
    assert second.returncode == 0
    assert f"already guarded by process {governor.process.pid}" in second.stderr
