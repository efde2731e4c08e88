"""Seven ways to run out of memory at full speed, in two sizes: killed without governor, saved with it."""

import select

import pytest

from governor import archive
from tests.waiting import wait_for

BURSTS = ("touch", "huge", "read", "tmpfs", "threads", "processes", "populate")
ATTEMPTS, OVERSLEPT_MS = 3, 20  # a record takes one millisecond; what stood still for 20 is the machine
CASES = [(burst, limit_mib) for limit_mib in (64, 256) for burst in BURSTS]


@pytest.mark.parametrize(("burst", "limit_mib"), CASES)
def test_ungoverned_it_is_killed(container, tmp_path, burst, limit_mib):
    pod = container(limit_mib, oom_group=True)
    agent = pod.agent(tmp_path / "session.jsonl", burst)
    agent.go()
    assert agent.wait(timeout=60) == -9
    assert pod.events()["oom_kill"] > 0
    assert not (tmp_path / "session.jsonl.saved").exists()


@pytest.mark.parametrize(
    ("burst", "limit_mib", "oom_group"),
    [*((*case, True) for case in CASES), *((burst, 256, False) for burst in BURSTS)],
)
def test_governed_the_session_is_archived_first(container, guard, tmp_path, burst, limit_mib, oom_group):
    for attempt in range(1, ATTEMPTS + 1):
        directory = tmp_path / str(attempt)
        directory.mkdir()
        governor, pod, agent, session, content = burst_over(container, guard, directory, burst, limit_mib, oom_group)
        if attempt == ATTEMPTS or not pod.events()["oom_kill"] or slowest_record_ms(governor) < OVERSLEPT_MS:
            break
        print(f"killed while the machine stood still for {slowest_record_ms(governor):.0f} ms: once more")

    archived = governor.await_line("archived")
    governor.await_line("agent_ended")
    if burst != "processes":
        first_death = min(line["monotonic_ns"] for line in governor.lines("killed", "terminating", "oom_kill"))
        assert archived["monotonic_ns"] < first_death
    (name, *_) = archive.names(governor.directory)
    manifest = archive.verify(governor.directory, name)
    assert [entry.path for entry in manifest.files] == [str(session)]
    (written,) = archive.restore(governor.directory, name, tmp_path / "restored")
    assert written.read_bytes() == content

    if burst != "populate":
        assert pod.events()["oom_kill"] == 0, governor.log()
        assert agent.returncode in ((143,) if burst == "processes" else (143, -9))
    wait_for(lambda: pod.read("memory.high") == "max" and pod.read("cgroup.freeze") == "0")


def slowest_record_ms(governor):
    took = [line["called_back_ns"] - line["record"]["ktime_ns"] for line in governor.lines("crossing")]
    return max(took, default=0) / 1e6


def burst_over(container, guard, tmp_path, burst, limit_mib, oom_group):
    pod = container(limit_mib, oom_group=oom_group)
    session = tmp_path / "session.jsonl"
    agent = pod.agent(session, burst, "--total-mb", "2048")  # each of eight processes alone is over the limit
    content = session.read_bytes()
    governor = guard(
        pod, within=tmp_path, forked=not oom_group
    ).ready()  # with it: from the shell, as a user starts it
    agent.go()
    if burst == "processes":  # not the agent's own growth: it lives
        assert select.select([agent.stdout], [], [], 90)[0], governor.log()
        growths = [line["of"]["growth"] for line in governor.lines("step") if line["event"] == "Braked"]
        assert agent.stdout.readline() == "burst over\n", growths
        agent.terminate()
    agent.wait(timeout=60)
    return governor, pod, agent, session, content
