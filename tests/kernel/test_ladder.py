"""The ladder on a real memcg: tools are shed, tiers follow each other, people may veto, and nothing is forgotten."""

import json
import os
import select
import signal
import subprocess

import pytest
from conftest import in_a_fork

from tests.waiting import wait_for

QUICK = """
clear_after_compact = "60s"
[compact]
settle = "1s"
cooldown = "20s"
exec = ["sh", "-c", "echo $GOVERNOR_TIER >> {done}; exit {status}"]
[clear]
settle = "1s"
warning = "1s"
exec = ["sh", "-c", "echo $GOVERNOR_TIER >> {done}"]
[brake]
probation = "2s"
"""


@pytest.fixture
def policy(tmp_path):
    """A policy file of QUICK and more; what was delivered is in its .done."""

    def make(more="", status=1, name="policy.toml"):
        path = tmp_path / name
        path.write_text(QUICK.format(done=tmp_path / "done", status=status) + more)
        return path

    return make


def delivered(tmp_path):
    done = tmp_path / "done"
    return done.read_text().split() if done.exists() else []


def governor_command(*argv):
    command = ["governor", *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, preexec_fn=in_a_fork(command))


@pytest.mark.parametrize("burst", ["tool", "processes"])
def test_the_tool_that_bursts_dies_and_the_agent_lives(container, guard, tmp_path, burst):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", burst)
    governor = guard(pod).ready()
    agent.go()
    readable = select.select([agent.stdout], [], [], 90)[0]
    growths = [line["of"]["growth"] for line in governor.lines("step") if line["event"] == "Braked"]
    assert readable, growths
    said = agent.stdout.readline()
    assert said == ("tool ended with -9\n" if burst == "tool" else "burst over\n"), growths
    assert agent.poll() is None, growths
    assert pod.events()["oom_kill"] == 0
    killed = [pid for line in governor.lines("shed") for pid in line["pids"]]
    assert killed and agent.pid not in killed
    assert not governor.lines("terminating", "killed")
    wait_for(lambda: pod.read("cgroup.freeze") == "0" and pod.read("memory.high") == "max")
    agent.terminate()
    assert agent.wait(timeout=20) == 143


@pytest.mark.parametrize("source", ["bpf", "psi"])
def test_a_slow_peak_of_its_own_that_ends_by_itself_costs_nothing(container, guard, tmp_path, source):
    pod = container(256)
    agent = pod.agent(tmp_path / "session.jsonl", "peak", "--start-mb", "160", "--rate-mb", "12")
    governor = guard(pod, "--source", source).ready()
    assert governor.lines("protecting")[-1]["source"] == source
    agent.go(int(0.935 * 256 - pod.ratio() * 256))
    assert select.select([agent.stdout], [], [], 90)[0], governor.log()
    assert agent.stdout.readline() == "burst over\n", governor.log()
    governor.await_line("braked")
    assert not governor.lines("shed", "terminating", "killed")
    assert agent.poll() is None


def test_clear_follows_a_compact_that_did_not_help(container, guard, policy, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20", "--total-mb", "104")
    path = policy()
    path.write_text(
        path.read_text().replace("[brake]", "[brake]\nenabled = false")
    )  # or steps of 1 MiB look fast to it
    governor = guard(pod, "--policy", path).ready()
    agent.go()
    governor.await_line("warning", 60)
    wait_for(lambda: "clear" in delivered(tmp_path), 60)
    governor.await_line("delivered")
    assert delivered(tmp_path)[0] == "compact"
    lines = governor.lines("deliver", "compact_failed", "warning", "delivered")
    told = [line.get("tier") or line["kind"] for line in lines]
    first = told.index("clear")
    assert set(told[: first - 1]) == {"compact", "compact_failed"}
    assert told[first - 1] == "warning" and lines[first + 1]["kind"] == "delivered"
    assert agent.poll() is None
    rules = [line["rule"] for line in governor.lines("step") if line["instructions"]]
    assert rules[0].startswith("compact is due")
    replayed = governor_command("replay", governor.journal_path)
    assert replayed.returncode == 0, replayed.stderr + replayed.stdout
    assert " 0 of them decided otherwise" in replayed.stderr
    other = governor_command("replay", governor.journal_path, "--policy", "cautious", "--json")
    assert other.returncode == 0
    first = json.loads(other.stdout.splitlines()[0])
    assert first["recorded"] != first["replayed"]


def test_a_hold_leaves_only_the_brake(container, guard, policy, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--total-mb", "112")
    governor = guard(pod, "--policy", policy()).ready()
    held = governor_command("hold", "10m")
    assert held.returncode == 0, held.stderr
    governor.await_line("veto")
    agent.go()
    governor.await_line("nothing_left", 60)
    assert agent.stdout.readline() == "burst over\n"
    assert not governor.lines("terminating", "deliver", "killed")
    assert governor.lines("archived")
    assert governor_command("hold", "0").returncode == 0
    governor.await_line("deliver")
    assert governor_command("hold", "soon").returncode == 2
    agent.kill()
    governor.stop()
    assert governor_command("hold", "10m").returncode == 1


def test_sighup_reads_the_policy_again_and_a_bad_one_changes_nothing(container, guard, policy, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--total-mb", "80")
    path = policy('[signals]\ninterval = "500ms"\nraised_interval = "500ms"\n')
    governor = guard(pod, "--policy", path).ready()
    path.write_text('[compact]\nengage = 7\nexec = "no list"\n')
    governor.process.send_signal(signal.SIGHUP)
    refused = governor.await_line("policy_refused")
    assert "compact.engage = 7" in refused["text"] and "compact.exec" in refused["text"]
    policy("[signals]\nstalled_compact = 0.3\n".replace("[signals]", "[archive]\nkeep_count = 3\n[signals]"))
    path.write_text(path.read_text().replace("[compact]", "[compact]\nengage = 0.55\nrelease = 0.5"))
    governor.process.send_signal(signal.SIGHUP)
    assert governor.await_line("policy")["policy"]["compact"]["engage_ratio"] == 0.55
    agent.go()
    wait_for(lambda: delivered(tmp_path) == ["compact"], 60)
    bad = governor_command("guard", "--cgroup", pod.path, "--policy", tmp_path / "session.jsonl")
    assert bad.returncode == 2


def test_a_killed_governor_remembers_what_it_has_tried(container, guard, policy, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "50", "--total-mb", "95")
    path = policy('[terminate]\ngrace = "10s"\n', status=0)
    path.write_text(path.read_text().replace('cooldown = "20s"', 'cooldown = "50s"'))
    governor = guard(pod, "--policy", path).ready()
    agent.go()
    governor.await_line("delivered", 60)
    for _ in range(3):
        os.kill(governor.process.pid, signal.SIGKILL)
        governor.process.wait()
        protected = len(governor.lines("protecting"))
        governor = guard(pod, "--policy", path)
        governor.await_line("protecting", count=protected + 1)
    assert delivered(tmp_path) == ["compact"]
    assert governor.lines("begin")[-1]["state"]["compact"]["delivered_ns"]


def test_without_a_brake_samples_archive_and_terminate(container, guard, policy, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "10", "--total-mb", "112")
    governor = guard(pod, "--policy", policy().with_name("policy.toml")).ready()
    policy().write_text(policy().read_text().replace("[brake]", "[brake]\nenabled = false"))
    governor.process.send_signal(signal.SIGHUP)
    governor.await_line("policy")
    agent.go()
    assert agent.wait(timeout=90) == 143, governor.log()
    kinds = [line["kind"] for line in governor.lines("compact_failed", "braked", "archived", "terminating")]
    assert list(dict.fromkeys(kinds)) == ["compact_failed", "archived", "terminating"]
    assert pod.events()["oom_kill"] == 0


def test_a_dry_run_tells_and_touches_nothing(container, guard, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "20", "--total-mb", "113")
    governor = guard(pod, "--policy", "dry-run").ready()
    agent.go()
    wait_for(lambda: any("would terminate" in line["text"] for line in governor.lines("dry_run")), 60)
    assert agent.stdout.readline() == "burst over\n"
    assert agent.poll() is None
    assert not governor.lines("braked", "archived", "terminating", "killed", "deliver")
    assert not governor.directory.exists()
    assert pod.read("memory.high") == "max"
