"""`governor run` with pipes: what goes in and out, signals, the exit status, and what the agent is given."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from desk import BOOT, RUN, resident, stat_of

from tests.waiting import wait_for

PYTHON = sys.executable


def run(command, data=b"", **options):
    return subprocess.run(command, input=data, capture_output=True, timeout=60, **options)


@pytest.fixture
def started():
    """Start something; what is left of it is killed."""
    made = []

    def start(command, **options):
        options = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
        made.append(subprocess.Popen(command, **options))
        return made[-1]

    yield start
    for process in made:
        if process.poll() is None:
            process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            if stream:
                stream.close()


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("true", 0),
        ("exit 7", 7),
        ("kill -TERM $$", 143),
        ("kill -KILL $$", 137),
        ("kill -SEGV $$", 139),
    ],
)
def test_the_exit_status_is_the_agents(command, status):
    assert run(resident("sh", "-c", command)).returncode == status


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("no-such-command", 127, b"found no command 'no-such-command'"),
        ("/no/such/command", 127, b"found no command '/no/such/command'"),
        ("/etc/passwd", 126, b"'/etc/passwd' cannot be executed: Permission denied"),
        ("/tmp", 126, b"'/tmp' cannot be executed"),
        ("\x1b[2J", 127, b"found no command '\\x1b[2J'"),
    ],
)
def test_a_command_that_cannot_be_started_is_named(name, status, said):
    done = run(resident(name))
    assert done.returncode == status
    assert said in done.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--memory-max", "5x", "--", "true"], "found --memory-max '5x', expected a size"),
        (["--memory-max", "1000", "--", "true"], 'expected at least "1MiB"'),
        (["--grace", "soon", "--", "true"], "found --grace 'soon', expected a duration"),
        (["--profile", "../x", "--", "true"], "found --profile '../x'"),
        (["--policy", "none", "--", "true"], "none"),
        (["--source", "magic", "--", "true"], "found --source 'magic'"),
        (["--archive", "relative", "--", "true"], "relative"),
        (["--compact", "'", "--", "true"], "found --compact"),
        (["--no-such-option", "--", "true"], "No such option"),
        ([], "Missing argument"),
    ],
)
def test_a_wrong_option_is_refused_before_anything_runs(options, said):
    done = run([*RUN, *options])
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.decode()


def test_the_command_line_ends_at_the_command(tmp_path):
    done = run(
        [*RUN, "sh", "-c", 'echo "$@"', "x", "--grace", "--help"], env=os.environ | {"XDG_STATE_HOME": str(tmp_path)}
    )
    assert (done.returncode, done.stdout) == (0, b"--grace --help\n"), done.stderr


# What passes


def test_megabytes_pass_both_ways_unchanged():
    data = os.urandom(8 << 20)
    assert run(resident("cat"), data).stdout == data


def test_from_a_file_to_a_file_and_to_a_socket(tmp_path):
    data = os.urandom(3 << 20)
    (tmp_path / "in").write_bytes(data)
    with (tmp_path / "in").open("rb") as source, (tmp_path / "out").open("wb") as sink:
        assert subprocess.run(resident("cat"), stdin=source, stdout=sink, timeout=60, check=False).returncode == 0
    assert (tmp_path / "out").read_bytes() == data
    ours, theirs = socket.socketpair()
    with (tmp_path / "in").open("rb") as source, ours:
        process = subprocess.Popen(resident("cat"), stdin=source, stdout=theirs)
        theirs.close()
        found = b"".join(iter(lambda: ours.recv(65536), b""))
        assert (process.wait(timeout=20), found) == (0, data)


def test_an_agent_that_does_not_read_and_a_reader_that_does_not_either(started):
    """Both directions are full; signals still pass, and nothing is lost once somebody reads."""
    script = "import sys, time, signal; signal.signal(signal.SIGUSR1, lambda *_: sys.exit(9))\n"
    script += "sys.stdout.buffer.write(bytes(range(256)) * 8192); sys.stdout.flush(); time.sleep(60)"
    process = started(resident(PYTHON, "-c", script))
    os.set_blocking(process.stdin.fileno(), False)
    until = time.monotonic() + 1
    while time.monotonic() < until:
        try:
            os.write(process.stdin.fileno(), bytes(65536))
        except BlockingIOError:
            time.sleep(0.02)
    assert process.stdout.read(256 * 8192) == bytes(range(256)) * 8192
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=20) == 9


def test_the_end_of_the_input_is_passed_on(started):
    process = started(resident("sh", "-c", "cat; echo over"))
    process.stdin.write(b"one\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"one\n"
    process.stdin.close()
    assert process.stdout.read() == b"over\n"


def test_who_writes_to_an_agent_that_closed_its_input_is_told(started):
    process = started(resident("sh", "-c", "exec <&-; echo closed; sleep 60"))
    assert process.stdout.readline() == b"closed\n"

    def is_told():
        try:
            os.write(process.stdin.fileno(), b"x")
        except BrokenPipeError:
            return True
        return False

    wait_for(is_told)
    process.terminate()


def test_who_reads_from_an_agent_that_closed_its_output_is_told(started):
    process = started(resident("sh", "-c", "echo last; exec >&-; sleep 60"))
    assert process.stdout.read() == b"last\n"
    assert process.poll() is None
    process.terminate()


def test_an_agent_that_nobody_reads_any_more_gets_sigpipe(started):
    process = started(resident("sh", "-c", "yes; exit 3"))
    assert process.stdout.readline() == b"y\n"
    process.stdout.close()
    assert process.wait(timeout=20) == 3  # yes was ended by SIGPIPE, which Python ignores and its children must not


def test_what_the_agent_wrote_last_arrives_however_slow_the_reader(started):
    process = started(resident(PYTHON, "-c", "print('x' * 300_000, end='')"))
    time.sleep(0.5)
    assert len(process.stdout.read()) == 300_000
    assert process.wait(timeout=20) == 0


def test_a_background_process_of_the_agent_does_not_keep_governor(started):
    process = started(resident("sh", "-c", "sleep 30 & echo $!"))
    left_pid = int(process.stdout.readline())
    assert process.wait(timeout=10) == 0
    assert stat_of(left_pid)[0] in "RS"  # as without governor: it goes on
    os.kill(left_pid, signal.SIGKILL)


# A background process that tells its pid, waits for a file, and writes once more.
LATE = (
    """exec 2>&-; sh -c 'echo $$; until test -e "$0"; do sleep 0.05; done; echo late; exec sleep 60' "$0" & exit 3"""
)


@pytest.fixture
def left(started, tmp_path):
    """What is left of an agent that ended with status 3, and its own background process's pid."""
    process = started(resident("sh", "-c", LATE, str(tmp_path / "go")))
    assert process.wait(timeout=20) == 3  # it does not wait for the rest of the output
    pid = int(process.stdout.readline())
    yield process, pid
    if stat_of(pid):
        os.kill(pid, signal.SIGKILL)


def passers_on(word):
    """Processes of governor's, found by a word of their command line."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if str(word).encode() in (directory / "cmdline").read_bytes():
                found += [int(directory.name)] * ((directory / "comm").read_text() == "governor-run\n")
        except OSError:
            continue
    return found


def test_what_the_agent_left_in_the_background_is_still_heard(left, tmp_path):
    process, pid = left
    assert process.stderr.read() == b""  # nobody holds that open
    (tmp_path / "go").touch()
    assert process.stdout.readline() == b"late\n"
    assert len(passers_on(tmp_path)) == 1
    os.kill(pid, signal.SIGKILL)
    assert process.stdout.read() == b""
    wait_for(lambda: not passers_on(tmp_path))


def test_it_gets_sigpipe_once_nobody_reads(left, tmp_path):
    process, pid = left
    process.stdout.close()
    wait_for(lambda: not passers_on(tmp_path))
    (tmp_path / "go").touch()
    wait_for(lambda: stat_of(pid) is None or stat_of(pid)[0] == "Z")


# Signals

COUNT = """
import os, signal, sys
def told(number, _): os.write(1, signal.Signals(number).name.encode() + b"\\n")
for name in sys.argv[1:]: signal.signal(signal.Signals[name], told)
os.write(1, b"ready\\n")
while True: signal.pause()
"""


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2", "SIGWINCH"])
def test_a_signal_is_forwarded_once(started, name):
    process = started(resident(PYTHON, "-c", COUNT, name, "SIGALRM", grace_ns=10**8))
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.Signals[name])
    assert process.stdout.readline() == name.encode() + b"\n"
    os.kill(child_of(process.pid), signal.SIGALRM)
    assert process.stdout.readline() == b"SIGALRM\n"
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=20)


def child_of(pid):
    """The only child of a process."""
    [child] = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(child)


def test_sigterm_has_a_grace_and_then_the_whole_tree_is_killed(started):
    stubborn = (
        "trap '' TERM; sleep 60 & sh -c \"trap '' TERM; while :; do sleep 1; done\" & echo $!; wait; wait; wait"
    )
    process = started(resident("sh", "-c", stubborn, grace_ns=400_000_000))
    inner_pid = int(process.stdout.readline())
    began = time.monotonic()
    process.terminate()
    assert process.wait(timeout=20) == 137
    assert time.monotonic() - began >= 0.4
    wait_for(lambda: stat_of(inner_pid) is None or stat_of(inner_pid)[0] == "Z")


def test_ctrl_z_stops_agent_and_governor_and_they_go_on_together(started):
    process = started(resident("cat"), process_group=0)
    agent_pid = wait_for(lambda: agent_of(process.pid))
    wait_for(lambda: stat_of(agent_pid)[0] == "S")
    os.kill(process.pid, signal.SIGTSTP)
    wait_for(lambda: stat_of(agent_pid)[0] == "T" and stat_of(process.pid)[0] == "T")
    os.kill(process.pid, signal.SIGCONT)
    out, _ = process.communicate(b"on", timeout=20)
    assert (process.returncode, out) == (0, b"on")


def agent_of(pid):
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return None
    return int(children[0]) if children else None


# What the agent is given

SHOW = """
import json, os, signal
fds = [int(fd) for fd in os.listdir("/proc/self/fd")]
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
show = {name: status[name] for name in ("SigBlk", "SigIgn")}
show |= {"fds": sorted(fds)[:-1], "environment": dict(os.environ), "leads": os.getsid(0) == os.getpid()}
show |= {"nice": os.nice(0), "oom": open("/proc/self/oom_score_adj").read(), "umask": os.umask(0)}
show |= {"cwd": os.getcwd(), "argv": open("/proc/self/cmdline").read()}
print(json.dumps(show))
"""


@pytest.mark.parametrize("locale", [{"LC_ALL": "C.UTF-8"}, {"LANG": "C"}, {"LC_CTYPE": "C.UTF-8"}, {}])
def test_the_agent_has_its_callers_environment_and_nothing_of_governors(tmp_path, locale):
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    environment = kept | locale | {"XDG_STATE_HOME": str(tmp_path), "ODD": "\udcff"}
    show = [PYTHON, "-S", "-X", "utf8", "-c", SHOW]
    direct = json.loads(run(["env", "PYTHONCOERCECLOCALE=0", *show], env=environment).stdout)
    leak = os.open("/dev/null", os.O_RDONLY)
    os.set_inheritable(leak, True)
    command = [*RUN, "--", "env", "PYTHONCOERCECLOCALE=0", *show]
    done = run(command, env=environment, pass_fds=[leak], umask=0o27)
    os.close(leak)
    through = json.loads(done.stdout)
    assert through["fds"] == [0, 1, 2]
    assert int(through["SigBlk"], 16) == 0
    assert through["environment"] == direct["environment"]
    for same in ("nice", "oom", "cwd", "argv"):
        assert through[same] == direct[same]
    assert through["umask"] == 0o27
    assert through["leads"]


def test_blocked_signals_are_no_longer_blocked_for_the_agent():
    block = "import signal, os, sys; signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 30))\n"
    block += "os.execv(sys.argv[1], sys.argv[1:])"
    status = ["grep", "-E", "SigBlk|SigIgn", "/proc/self/status"]
    out = run([PYTHON, "-c", block, *resident(*status)]).stdout.decode()
    assert [int(line.split()[1], 16) for line in out.splitlines()] == [0, 0]


def test_what_nohup_ignores_stays_ignored(started):
    process = started(["nohup", *resident("sh", "-c", "echo ready; read x; echo $x")])
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGHUP)
    out, _ = process.communicate(b"on\n", timeout=20)
    assert (process.returncode, out) == (0, b"on\n")


def test_a_command_line_of_any_length(tmp_path):
    """JSON would make it longer than an argument may be (128 KiB)."""
    words = ['"' * 120_000, "\u00e9" * 60_000, "\udcff" * 100_000, "x" * 130_000]
    command = [*RUN, "--", PYTHON, "-X", "utf8", "-c", "import os, sys; print(*map(len, sys.argv[1:]))", *words]
    done = run(command, env=os.environ | {"XDG_STATE_HOME": str(tmp_path)})
    assert (done.returncode, done.stdout) == (0, b"120000 60000 100000 130000\n"), done.stderr[-300:]


def test_closed_standard_streams_are_no_trouble():
    done = run(["sh", "-c", 'exec "$@" <&- 2>&-', "x", PYTHON, "-I", "-S", "-c", BOOT, "{}", "echo", "hi"])
    assert done.returncode == 0
