"""`governor run` beside its guard, in a memcg of its own, and as process 1."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from desk import RUN, AtTerminal, resident, stat_of

from governor import run_memcg
from tests.waiting import wait_for

PYTHON = sys.executable
ONE = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
AGENT = Path(__file__).parent.parent / "fakes" / "agent.py"


@pytest.fixture
def run(tmp_path):
    """`governor run` with pipes; its words are in .log()."""
    made = []

    def start(*words, prefix=(), **options):
        log = tmp_path / f"log-{len(made)}"
        with log.open("wb") as file:
            process = subprocess.Popen(
                [*prefix, *RUN, *map(str, words)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=os.environ | {"XDG_STATE_HOME": str(tmp_path / "state")},
                **options,
            )
        process.log = log.read_text
        made.append(process)
        return process

    yield start
    for process in made:
        if process.poll() is None:
            process.terminate()
        process.wait(timeout=30)
        process.stdin.close()
        process.stdout.close()


def children_of(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def cmdline(pid):
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended since it was listed
        return b""


def guard_of(pid):
    return next((child for child in children_of(pid) if b"governor.guard_process" in cmdline(child)), None)


def own_memcgs(pid):
    return [path for parent, _ in run_memcg._parents() for path in Path(parent).glob(f"governor-run-{pid}")]


def test_a_memcg_of_its_own_with_its_limit_for_the_agent_only(run, memcg):
    process = run("--memory-max", "64MiB", "--", "sh", "-c", "cat /proc/self/cgroup; read x; sleep 60 & exit 4")
    [path] = wait_for(lambda: own_memcgs(process.pid))
    shown = wait_for(process.stdout.readline)
    while path.name.encode() not in shown:
        shown = process.stdout.readline()
    assert str(process.pid) not in (path / "cgroup.procs").read_text().split()
    limits = [path / name for name in ("memory.max", "memory.limit_in_bytes") if (path / name).exists()]
    assert limits[0].read_text().strip() == str(64 << 20)
    wait_for(lambda: "protecting" in process.log())
    process.stdin.write(b"\n")
    process.stdin.close()
    assert process.wait(timeout=20) == 4
    assert not path.exists()  # and what the agent left in it has ended


def test_a_burst_is_archived_and_ended_and_the_memcg_is_gone(run, memcg, tmp_path):
    session, begin = tmp_path / "session.jsonl", tmp_path / "begin"
    archives = ["--archive", f"{tmp_path}/*.jsonl*", "--archive-dir", tmp_path / "archives"]
    command = [PYTHON, AGENT, session, "touch", "--rate-mb", "40", "--begin", begin]
    process = run("--memory-max", "96MiB", *archives, "--", *command)
    assert process.stdout.readline() == b"ready\n"
    wait_for(lambda: "protecting" in process.log())
    begin.touch()
    assert process.wait(timeout=60) == 143, process.log()
    assert "SIGTERM to the agent" in process.log()
    assert (tmp_path / "session.jsonl.saved").exists()
    assert (
        "after the agent's end" in str(sorted((tmp_path / "archives").rglob("*")))
        or len(re.findall("archived", process.log())) >= 2
    ), process.log()
    assert own_memcgs(process.pid) == []


@pytest.mark.parametrize("is_process_1", [False, True])
def test_inside_its_own_memcg_governor_outlives_the_agent(run, memcg, tmp_path, is_process_1):
    """As in a pod: the limit is the container's, governor is in it, and nothing can be frozen."""
    if os.geteuid() != 0:
        pytest.skip("needs root to enter a memcg")
    pod = run_memcg.make(160 << 20)
    enter = ["sh", "-c", 'echo $$ > "$0"/cgroup.procs && exec "$@"', pod]
    begin = tmp_path / "begin"
    words = ["--source", "poll", "--archive", f"{tmp_path}/*.jsonl*", "--archive-dir", tmp_path / "archives"]
    words += ["--", PYTHON, AGENT, tmp_path / "session.jsonl", "touch", "--rate-mb", "40", "--begin", begin]
    try:
        process = run(*words, prefix=[*enter, *(ONE if is_process_1 else ())])
        assert process.stdout.readline() == b"ready\n"
        wait_for(lambda: "brake: stop; limit: its own limit" in process.log())
        begin.touch()
        assert process.wait(timeout=60) == 143, process.log()
        assert "braked: stopped" in process.log()
        assert (tmp_path / "session.jsonl.saved").exists()
    finally:
        assert run_memcg.remove(pod)


def test_a_guard_that_dies_is_started_again(run, memcg):
    process = run("--memory-max", "64MiB", "--", "cat")
    first = wait_for(lambda: guard_of(process.pid))
    wait_for(lambda: "protecting" in process.log())
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: guard_of(process.pid) not in (None, first))
    wait_for(lambda: process.log().count("protecting") == 2)
    assert process.poll() is None


def test_a_guard_that_is_told_to_leave_is_not_started_again(run, memcg):
    process = run("--memory-max", "64MiB", "--", "cat")
    wait_for(lambda: "protecting" in process.log())
    os.kill(guard_of(process.pid), signal.SIGTERM)
    wait_for(lambda: "is not started again" in process.log())
    assert guard_of(process.pid) is None


def test_another_guard_leaves_it_to_this_one_and_takes_its_place_in_turn(run, memcg, tmp_path):
    """governor guard beside it sees the lock; and where that one was first, this one takes over when it is gone."""
    process = run("--memory-max", "64MiB", "--", "cat")
    wait_for(lambda: "protecting" in process.log())
    [path] = own_memcgs(process.pid)
    beside = [PYTHON, "-m", "governor", "guard", "--cgroup", str(path)]
    done = subprocess.run(beside, capture_output=True, text=True, timeout=30)
    assert (done.returncode, "already guarded" in done.stderr) == (0, True)
    own = guard_of(process.pid)
    os.kill(process.pid, signal.SIGSTOP)  # so that the other one is first
    os.kill(own, signal.SIGKILL)
    environment = os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    with (tmp_path / "other").open("wb") as log:
        other = subprocess.Popen(beside, stderr=log, env=environment)
    try:
        wait_for(lambda: "protecting" in (tmp_path / "other").read_text())
        os.kill(process.pid, signal.SIGCONT)
        time.sleep(1)
        assert guard_of(process.pid) is None
        assert process.log().count("protecting") == 1
    finally:
        other.kill()
        other.wait()
    wait_for(lambda: process.log().count("protecting") == 2, 20)


def test_a_brake_by_sigstop_is_no_ctrl_z(tmp_path):
    """What governor stopped is not given to the shell, and a stray SIGCONT does not wake it up."""
    from governor.brake import STOP, KnobFile

    knobs = KnobFile(str(tmp_path / "knobs"))
    guard = {"knob_path": str(tmp_path / "knobs"), "locks": ["../nowhere/none"]}
    one = AtTerminal("bash", "--norc", "-mic", '"$@"; echo status $?', "x", *resident("cat", guard=guard))
    try:
        run_pid = wait_for(lambda: [c for c in children_of(one.pid) if b"governor.run" in cmdline(c)])[0]
        agent_pid = wait_for(
            lambda: [p for k in children_of(run_pid) for p in children_of(k) if b"cat" in cmdline(p)]
        )[0]
        knobs.adopt(0, "/none", 1)
        knobs.memory[17] = STOP
        knobs.memory[4096:4100] = (1).to_bytes(4, "little")
        knobs.memory[4100:4104] = agent_pid.to_bytes(4, "little")
        os.kill(agent_pid, signal.SIGSTOP)
        wait_for(lambda: stat_of(agent_pid)[0] == "T")
        os.kill(run_pid, signal.SIGCONT)
        time.sleep(0.3)
        assert stat_of(agent_pid)[0] == "T"
        assert stat_of(run_pid)[0] == "S"
        knobs.memory[17] = 0
        os.kill(agent_pid, signal.SIGCONT)
        time.sleep(0.2)
        one.type(b"on\r")
        one.await_output(b"on\r\non")
        one.type(b"\x04")
        one.await_output(b"status 0")
    finally:
        one.close()


def test_sigkill_of_governor_ends_its_guard(run, memcg):
    process = run("--memory-max", "64MiB", "--", "sh", "-c", "echo $$; exec sleep 60")
    agent_pid = int(process.stdout.readline())
    guard_pid = wait_for(lambda: guard_of(process.pid))
    wait_for(lambda: "protecting" in process.log())
    [path] = own_memcgs(process.pid)
    process.kill()
    process.wait()
    wait_for(lambda: stat_of(guard_pid) is None or stat_of(guard_pid)[0] == "Z")
    os.kill(agent_pid, signal.SIGKILL)
    wait_for(lambda: run_memcg.remove(str(path)))


def test_a_guard_that_cannot_stay_is_said_once_and_the_agent_runs_on(run, memcg):
    process = run("--memory-max", "64MiB", "--journal", "/proc/none/journal", "--", "cat")
    wait_for(lambda: "NOT PROTECTED: the guard does not stay" in process.log(), 40)
    process.stdin.write(b"on")
    process.stdin.close()
    assert process.stdout.read() == b"on"
    assert process.wait(timeout=20) == 0
    assert process.log().count("NOT PROTECTED") == 1


def test_where_nothing_can_be_guarded_the_agent_runs_and_that_is_said(run, tmp_path):
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "x"]
    if os.geteuid() != 0:
        pytest.skip("needs root to hide the cgroups")
    process = run("--", "echo", "runs", prefix=hide)
    assert process.stdout.read() == b"runs\n"
    assert process.wait(timeout=20) == 0
    assert process.log().count("NOT PROTECTED") == 1


def test_a_limit_that_cannot_be_made_is_said(run):
    hide = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /sys/fs/cgroup && exec "$@"', "x"]
    if os.geteuid() != 0:
        pytest.skip("needs root to hide the cgroups")
    process = run("--memory-max", "64MiB", "--", "echo", "runs", prefix=hide)
    assert process.stdout.read() == b"runs\n"
    assert process.wait(timeout=20) == 0
    assert "no memcg for --memory-max" in process.log()


OFF = """
import os, sys, time
from governor.subtree import read_stat
from governor.switch_off import switch_off
log, begin, agent_pid = sys.argv[1], sys.argv[2], int(sys.argv[3])
open(begin, "w").close()
while "braked" not in open(log).read():
    time.sleep(0.001)
before, done = read_stat(agent_pid).state, switch_off()
after = read_stat(agent_pid)
print(before, after.state if after else "-", *sorted(os.listdir("/run/governor")), *done, sep="|")
"""


def test_off_lets_a_braked_agent_go_on_and_leaves_nothing(run, memcg, tmp_path):
    """In a mount namespace, where /run is its own: no other governor of this machine is ended."""
    if os.geteuid() != 0:
        pytest.skip("needs root for a mount namespace")
    session, begin = tmp_path / "session.jsonl", tmp_path / "begin"
    command = [PYTHON, AGENT, session, "touch", "--rate-mb", "25", "--begin", begin]
    prefix = ["unshare", "--mount", "sh", "-c", 'mount -t tmpfs none /run && exec "$@"', "x"]
    process = run("--memory-max", "96MiB", "--archive", f"{tmp_path}/*.jsonl*", "--", *command, prefix=prefix)
    assert process.stdout.readline() == b"ready\n"
    wait_for(lambda: "protecting" in process.log())
    guard_pid = guard_of(process.pid)
    [agent_pid] = [pid for pid in children_of(process.pid) if pid != guard_pid]
    inside = ["nsenter", "--mount", "--target", str(process.pid), PYTHON, "-c", OFF]
    off = subprocess.run(
        [*inside, tmp_path / "log-0", begin, str(agent_pid)], capture_output=True, text=True, timeout=60
    )
    before, after, *left = off.stdout.rstrip("\n").split("|")
    assert before in "TRSD" and after in "RSD-", off.stderr  # held, unless the machine was slow
    assert left[0] == f"run-{process.pid}.sock" and f"stopped process {guard_pid}" in left[1:]
    assert process.wait(timeout=60) != 0  # it bursts on, as without governor
    assert "is not started again" in process.log()
    assert own_memcgs(process.pid) == []


# Process 1


@pytest.fixture
def as_process_1(run):
    if os.geteuid() != 0 or subprocess.run([*ONE, "true"], check=False).returncode:
        pytest.skip("needs root for a PID namespace")
    return lambda *words: run(*words, prefix=ONE)


def test_process_1_reaps_every_orphan(as_process_1):
    script = "for i in 1 2 3 4 5; do (sleep 0.1 &) ; done; sleep 0.6; ps -eo stat= | grep -c Z; exit 7"
    process = as_process_1("--", "sh", "-c", script)
    assert process.stdout.read() == b"0\n"
    assert process.wait(timeout=20) == 7


@pytest.mark.parametrize(
    ("script", "status"),
    [
        ("trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done", 5),
        ("echo ready; exec sleep 60", 143),
        ("trap '' TERM; setsid sleep 300 & echo ready; while :; do sleep 0.05; done", 137),
    ],
)
def test_process_1_ends_on_sigterm_with_all_that_is_left(as_process_1, script, status):
    process = as_process_1("--grace", "300ms", "--", "sh", "-c", script)
    assert process.stdout.readline() == b"ready\n"
    [run_pid] = children_of(process.pid)
    os.kill(run_pid, signal.SIGTERM)
    assert process.wait(timeout=20) == status


def test_what_process_1s_agent_leaves_running_gets_sigterm_and_its_last_words_are_heard(as_process_1, tmp_path):
    left = f"trap 'echo bye; echo > {tmp_path}/told; exit' TERM; while :; do sleep 0.05; done"
    process = as_process_1("--", "sh", "-c", f'setsid sh -c "{left}" & sleep 0.3; exit 2')
    assert process.wait(timeout=20) == 2
    assert (tmp_path / "told").exists()
    assert process.stdout.read() == b"bye\n"


@pytest.mark.parametrize("number", ["SIGHUP", "SIGUSR1", "SIGINT", "SIGQUIT"])
def test_process_1_forwards_what_the_kernel_would_ignore_for_it(as_process_1, number):
    process = as_process_1("--", "sh", "-c", "echo ready; exec sleep 60")
    assert process.stdout.readline() == b"ready\n"
    [run_pid] = children_of(process.pid)
    os.kill(run_pid, getattr(signal, number))
    assert process.wait(timeout=20) == 128 + getattr(signal, number)
