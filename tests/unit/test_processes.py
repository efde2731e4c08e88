"""Children, locks, the journal, the packed wheel: what runs on any machine."""

import json
import os
import select
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from governor import children, instance, journal, pins
from governor.actions import processes
from governor.subtree import is_wrapper, read_stat

ROOT = Path(__file__).parent.parent.parent
SECOND = 1_000_000_000


def finish(child, seconds=10):
    """Drain until the child ends, as the loop does."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ready, _, _ = select.select([child.pidfd, child.pipe_fd], [], [], 1)
        if child.pipe_fd in ready and child.pidfd not in ready:
            child.drain()
        if child.pidfd in ready:
            return child.end()
    child.end()
    raise AssertionError("the child did not end")


def test_a_fork_returns_what_its_work_returns():
    child = children.fork(lambda: b"done", 0, "test")
    assert finish(child) == 0
    assert child.output == b"done"


def test_a_fork_that_fails_says_why():
    def work():
        raise ValueError("no such luck")

    child = children.fork(work, 0, "test")
    assert finish(child) == 1
    assert child.output == b"no such luck"


def test_a_command_gets_its_environment_and_no_input():
    child = children.spawn(("sh", "-c", 'echo "$WORD"; cat; exit 7'), {"WORD": "heard"}, 0, "test")
    assert finish(child) == 7
    assert child.output == b"heard\n"


def test_a_command_that_does_not_exist_is_said():
    child = children.spawn(("/no/such/command",), {}, 0, "test")
    assert finish(child) == 1
    assert b"No such file" in child.output


def test_a_flood_of_output_neither_blocks_nor_grows():
    child = children.spawn(("sh", "-c", "yes | head -c 3000000; echo end >&2"), {}, 0, "test")
    assert finish(child) == 0
    assert len(child.output) == 64 << 10


def test_end_kills_what_hangs_and_what_it_started():
    child = children.spawn(("sh", "-c", "sleep 600 & echo $!; wait"), {}, 0, "test")
    assert select.select([child.pipe_fd], [], [], 10)[0]
    child.drain()
    grandchild = int(child.output)
    assert child.end() == -signal.SIGKILL
    until = time.monotonic() + 10
    while Path(f"/proc/{grandchild}/stat").exists() and time.monotonic() < until:
        if processes.read_process(grandchild) is None or b") Z " in Path(f"/proc/{grandchild}/stat").read_bytes():
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{grandchild}").exists()


def test_children_leak_no_descriptors():
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        finish(children.fork(lambda: b"", 0, "test"))
    assert len(os.listdir("/proc/self/fd")) == before


def test_who_runs_a_script_of_a_shell_only_wraps(tmp_path):
    script = tmp_path / "entrypoint.sh"
    script.write_text("#!/bin/sh\ncat\nexit 0\n")
    script.chmod(0o755)
    for argv, wraps in ((["sh", "-c", "cat; exit"], True), ([str(script)], True), (["cat"], False)):
        with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
            stat = read_stat(process.pid)
            assert is_wrapper(process.pid, stat.comm) == wraps, (argv, stat.comm)
            process.communicate()


def test_one_holder_of_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path)
    fd = instance.lock("memcg-1")
    with pytest.raises(instance.Busy) as busy:
        instance.lock("memcg-1")
    assert busy.value.pid == os.getpid()
    assert instance.holders() == [os.getpid()]
    os.close(fd)
    assert instance.holders() == []
    os.close(instance.lock("memcg-1"))


def test_a_process_with_an_odd_name_is_read():
    sleeper = subprocess.Popen(
        [sys.executable, "-c", "import ctypes, time; ctypes.CDLL(None).prctl(15, b') R 1 ('); print(1, flush=True)"
         "\ntime.sleep(60)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        sleeper.stdout.readline()
        found = processes.read_process(sleeper.pid)
        assert (found.parent_pid, found.comm) == (os.getpid(), ") R 1 (")
        assert found.rss_bytes > 1 << 20
        assert processes.send(sleeper.pid, signal.SIGKILL)
    finally:
        sleeper.wait()
        sleeper.stdout.close()
    assert processes.read_process(sleeper.pid) is None
    assert not processes.send(sleeper.pid, signal.SIGTERM)


def test_what_steers_a_terminal_is_escaped():
    assert journal.printable("a\x1b[2Jb\r\n\x9b\u202e") == "a\\x1b[2Jb\\r\\n\\x9b\\u202e"
    assert journal.printable("grün 漢字") == "grün 漢字"


def test_a_journal_line_is_an_object_with_time_and_target(tmp_path):
    written = journal.Journal(tmp_path / "deep" / "journal", "/target")
    written.write("braked", state=processes.Process(1, 0, 2, "x\nkind", 3))
    (line,) = (tmp_path / "deep" / "journal").read_text().splitlines()
    assert {"time", "monotonic_ns"} <= json.loads(line).keys()
    assert json.loads(line)["state"]["comm"] == "x\nkind"


def test_a_journal_that_cannot_be_written_is_said_once(capfd):
    full = journal.Journal(Path("/dev/full"), "/target")
    full.write("one")
    full.write("two")
    assert capfd.readouterr().err.count("cannot be written") == 1


@pytest.mark.parametrize("name", ["", "a/b", "..", "a.b", "-x", "x" * 65, "a b"])
def test_an_instance_that_bpffs_would_refuse_is_refused(name):
    with pytest.raises(ValueError, match="found instance name"):
        pins.check_instance(name)


def test_the_wheel_holds_the_sources_and_the_command(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    for source in pins.sources().glob("*.[ch]"):
        assert f"governor/bpf/{source.name}" in names
    assert {"governor/report.html.jinja", "governor/report.css"} <= set(names)
    entry = next(name for name in names if name.endswith("entry_points.txt"))
    assert b"governor = governor.cli:main" in zipfile.ZipFile(wheel).read(entry)
    metadata = next(name for name in names if name.endswith("METADATA"))
    assert b"Requires-Dist: bcc" not in zipfile.ZipFile(wheel).read(metadata)


def test_a_line_that_nobody_reads_is_dropped():
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    try:
        while True:
            os.write(write_fd, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write_fd, True)
    code = "from governor.journal import say; say('lost'); print('on it goes')"
    said = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=write_fd, timeout=20, cwd=ROOT)
    assert said.stdout == b"on it goes\n"
    os.close(read_fd)
    os.close(write_fd)


def test_the_leader_below_a_governor_run_is_the_agent_and_not_its_guard(tmp_path):
    code = """if True:
        import os, sys, time
        def call(name):
            open("/proc/self/comm", "w").write(name)
            os.write(1, b"%d\\n" % os.getpid())
        call("governor-run")
        ready, is_ready = os.pipe()
        if not os.fork():
            call("governor-guard")
            os.write(is_ready, b"!")
            time.sleep(600)
        os.read(ready, 1)
        time.sleep(0.1)
        if not os.fork():
            call("agent")
        time.sleep(600)
    """
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    run, guard, agent = (int(process.stdout.readline()) for _ in range(3))
    try:
        (tmp_path / "cgroup.procs").write_text(f"{run}\n{guard}\n{agent}\n")
        assert processes.leader(str(tmp_path)).pid == agent
    finally:
        for pid in (agent, guard):
            os.kill(pid, signal.SIGKILL)
        process.kill()
        process.wait()
        process.stdout.close()
