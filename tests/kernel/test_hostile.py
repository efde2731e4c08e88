"""Agents that get in the way, and machines that fail at the worst moment: the session is still archived first."""

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import AGENT, INSTANCE

from tests.waiting import wait_for


def is_saved(pod, governor, agent, statuses=(143, -9)):
    assert agent.wait(timeout=60) in statuses, governor.log()
    archived = governor.await_line("archived")
    assert archived["files"] >= 1
    deaths = [line["monotonic_ns"] for line in governor.lines("killed", "terminating", "oom_kill")]
    assert archived["monotonic_ns"] < min(deaths)
    assert pod.events()["oom_kill"] == 0


@pytest.mark.any_kernel
def test_file_names_that_flood_and_file_names_that_are_not_text(container, guard, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch")
    for number in range(1500):
        (tmp_path / f"{'x' * 60}-{number}.jsonl").symlink_to("/etc/shadow")
    with open(os.fsencode(tmp_path) + b"/\xff\x1b[2J.jsonl", "wb") as odd:
        odd.write(b"bytes\n")
    governor = guard(pod).ready()
    agent.go()
    is_saved(pod, governor, agent)
    assert governor.lines("archived")[0]["skipped"] == 1500
    assert "\x1b" not in governor.log()


@pytest.mark.any_kernel
def test_the_agent_behind_a_shell_gets_the_sigterm(container, guard, tmp_path):
    pod = container(128)
    session, begin = tmp_path / "session.jsonl", tmp_path / "begin"
    command = f"{sys.executable} {AGENT} {session} touch --begin {begin} --rate-mb 60; echo over"
    shell = pod.start("sh", "-c", command, stdout=subprocess.PIPE)
    assert shell.stdout.readline() == "ready\n"
    governor = guard(pod).ready()
    begin.touch()
    shell.wait(timeout=60)
    assert governor.await_line("archived")
    assert (tmp_path / "session.jsonl.saved").exists(), governor.log()
    assert pod.events()["oom_kill"] == 0


@pytest.mark.any_kernel
def test_nobody_reads_what_governor_says(container, tmp_path, loaded):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch")
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    journal = tmp_path / "journal.ndjson"
    command = ["governor", "guard", "--cgroup", pod.path, "--instance", INSTANCE, "--journal", journal]
    command += ["--archive", f"{tmp_path}/*.jsonl", "--archive-dir", tmp_path / "archives"]
    governing = subprocess.Popen([str(word) for word in command], stderr=write_fd)
    try:
        wait_for(lambda: journal.exists() and '"protecting"' in journal.read_text())
        try:
            while True:
                os.write(write_fd, b"x" * 4096)
        except BlockingIOError:
            os.set_blocking(write_fd, True)
        agent.go()
        assert agent.wait(timeout=60) in (143, -9)
        assert '"archived"' in journal.read_text()
        assert pod.events()["oom_kill"] == 0
    finally:
        os.close(read_fd)
        governing.terminate()
        governing.wait(timeout=20)
        os.close(write_fd)


@pytest.mark.any_kernel
def test_a_fork_that_fails_does_not_end_the_protection(container, guard, tmp_path):
    pod, own = container(128), container(0)
    agent = pod.agent(tmp_path / "session.jsonl", "touch")
    governor = guard(pod).ready()
    own.write("cgroup.procs", governor.process.pid)
    own.write("pids.max", 1)
    agent.go()
    assert agent.wait(timeout=60) in (143, -9)
    assert governor.await_line("archive_failed")
    governor.await_line("agent_ended")
    assert pod.events()["oom_kill"] == 0
    assert governor.stop() == 0


def test_a_memcg_that_somebody_else_froze_is_left_alone(container, guard, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--total-mb", "112")
    agent.go()
    wait_for(lambda: pod.ratio() > 0.91)
    pod.write("cgroup.freeze", 1)
    governor = guard(pod).ready()
    time.sleep(3)
    assert pod.read("cgroup.freeze") == "1"
    assert governor.lines("braked", "terminating", "killed") == [], governor.log()
    assert agent.poll() is None


def test_both_killed_while_braked_and_one_comes_back(container, guard, tmp_path):
    pod = container(256)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--picture-mb", "64")
    governor = guard(pod).ready()
    agent.go()
    governor.await_line("braked")
    pids = (governor.reflex_pid(), governor.process.pid)
    os.kill(governor.process.pid, signal.SIGSTOP)  # which would thaw it between the one kill and the other
    os.waitid(os.P_PID, governor.process.pid, os.WSTOPPED)
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    governor.process.wait()
    wait_for(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))
    assert pod.read("cgroup.freeze") == "1"  # nobody was left to thaw it
    again = guard(pod)
    assert agent.wait(timeout=90) in (143, -9), again.log()
    again.await_line("archived")
    again.await_line("agent_ended")
    assert pod.events()["oom_kill"] == 0
    wait_for(lambda: pod.read("cgroup.freeze") == "0" and pod.read("memory.high") == "max")


@pytest.mark.any_kernel
def test_a_full_agent_that_sits_still_lives(container, guard, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--total-mb", "110")
    agent.go()
    assert agent.stdout.readline() == "burst over\n"
    assert 0.9 < pod.ratio() < 0.93
    governor = guard(pod).ready()
    governor.await_line("archived")
    time.sleep(3)
    assert governor.lines("terminating", "killed") == [], governor.log()
    assert pod.read("cgroup.freeze") == "0"
    assert agent.poll() is None
