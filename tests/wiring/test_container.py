"""governor in a real container: as its entrypoint, and started by a hook beside an entrypoint that stays as it is."""

import json

from conftest import WIRING, archived, wait_for


def entrypoint():
    [line] = [line for line in (WIRING / "Containerfile").read_text().splitlines() if line.startswith("ENTRYPOINT")]
    return json.loads(line.removeprefix("ENTRYPOINT"))


def saved(pod):
    return (pod.home / ".claude/projects/p/s.jsonl.saved").exists()


def log_of_the_guard(pod):
    return "".join(path.read_text() for path in (pod.home / ".local/state/governor").glob("guard-*.log"))


def test_without_governor_the_kernel_kills_it_and_nothing_is_saved(pod):
    one = pod("pod-hook.yaml", hook=False)
    wait_for(lambda: "ready" in one.log())
    one.burst()
    assert one.process.wait(timeout=90) == 137
    assert one.oom_kills() == 1
    assert not saved(one) and not archived(one.home)


def test_as_the_entrypoint_the_session_is_archived_and_the_agent_saves(pod):
    one = pod("pod-entrypoint.yaml", entrypoint=entrypoint())
    wait_for(lambda: "ready" in one.log() and "protecting" in one.log())
    assert "brake: stop; limit: its own limit" in one.log()
    one.burst()
    assert one.process.wait(timeout=90) == 143, one.log()
    assert one.oom_kills() == 0
    assert saved(one)
    assert archived(one.home)
    assert one.termination_log.read_text().startswith("governor: terminated: "), one.termination_log.read_text()


def test_as_the_entrypoint_sigterm_is_the_agents(pod):
    one = pod("pod-entrypoint.yaml", entrypoint=entrypoint())
    wait_for(lambda: "ready" in one.log() and "protecting" in one.log())
    second = one.exec("/opt/governor/bin/governor", "guard", "--cgroup", "self", "--background")
    assert (second.returncode, "already guarded" in second.stderr) == (0, True), second.stderr
    one.kill("SIGTERM")
    assert one.process.wait(timeout=60) == 143, one.log()
    assert saved(one)
    assert "NOT PROTECTED" not in one.log()


def test_a_hook_starts_a_guard_that_outlives_it(pod):
    one = pod("pod-hook.yaml")
    assert one.hook.returncode == 0, one.hook.stderr
    assert "in the background" in one.hook.stderr
    assert "protecting" in log_of_the_guard(one), "it was ready before it protects"
    wait_for(lambda: "ready" in one.log())
    one.burst()
    assert one.process.wait(timeout=90) == 143, log_of_the_guard(one)
    assert one.oom_kills() == 0
    assert saved(one)
    assert archived(one.home)
    assert one.termination_log.read_text().startswith("governor: terminated: ")
    assert "braked: stopped" in log_of_the_guard(one)


def test_beside_an_agent_that_is_process_1_a_tool_is_shed_and_the_agent_lives(pod):
    one = pod("pod-hook.yaml", environment={"BURST": "tool"}, shareProcessNamespace=False)
    assert one.hook.returncode == 0, one.hook.stderr
    wait_for(lambda: "ready" in one.log())
    wait_for(lambda: "process 1: only its tools" in log_of_the_guard(one))
    one.burst()
    wait_for(lambda: "tool ended with -9" in one.log(), what=f"the tool's end\n{log_of_the_guard(one)}")
    assert "SIGKILL to python3" in log_of_the_guard(one)
    assert archived(one.home)
    told = one.exec("/opt/governor/bin/governor", "why")
    assert "python3" in told.stdout, told
    one.kill("SIGTERM")
    assert one.process.wait(timeout=60) == 143
    assert one.oom_kills() == 0
