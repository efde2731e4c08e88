"""`governor run` on cgroup v2: in a memcg made for the agent, inside a container's, and where there is none."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import AGENT, MIB

from governor import cgroup
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel


class Run:
    """`governor run`, as a container or a person starts it."""

    def __init__(self, tmp_path, start, *words):
        self.log_path = tmp_path / "log"
        self.journal_path = tmp_path / "journal.ndjson"
        options = ["--archive", f"{tmp_path}/*.jsonl*", "--archive-dir", tmp_path / "archives"]
        options += ["--journal", self.journal_path]
        command = [sys.executable, "-m", "governor", "run", *options, *words]
        with self.log_path.open("wb") as log:
            self.process = start(*map(str, command), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log)

    def log(self):
        return self.log_path.read_text()

    def await_log(self, text, seconds=60):
        try:
            wait_for(lambda: text in self.log(), seconds)
        except AssertionError:
            raise AssertionError(f"found no {text!r} in:\n{self.log()}") from None


@pytest.fixture
def run(tmp_path):
    made = []

    def make(*words, start=lambda *argv, **options: subprocess.Popen(argv, text=True, **options)):
        made.append(Run(tmp_path, start, *words))
        return made[-1]

    yield make
    for one in made:
        print(one.log())
        if one.process.poll() is None:
            one.process.terminate()
        one.process.wait(timeout=40)
        one.process.stdin.close()
        one.process.stdout.close()


def burst(tmp_path):
    session, begin = tmp_path / "session.jsonl", tmp_path / "begin"
    return begin, [sys.executable, AGENT, session, "touch", "--rate-mb", "40", "--begin", begin]


def test_a_burst_in_a_memcg_of_its_own_is_frozen_archived_and_ended(run, tmp_path):
    begin, agent = burst(tmp_path)
    one = run("--memory-max", "96MiB", "--source", "poll", "--", *agent)
    assert one.process.stdout.readline() == "ready\n"
    [path] = Path(cgroup.ROOT).rglob(f"governor-run-{one.process.pid}")
    assert (path / "memory.max").read_text().strip() == str(96 * MIB)
    assert str(one.process.pid) not in (path / "cgroup.procs").read_text().split()
    one.await_log("brake: freeze; limit: its own limit")
    begin.touch()
    assert one.process.wait(timeout=90) == 143, one.log()
    assert "braked: frozen" in one.log()
    assert (tmp_path / "session.jsonl.saved").exists()
    assert one.log().count("session files as") >= 2, one.log()  # held, and after the agent's end
    assert not path.exists()


def test_inside_the_containers_memcg_governor_outlives_the_agent(run, tmp_path, container):
    pod = container(160)
    begin, agent = burst(tmp_path)
    one = run("--source", "poll", "--", *agent, start=pod.start)
    assert one.process.stdout.readline() == "ready\n"
    one.await_log("brake: stop; limit: its own limit")
    begin.touch()
    assert one.process.wait(timeout=90) == 143, one.log()
    assert "braked: stopped" in one.log()
    assert pod.events()["oom_kill"] == 0
    assert (tmp_path / "session.jsonl.saved").exists()


def test_in_the_root_cgroup_a_memcg_without_a_limit_is_made(run):
    try:
        Path(cgroup.ROOT, "cgroup.procs").write_text(str(os.getpid()))
    except OSError as error:
        pytest.skip(str(error))
    one = run("--source", "poll", "--", "cat")
    one.await_log("no limit anywhere: what the machine has available")
    [path] = Path(cgroup.ROOT).glob(f"governor-run-{one.process.pid}")
    assert (path / "memory.max").read_text() == "max\n"
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(timeout=40) == 143
    assert not path.exists()
