"""`governor report` of a real burst: what it says did happen, and the command that it gives restores the session."""

import json
import select
import shlex
import subprocess

import pytest
from conftest import in_a_fork

from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel


def governor(argv, **options):
    return subprocess.run(argv, capture_output=True, text=True, timeout=60, preexec_fn=in_a_fork(argv), **options)


def test_a_tool_that_was_shed_and_an_agent_that_was_ended_are_told(container, guard, tmp_path):
    pod = container(256)
    cache = ["dd", "if=/dev/zero", f"of={tmp_path}/cache", "bs=1M", "count=60"]
    assert pod.start(*cache, stderr=subprocess.DEVNULL).wait(timeout=30) == 0
    first = pod.agent(tmp_path / "session.jsonl", "tool")
    watching = guard(pod).ready()
    first.go()
    assert select.select([first.stdout], [], [], 90)[0], watching.log()
    assert first.stdout.readline() == "tool ended with -9\n"
    first.terminate()
    assert first.wait(timeout=20) == 143
    second = pod.agent(tmp_path / "second.jsonl", "touch", "--rate-mb", "120")
    wait_for(lambda: watching.lines("agent")[-1]["pid"] == second.pid, 20)
    second.go()
    assert second.wait(timeout=90) == 143
    watching.await_line("agent_ended", count=2)
    ended_ns = watching.lines("agent_ended")[-1]["monotonic_ns"]
    wait_for(lambda: watching.lines("archived")[-1]["monotonic_ns"] > ended_ns)
    watching.stop()

    page = tmp_path / "report.html"
    done = governor(["governor", "report", str(watching.journal_path), "-o", str(page)])
    assert done.returncode == 0, done.stderr
    assert '<svg class="wide"' in page.read_text()
    told = json.loads(governor(["governor", "report", str(watching.journal_path), "--format", "json"]).stdout)
    episodes = told["episodes"][::-1]  # one or two: as fast as the second agent was there
    assert episodes[-1]["outcome"] == "terminated"
    freed = [one for episode in episodes for one in episode["freed"]]
    assert [one["tier"] for one in freed] == ["shed", "terminate"]
    assert all(one["bytes"] > 100 << 20 for one in freed)
    assert f"process {watching.lines('shed')[0]['pids'][0]}" in json.dumps(episodes[0]["answers"])
    assert max(look["memory"]["file_lru_bytes"] for look in episodes[0]["looks"]) > 50 << 20
    assert all(hold["frozen"] and hold["to_ns"] for episode in episodes for hold in episode["holds"])
    assert told["facts"]["kernel"].startswith("Linux ") and told["facts"]["memory.max"] == str(256 << 20)
    command = shlex.split(episodes[-1]["restore"]["command"])
    restored = governor(command, cwd=tmp_path)
    assert restored.returncode == 0, restored.stderr
    assert (tmp_path / "restored" / str(tmp_path).lstrip("/") / "second.jsonl").exists()
    replayed = governor(["governor", "replay", str(watching.journal_path)])
    assert " 0 of them decided otherwise" in replayed.stderr, replayed.stderr
