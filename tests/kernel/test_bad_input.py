"""Disks that are full, files that cannot be read, commands that go wrong: each is said, and the ladder goes on."""

import subprocess
from contextlib import contextmanager

import pytest
from conftest import Guard

from governor import archive
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

FAILING = """
[compact]
settle = "100ms"
deadline = "2s"
exec = ["sh", "-c", "echo >> {calls}; case $(wc -l < {calls}) in 1) yes;; 2) exec sleep 600;; *) {third}; esac"]
"""


@contextmanager
def mounted(path, options):
    path.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", path], check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", path], check=True)


def fill(directory):
    with (directory / "filler").open("wb", buffering=0) as filler:
        try:
            while filler.write(b"x" * 4096):
                pass
        except OSError:
            return


def ended(agent, governor, pod):
    """The agent was ended by governor, not by the kernel."""
    assert agent.wait(timeout=60) in (143, -9), governor.log()
    governor.await_line("agent_ended")
    assert pod.events()["oom_kill"] == 0
    assert not governor.lines("fault")
    wait_for(lambda: pod.read("cgroup.freeze") == "0" and pod.read("memory.high") == "max")


@pytest.mark.parametrize(("options", "said"), [("size=2m", "less than 5 %"), ("ro", "Read-only file system")])
def test_archive_and_state_on_a_full_or_read_only_disk(container, guard, tmp_path, monkeypatch, options, said):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--picture-mb", "8", "--rate-mb", "40")
    with mounted(tmp_path / "disk", options) as disk:
        monkeypatch.setenv("AGENT_DATA", str(disk))
        if options != "ro":
            (disk / "config").mkdir()
            fill(disk)
            (disk / "filler").write_bytes(b"x" * (1 << 20))  # room for a small archive
        governor = guard(pod, "--archive-dir", disk / "archives").ready()
        agent.go()
        ended(agent, governor, pod)
        assert said in governor.lines("archived")[0]["text"]  # elsewhere, and why
        assert governor.lines("terminating", "killed")
        governor.await_line("archived", count=2)  # what the handler wrote, too
        if options == "ro":
            assert said in governor.lines("state_not_saved")[0]["text"]
            assert len(governor.lines("state_not_saved")) == 1  # said once
        else:
            assert archive.names(disk / "archives") == []
            wait_for(lambda: list((disk / "archives").iterdir()) == [])  # nothing half done takes the room
        assert governor.stop() == 0


def test_the_journal_on_a_full_disk(container, guard, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--rate-mb", "40")
    with mounted(tmp_path / "disk", "size=256k") as disk:
        journal = disk / "journal.ndjson"
        governor = guard(pod, "--journal", journal)
        wait_for(lambda: "protecting" in governor.log())
        fill(disk)
        agent.go()
        assert agent.wait(timeout=60) in (143, -9)
        wait_for(lambda: f"the agent (process {agent.pid}) ended" in governor.log())
        assert "the journal cannot be written: [Errno 28] No space left on device" in governor.log()
        assert governor.log().count("the journal cannot be written") == 1
        assert len(archive.names(governor.directory)) == 1
        assert pod.events()["oom_kill"] == 0
        (disk / "filler").unlink()
        assert governor.stop() == 0
        assert '"kind":"stopping"' in journal.read_text()  # it went on
        replayed = subprocess.run(["governor", "replay", journal], capture_output=True, text=True)
        assert replayed.returncode == 0, replayed.stderr


def test_a_compact_command_that_floods_hangs_and_fails(container, guard, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--start-mb", "88", "--rate-mb", "16")
    policy = tmp_path / "policy.toml"
    policy.write_text(FAILING.format(calls=tmp_path / "calls", third=r"printf 'no \\033[2J'; exit 3"))
    governor = guard(pod, "--policy", policy).ready()
    governor.await_line("compact_failed", 60, count=3)
    flooded, hung, failed = (line["text"] for line in governor.lines("compact_failed")[:3])
    assert "printed too much" in flooded
    assert "over its deadline" in hung
    assert "status 3: no" in failed
    assert "\x1b" not in governor.log()
    assert agent.poll() is None
    agent.go()
    ended(agent, governor, pod)
    assert governor.lines("archived")


def test_a_memcg_removed_in_the_middle_of_a_brake(container, guard, tmp_path):
    pod = container(128)
    agent = pod.agent(tmp_path / "session.jsonl", "touch", "--picture-mb", "64")
    governor = guard(pod).ready()
    agent.go()
    governor.await_line("braked")
    pod.write("cgroup.kill", 1)
    agent.wait(timeout=20)
    wait_for(lambda: "populated 0" in pod.read("cgroup.events"))
    pod.path.rmdir()
    governor.await_line("memcg_gone")
    assert governor.process.wait(timeout=30) == 0
    assert not governor.lines("fault")


def test_memory_files_that_cannot_be_read(container, tmp_path, loaded):
    """What a broken or hostile mount shows instead: nothing is decided on it, and that is said."""
    pod = container(64)
    agent = pod.agent(tmp_path / "session.jsonl", "none")
    garbage = tmp_path / "garbage"
    garbage.write_text("many\n")
    for shown, said in ((garbage, "cannot be read: nothing is decided"), ("/proc/1/mem", "that may be read")):
        subprocess.run(["mount", "--bind", shown, pod.path / "memory.current"], check=True)
        governor = Guard(tmp_path, pod)
        try:
            wait_for(lambda said=said, governor=governor: said in governor.log(), what=said)
            if shown == garbage:
                assert governor.process.poll() is None
                assert len(governor.lines("unreadable")) == 1
                assert governor.stop() == 0
            else:
                assert governor.process.wait(timeout=20) == 2
        finally:
            governor.stop()
            subprocess.run(["umount", pod.path / "memory.current"], check=True)
    assert agent.poll() is None
