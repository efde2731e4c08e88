"""`governor off`, what it leaves behind, and what each start removes of those who were killed."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from governor import instance, leftovers, pins, switch_off, veto
from governor.brake import KnobFile
from governor.subtree import read_stat
from tests.waiting import wait_for

STUBBORN = (signal.SIGTERM,)


@pytest.fixture
def run_directory(tmp_path, monkeypatch):
    path = tmp_path / "run"
    path.mkdir()
    monkeypatch.setattr(instance, "run_directory", lambda: path)
    monkeypatch.setattr(pins, "INSTANCES", tmp_path / "bpf")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    return path


@pytest.fixture
def holding():
    """A process that holds a lock, as a guard does."""
    started = []

    def hold(name, ignored=()):
        pid = os.fork()
        if pid == 0:
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            instance.lock(name)
            while True:
                signal.pause()
        started.append(pid)
        wait_for(lambda: pid in instance.holders())
        return pid

    yield hold
    for pid in started:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.fixture
def agent():
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def brake(run_directory, memcg, pid):
    """As reflex does it: what it stops is written down in the knob file."""
    for name, text in (("memory.stat", ""), ("memory.current", "1"), ("memory.max", "2")):
        (memcg / name).write_text(text)
    (memcg / "cgroup.procs").write_text(f"{pid}\n")
    file = KnobFile(str(run_directory / "memcg-7.knobs"))
    file.adopt(0, str(memcg), memcg.stat().st_ino)
    knobs = file.knobs(0)
    knobs.set_agent(pid, 1)
    assert knobs.freeze()
    wait_for(lambda: read_stat(pid).state == "T")


def leave_a_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize("ignored", [(), STUBBORN], ids=["it listens", "it does not"])
def test_off_ends_them_lets_go_on_what_they_held_and_leaves_nothing(
    run_directory, holding, agent, tmp_path, monkeypatch, ignored
):
    monkeypatch.setattr(switch_off, "_PATIENCE_S", 0.3)
    (tmp_path / "memcg").mkdir()
    brake(run_directory, tmp_path / "memcg", agent.pid)
    guard_pid = holding("memcg-7", ignored)
    for name in ("memcg-7.sock", f"run-{guard_pid}.sock"):
        leave_a_socket(run_directory / name)
    veto.hold(7, 10**12)
    (run_directory / "memcg-7.told").write_text("a tool was killed\n")
    done = switch_off.switch_off()
    assert f"stopped process {guard_pid}" in done
    assert any("1 processes go on" in line for line in done)
    wait_for(lambda: read_stat(agent.pid).state == "S")
    assert os.listdir(run_directory) == ["memcg-7.told"]
    assert switch_off.switch_off() == []


def test_a_start_removes_what_nobody_uses_and_nothing_else(run_directory, holding, agent, tmp_path):
    (tmp_path / "memcg").mkdir()
    brake(run_directory, tmp_path / "memcg", agent.pid)  # of a governor that was killed: its successor undoes it
    holding("memcg-8")
    (run_directory / "memcg-7.lock").write_text("999999999\n")
    (run_directory / "memcg-9.lock").touch()
    KnobFile(str(run_directory / "memcg-9.knobs")).adopt(0, str(tmp_path / "memcg"), 1)
    for name in ("memcg-8.told", "memcg-9.told"):
        (run_directory / name).touch()
        os.utime(run_directory / name, (0, 0))
    veto.hold(5, 10**15)
    veto.hold(6, 1)
    leave_a_socket(run_directory / "run-999999999.sock")
    (run_directory / "run-999999999.resume.ended").touch()
    (run_directory / f"run-{os.getpid()}.resume").touch()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(run_directory / "memcg-8.sock"))
        server.listen()
        assert sorted(leftovers.sweep()) == ["memcg-9.told"]  # the others may be about to be used
        removed = leftovers.sweep(0)
    used = {"memcg-7.knobs", "memcg-8.lock", "memcg-8.told", "memcg-8.sock", "memcg-5.hold"}
    assert {*os.listdir(run_directory)} == used | {f"run-{os.getpid()}.resume"}
    assert "memcg-7.lock" in removed


def test_a_lock_that_is_removed_while_it_is_taken_is_taken_anew(run_directory):
    """Who looks whether it is held has it for a moment; who starts then must not take that for a guard."""
    (run_directory / "memcg-7.lock").write_text("999999999\n")
    looking = instance.take_unused(run_directory / "memcg-7.lock")
    assert (run_directory / "memcg-7.lock").read_bytes() == b""  # nobody takes that pid for a guard
    script = "from governor import instance; import os, pathlib, sys; "
    script += "instance.run_directory = lambda: pathlib.Path(sys.argv[1]); "
    script += "print(instance.lock('memcg-7'), flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", script, str(run_directory)]
    starting = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    time.sleep(0.1)
    (run_directory / "memcg-7.lock").unlink()
    os.close(looking)
    assert starting.stdout.readline()
    with pytest.raises(instance.Busy) as busy:
        instance.lock("memcg-7")
    assert busy.value.pid == starting.pid
    starting.communicate("")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_off_without_root_is_for_ones_own(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    theirs_fd = os.open(theirs, os.O_RDONLY)  # the directories above it are closed to others
    monkeypatch.setenv("XDG_RUNTIME_DIR", f"/proc/self/fd/{theirs_fd}")
    told = os.pipe()
    pid = os.fork()
    if pid == 0:
        said = "?"
        try:
            os.setgroups([])
            os.setresgid(65534, 65534, 65534)
            os.setresuid(65534, 65534, 65534)
            said = str(switch_off.switch_off())
        except OSError as error:
            said = repr(error)
        finally:
            os.write(told[1], said.encode())
            os._exit(0)
    os.waitpid(pid, 0)
    assert os.read(told[0], 4000) == b"[]"
    assert (theirs / "governor").stat().st_uid == 65534


def test_off_of_one_instance_leaves_the_others_alone(run_directory, holding, agent, tmp_path):
    brake(run_directory, tmp_path, agent.pid)
    ended, other = holding("node"), holding("guard-7")
    assert switch_off.switch_off(["node"]) == [f"stopped process {ended}"]
    assert instance.holders() == [other]
    assert read_stat(agent.pid).state == "T"
    switch_off.switch_off(["memcg-7"])
    wait_for(lambda: read_stat(agent.pid).state == "S")
