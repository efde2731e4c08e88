"""Actions on a real kernel: commands in a memcg of their own, and trees killed while they are frozen."""

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import AGENT, MIB

from governor import archive, cgroup, children, subtree
from governor.actions import commands, processes, termination_log
from governor.attribution import Attribution
from governor.poller import Poller
from governor.session_files import parse_pattern
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

SECOND = 1_000_000_000


def left():
    return list(Path(cgroup.ROOT).glob("governor-exec-*"))


@pytest.fixture
def run():
    """Run a command as the loop does; what became of it."""
    runner = commands.Commands()

    def to_end(*argv, seconds=30.0):
        poller, ended = Poller(), []
        running = children.Children(poller)
        child, why_not = runner.run(argv, {}, time.monotonic_ns() + int(seconds * SECOND), "test")
        assert why_not == ""
        running.start(child, ended.append)
        while not ended:
            poller.wait(20_000_000)
            running.check_deadlines(time.monotonic_ns())
        return ended[0]

    yield to_end
    assert left() == []


def test_a_command_runs_in_a_memcg_of_its_own(run):
    ended = run(
        "sh",
        "-c",
        "cat /proc/self/cgroup; cd /sys/fs/cgroup$(cut -d: -f3 /proc/self/cgroup); cat memory.max pids.max",
    )
    where, memory_max, pids_max = ended.output.decode().split()
    assert where.startswith(f"0::/governor-exec-{os.getpid()}-")
    assert (int(memory_max), int(pids_max)) == (64 * MIB, 32)
    assert ended.ok and ended.note == ""


def test_a_command_that_takes_too_much_memory_is_ended_and_nobody_else(run):
    ended = run(sys.executable, "-c", "x = bytearray(b'x') * (200 << 20)")
    assert ended.status == -signal.SIGKILL and not ended.over_deadline
    assert ended.note == "it was over its 64 MiB"


def test_a_fork_bomb_ends_at_the_deadline(run):
    bomb = "trap '' TERM; bomb() { bomb | bomb & }; bomb; while :; do :; done"  # a loop that never forks: it stays
    ended = run("sh", "-c", bomb, seconds=4)
    assert ended.over_deadline and b"Cannot fork" in ended.output


def test_what_hangs_ignores_sigterm_and_left_its_group_ends_at_the_deadline(run):
    script = "trap '' TERM INT; setsid sh -c \"trap '' TERM; sleep 777\" & sleep 777"
    assert run("sh", "-c", script, seconds=3).over_deadline
    assert subprocess.run(["pgrep", "-f", "sleep 777"], capture_output=True).stdout == b""


def test_what_a_finished_command_leaves_behind_ends_with_it(run):
    assert run("sh", "-c", "setsid sleep 778 > /dev/null 2>&1 & exit 0").ok
    assert subprocess.run(["pgrep", "-f", "sleep 778"], capture_output=True).stdout == b""


def test_a_flood_ends(run):
    ended = run("yes")
    assert ended.flooded and len(ended.output) == 64 << 10


def test_what_a_killed_governor_left_is_swept():
    code = (
        "import time; from governor.actions.commands import Commands\n"
        "Commands().run(('sleep', '779'), {}, 0, 'test'); print('started', flush=True); time.sleep(600)"
    )
    governing = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert governing.stdout.readline() == b"started\n"
    assert commands.Commands().sweep() == [] and len(left()) == 1
    governing.kill()
    governing.wait()
    governing.stdout.close()
    assert len(commands.Commands().sweep()) == 1
    assert left() == []


def test_the_bursting_tree_dies_frozen_and_the_agent_lives(container):
    pod = container(256)
    tool = "import time; x = bytearray(b'x') * (80 << 20); print('full', flush=True); time.sleep(600)"
    shell = f'echo shell; {sys.executable} -c "{tool}" & wait'
    agent = f"import subprocess, time; subprocess.Popen(['sh', '-c', '''{shell}''']); time.sleep(600)"
    leader = pod.start(sys.executable, "-c", agent, stdout=subprocess.PIPE)
    looked = Attribution(str(pod.path), leader.pid)
    looked.look(0)
    assert leader.stdout.readline() == "shell\n"
    assert leader.stdout.readline() == "full\n"
    pod.write("cgroup.freeze", 1)
    wait_for(lambda: "frozen 1" in pod.read("cgroup.events"))
    grown = looked.growth(2 * SECOND, 0, SECOND)
    assert grown.culprit_comm == "sh" and grown.grown_bytes > 75 * MIB > 20 * MIB > grown.agent_grown_bytes
    hit = processes.kill_tree(
        str(pod.path), grown.culprit_pid, grown.culprit_start_ticks, {leader.pid}, grown.members, leader.pid
    )
    assert len(hit) == 2
    wait_for(lambda: int(pod.read("memory.current")) < 40 * MIB)  # while it is still frozen
    assert "frozen 1" in pod.read("cgroup.events")
    pod.write("cgroup.freeze", 0)
    assert leader.poll() is None


@pytest.mark.parametrize("charged", ["tool", "agent"])
def test_tmpfs_is_put_to_whom_was_charged(container, charged, tmp_path):
    pod = container(256)
    fill = (
        "import sys, time\nf = open('/dev/shm/governor-test', 'wb', 0)\nfor _ in range(60): f.write(b'x' * (1 << 20))"
    )
    wait = "\nprint('full', flush=True); time.sleep(600)"
    agent = "import subprocess, sys, time\ntime.sleep(0.5)\n"
    agent += f"subprocess.run([sys.executable, '-c', {fill + wait!r}])" if charged == "tool" else fill + wait
    try:
        leader = pod.start(sys.executable, "-c", agent, stdout=subprocess.PIPE)
        looked = Attribution(str(pod.path), leader.pid)
        looked.look(0)
        assert leader.stdout.readline() == "full\n"
        pids = subtree.memcg_pids(str(pod.path))
        writer = max(pids) if charged == "tool" else leader.pid
        grown = looked.growth(2 * SECOND, writer, SECOND)
        assert grown.culprit_pid == (writer if charged == "tool" else 0)
        assert (grown.agent_grown_bytes if charged == "agent" else grown.grown_bytes) > 55 * MIB
    finally:
        Path("/dev/shm/governor-test").unlink(missing_ok=True)


def test_an_open_memcg_is_killed_not_the_one_that_has_its_name_now(container):
    pod = container(64)
    memcg = cgroup.Memcg(str(pod.path))
    first = pod.start("sleep", "600")
    processes.kill_memcg(memcg.own_path)
    assert first.wait(timeout=10) == -signal.SIGKILL
    wait_for(lambda: "populated 0" in pod.read("cgroup.events"))
    pod.path.rmdir()
    pod.path.mkdir()
    second = pod.start("sleep", "600")
    processes.kill_memcg(memcg.own_path)
    time.sleep(0.3)
    assert second.poll() is None
    memcg.close()


def test_a_full_disk_and_a_read_only_one_lead_to_the_next(tmp_path):
    (tmp_path / "session.jsonl").write_bytes(os.urandom(1 << 20))
    full, read_only, good = tmp_path / "full", tmp_path / "read-only", tmp_path / "good"
    for directory, options in ((full, "size=256k"), (read_only, "ro")):
        directory.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)
    try:
        patterns = [parse_pattern(f"{tmp_path}/*.jsonl", "/")]
        made = archive.write(full, patterns, "a test", "t", {}, 1 << 30, fallbacks=[read_only, good])
        assert made.facts["fallback"]["refused"] == {
            str(full): "less than 5 % or 4 GiB of the file system would be left free",
            str(read_only): "Read-only file system",
        }
        assert archive.verify(good, made.name) == made and len(made.files) == 1
        assert list(full.iterdir()) == []
    finally:
        for directory in (full, read_only):
            subprocess.run(["umount", directory], check=True)


def test_a_device_under_a_session_files_name_is_never_opened(tmp_path):
    os.mknod(tmp_path / "device.jsonl", 0o600 | stat.S_IFCHR, os.makedev(99, 99))  # ENXIO for whoever opens it
    made = archive.write(tmp_path / "a", [parse_pattern(f"{tmp_path}/*.jsonl", "/")], "a test", "t", {}, 1 << 30)
    assert made.skipped == {str(tmp_path / "device.jsonl"): "not a regular file"}


@pytest.mark.parametrize("who", ["agent", "tool"])
@pytest.mark.parametrize("burst", ["touch", "huge", "read", "tmpfs", "threads"])
def test_a_burst_is_put_to_whose_it_is(container, tmp_path, burst, who):
    pod = container(256)
    begin = tmp_path / "begin"
    command = [sys.executable, AGENT, tmp_path / "s.jsonl", burst, "--begin", begin, "--total-mb", "140"]
    if who == "tool":  # of an agent that grows a little too
        argv = [str(word) for word in command]
        code = f"import subprocess, time; p = subprocess.Popen({argv!r}); x = bytearray(b'x') * (8 << 20); p.wait()"
        command = [sys.executable, "-c", code]
    leader = pod.start(*command, stdout=subprocess.PIPE)
    assert leader.stdout.readline() == "ready\n"
    looked = Attribution(str(pod.path), leader.pid)
    looked.look(time.monotonic_ns(), SECOND)
    (burster,) = {*subtree.memcg_pids(str(pod.path))} - ({leader.pid} if who == "tool" else set())
    begin.touch()
    wait_for(lambda: int(pod.read("memory.current")) > 100 * MIB)
    pod.write("cgroup.freeze", 1)
    wait_for(lambda: "frozen 1" in pod.read("cgroup.events"))
    grown = looked.growth(time.monotonic_ns(), burster, SECOND)
    assert grown.culprit_pid == (burster if who == "tool" else 0), grown
    assert (grown.grown_bytes if who == "tool" else grown.agent_grown_bytes) > 70 * MIB, grown
    assert (grown.agent_grown_bytes if who == "tool" else grown.others_grown_bytes) < 12 * MIB, grown


def test_the_termination_log_of_another_root(tmp_path):
    root = tmp_path / "root"
    (root / "dev").mkdir(parents=True)
    (root / "dev" / "termination-log").write_text("")
    code = "import os, sys, time; os.chroot(sys.argv[1]); os.write(1, b'in\\n'); time.sleep(600)"
    inside = subprocess.Popen([sys.executable, "-c", code, root], stdout=subprocess.PIPE)
    try:
        assert inside.stdout.readline() == b"in\n"
        assert termination_log.write("97 % of max", inside.pid)
        assert (root / "dev" / "termination-log").read_text() == "97 % of max\n"
        assert not termination_log.write("nothing there")
        (root / "dev" / "termination-log").unlink()
        (root / "dev" / "termination-log").symlink_to("/dev/null")
        with pytest.raises(OSError, match="a symbolic link"):
            termination_log.write("97 % of max", inside.pid)
    finally:
        inside.kill()
        inside.wait()
        inside.stdout.close()
