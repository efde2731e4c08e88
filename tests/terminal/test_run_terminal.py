"""`governor run` at a terminal: bytes, sizes, modes, and job control under a real shell."""

import json
import os
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from desk import RUN, AtTerminal, Shell, ask, resident, stat_of

from tests.waiting import wait_for

PYTHON = sys.executable


@pytest.fixture
def desk():
    made = []

    def sit_down(*command, **options):
        made.append(AtTerminal(*command, **options))
        return made[-1]

    yield sit_down
    for one in made:
        one.close()


@pytest.fixture
def shell(tmp_path):
    if not shutil.which("tmux"):
        pytest.skip("needs tmux")
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "HOME") if name in os.environ}
    made = Shell(tmp_path, kept | {"XDG_STATE_HOME": str(tmp_path), "LC_ALL": "C.UTF-8"})
    yield made
    made.close()


def agent_pid(run_pid):
    """The agent of a `governor run` without a guard: its child, or its keeper's."""
    pid = run_pid
    while True:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        if not children:
            return pid if pid != run_pid else None
        pid = int(children[0])


def test_the_whole_command_line_at_a_terminal(desk, tmp_path):
    """With a guard, whose words go to a file and not to the agent's terminal."""
    script = "tty; stty size; read line; echo got $line; exit 5"
    one = desk(*RUN, "--", "sh", "-c", script, rows=33, columns=99, environment={"XDG_STATE_HOME": str(tmp_path)})
    one.await_output(b"33 99")
    logs = tmp_path / "governor"
    wait_for(lambda: any("protecting" in log.read_text() for log in logs.glob("run-*.log")) or unguarded(one))
    one.type(b"hello\r")
    assert one.wait() == 5
    assert b"got hello\r\n" in one.output
    assert unguarded(one) or b"governor" not in one.output


def unguarded(one):
    """Whether this machine has no memcg that could be guarded."""
    return b"NOT PROTECTED" in one.output


RAW_ECHO = """
import os, sys, tty
tty.setraw(0)
os.write(1, b"ready")
left = int(sys.argv[1])
while left:
    data = os.read(0, min(left, 65536))
    left -= len(data)
    while data: data = data[os.write(1, data):]
"""


def test_every_byte_passes_both_ways_and_no_key_is_stolen(desk):
    data = bytes(range(256)) * 512
    one = desk(*resident(PYTHON, "-c", RAW_ECHO, str(len(data))))
    one.await_output(b"ready")
    left = data
    while left:
        one.type(left[:2048])
        left = left[2048:]
        while one.read(0):
            pass
    assert one.wait() == 0
    assert one.output == b"ready" + data


def test_a_new_size_reaches_the_agent(desk):
    script = "trap 'stty size' WINCH; echo ready; while :; do sleep 0.05; done"
    one = desk(*resident("sh", "-c", script))
    one.await_output(b"ready")
    one.resize(50, 120)
    one.await_output(b"50 120")


def test_the_agents_terminal_is_its_own_and_like_ours(desk):
    script = "test -t 0 && test -t 1 && test -t 2 && tty > /dev/tty; stty -a; ps -o pid=,sid=,tpgid= -p $$; exit 0"
    one = desk("sh", "-c", 'stty -echo erase ^H; tty; stty -a; exec "$@"', "x", *resident("sh", "-c", script))
    assert one.wait() == 0
    outer, inner = (text.split("\r\n", 1) for text in one.output.decode().split("/dev/pts/")[1:])
    assert outer[0] != inner[0]
    assert inner[1].startswith(outer[1].rstrip())
    pid, session, foreground = inner[1].split()[-3:]
    assert pid == session == foreground


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["sh", "-c", "stty raw; exit 3"], 3),
        (["sh", "-c", "kill -KILL $$"], 137),
        (["no-such-command"], 127),
        (["sh", "-c", "read _ _ _ run _ < /proc/$PPID/stat; kill -TERM $run; sleep 30"], 143),
    ],
)
def test_the_terminals_modes_are_as_they_were(desk, command, status):
    one = desk("sh", "-c", 'stty -a; "$@"; echo status $?; stty -a', "x", *resident(*command))
    before = wait_for(lambda: one.read() and termios.tcgetattr(one.fd))
    assert one.wait() == 0
    assert f"status {status}".encode() in one.output
    assert termios.tcgetattr(one.fd) == before
    first, last = (text.partition("speed")[2] for text in one.output.decode().split(f"status {status}"))
    assert last.strip().startswith("38400")
    assert first.strip().startswith(last.strip())


def test_output_to_a_file_is_not_turned_into_a_terminals(desk, tmp_path):
    one = desk(
        "sh", "-c", f'"$@" > {tmp_path}/out', "x", *resident("sh", "-c", "test -t 0 && ! test -t 1 && echo hi")
    )
    assert one.wait() == 0
    assert (tmp_path / "out").read_bytes() == b"hi\n"


def test_all_output_arrives_at_a_slow_terminal(desk):
    script = "import sys; sys.stdout.write(''.join(f'{i:07}\\n' for i in range(100_000)))"
    one = desk(*resident(PYTHON, "-c", script))
    until = time.monotonic() + 1.5
    while time.monotonic() < until:  # slow, but never a second without taking any
        one.read()
        time.sleep(0.02)
    assert one.wait(60) == 0
    assert one.output == b"".join(b"%07d\r\n" % i for i in range(100_000))


FLOOD = """
import os, signal, sys
signal.signal(signal.SIGTERM, lambda *_: os._exit(4))
signal.signal(signal.SIGWINCH, lambda *_: drawn.append(1))
drawn = []
for i in range(40_000): os.write(1, b"%07d" % i * 16 + b"\\n")
open(sys.argv[1], "w").close()
while not drawn: signal.pause()
os.write(1, b"drawn anew")
signal.pause()
"""


def test_an_agent_whose_terminal_nobody_reads_goes_on_and_draws_anew_later(desk, tmp_path):
    done, path = tmp_path / "done", tmp_path / "socket"
    one = desk(*resident(PYTHON, "-c", FLOOD, str(done), socket_path=str(path)))
    wait_for(done.exists, what="the end of 4.5 MB that nobody reads")
    [answer] = ask(path, {"ask": "terminal"})
    assert answer["pid"] == agent_pid(one.pid)
    one.await_output(b"drawn anew")
    os.kill(one.pid, signal.SIGTERM)
    assert one.wait() == 4


def test_an_agent_whose_terminal_nobody_reads_hears_sigterm(desk, tmp_path):
    one = desk(*resident(PYTHON, "-c", FLOOD, str(tmp_path / "done")))
    wait_for((tmp_path / "done").exists)
    os.kill(one.pid, signal.SIGTERM)
    status = wait_for(lambda: os.waitpid(one.pid, os.WNOHANG)[1])
    one.status = os.waitstatus_to_exitcode(status)
    assert one.status == 4


def test_a_terminal_that_is_hung_up_ends_what_runs_at_it(desk, tmp_path):
    script = "import signal, sys; signal.signal(signal.SIGHUP, lambda *_: (open(sys.argv[1], 'w'), sys.exit(6)))\n"
    script += "print('ready', flush=True)\nwhile True: signal.pause()"
    one = desk(*resident(PYTHON, "-c", script, str(tmp_path / "told")))
    one.await_output(b"ready")
    os.close(one.fd)
    one.fd = os.open("/dev/null", os.O_RDONLY)
    _, status = os.waitpid(one.pid, 0)
    one.status = os.waitstatus_to_exitcode(status)
    assert one.status == 6
    assert (tmp_path / "told").exists()


@pytest.mark.parametrize("number", ["SIGSTOP", "SIGTSTP"])
def test_without_a_shell_above_an_agent_that_stops_goes_on_at_once(desk, number):
    script = f"import os, signal; os.kill(os.getpid(), signal.{number}); print('went on')"
    one = desk(*resident(PYTHON, "-c", script))
    assert one.wait() == 0
    assert b"went on" in one.output


# Under a shell

SUSPENDED = """
import os, signal, sys, termios, tty
saved = termios.tcgetattr(0)
print("type", flush=True)
tty.setraw(0)
while (key := os.read(0, 1)) != b"q":
    if key == b"\\x1a":
        termios.tcsetattr(0, termios.TCSADRAIN, saved)
        os.kill(0 if sys.argv[1] == "SIGTSTP" else os.getpid(), signal.Signals[sys.argv[1]])
        tty.setraw(0)
        os.write(1, b"back\\r\\n")
    else:
        os.write(1, b"key " + key + b"\\r\\n")
termios.tcsetattr(0, termios.TCSADRAIN, saved)
sys.exit(8)
"""


@pytest.mark.parametrize("number", ["SIGTSTP", "SIGSTOP"])
def test_a_program_suspends_itself_and_its_user_has_the_shell_meanwhile(shell, tmp_path, number):
    (tmp_path / "program.py").write_text(SUSPENDED)
    words = resident(PYTHON, str(tmp_path / "program.py"), number)
    (tmp_path / "run").write_text("exec " + " ".join(map(quoted, words)))
    shell.line(f"sh {tmp_path}/run")
    shell.await_line("type")
    shell.await_raw()
    shell.keys("x")
    shell.await_line("key x")
    for _ in range(2):
        shell.keys("C-z")
        wait_for(lambda: "Stopped" in shell.screen())
        shell.line("clear; stty -a | grep -o ' icanon'; jobs | grep -c Stopped")
        shell.await_line(" icanon")
        shell.await_line("1")
        shell.line("clear; fg")
        shell.await_line("back")
        shell.keys("y")
        shell.await_line("key y")
    shell.keys("q")
    shell.await_prompt()
    shell.line("echo status $?")
    shell.await_line("status 8")


def quoted(word):
    return "'" + word.replace("'", "'\\''") + "'"


@pytest.fixture
def job(shell, tmp_path):
    """Have a command run by governor, without a guard, in the shell."""

    def start(*command, suffix="", **options):
        script = tmp_path / "job"
        script.write_text("exec " + " ".join(map(quoted, resident(*command, **options))))
        shell.line(f"sh {script} {suffix}")

    return start


def test_ctrl_z_of_a_cooked_terminal_then_background_then_foreground(shell, job, tmp_path):
    job("sh", "-c", f"echo on; while sleep 0.05; do echo > {tmp_path}/alive; done")
    wait_for((tmp_path / "alive").exists)
    shell.await_raw()
    shell.keys("C-z")
    wait_for(lambda: "Stopped" in shell.screen())
    time.sleep(0.2)
    (tmp_path / "alive").unlink()
    time.sleep(0.3)
    assert not (tmp_path / "alive").exists()
    shell.line("bg")
    wait_for((tmp_path / "alive").exists)
    shell.line("echo the shell has it")
    shell.await_line("the shell has it")
    shell.line("fg")
    shell.await_raw()
    shell.keys("C-c")
    shell.await_prompt()
    shell.line("echo status $?")
    shell.await_line("status 130")


def test_a_stopped_job_is_ended_by_the_shell(shell, job):
    job("cat")
    shell.await_raw()
    shell.line("one")
    shell.await_line("one")
    shell.keys("C-z")
    wait_for(lambda: "Stopped" in shell.screen())
    shell.line("clear; kill %1")
    time.sleep(0.5)
    shell.line("clear; jobs; echo status $?")
    shell.await_line("status 0")
    assert "Exit 143" in shell.screen()


def test_a_job_in_the_background_waits_for_its_terminal(shell, job):
    job("sh", "-c", "read line; echo got $line", suffix="&")
    time.sleep(0.4)
    shell.line("echo mine")
    shell.await_line("mine")
    shell.line("clear; fg")
    shell.await_raw()
    shell.line("yours")
    shell.await_line("got yours")


def test_a_pipeline_stops_as_one(shell, job):
    job("cat", suffix="| cat")
    shell.await_raw()
    shell.line("through")
    wait_for(lambda: shell.screen().count("through") >= 2)
    shell.keys("C-z")
    wait_for(lambda: "Stopped" in shell.screen())
    shell.line("clear; fg")
    shell.await_raw()
    shell.line("again")
    wait_for(lambda: shell.screen().count("again") >= 2)
    shell.keys("C-d")
    shell.await_prompt()
    shell.line("echo status $?")
    shell.await_line("status 0")


def test_the_agent_leads_a_process_group_that_is_not_orphaned(shell, job, tmp_path):
    """And its keeper, which leads the session, ends with it."""
    job("sh", "-c", f"echo $$ > {tmp_path}/pid; exec cat")
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    _, keeper_pid, group, session = stat_of(pid)
    assert group == pid
    assert stat_of(keeper_pid)[2:] == (session, session)
    assert session == keeper_pid
    shell.await_raw()
    shell.keys("C-d")
    shell.await_prompt()
    shell.line("echo status $?")
    shell.await_line("status 0")
    assert stat_of(keeper_pid) is None


def test_sigkill_of_the_keeper_loses_neither_the_agent_nor_its_status(shell, job, tmp_path):
    job(
        "sh",
        "-c",
        f"trap '' HUP; echo $$ > {tmp_path}/pid; while [ ! -e {tmp_path}/go ]; do sleep 0.05; done; exit 9",
    )
    pid = int(wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()))
    keeper_pid = stat_of(pid)[1]
    run_pid = stat_of(keeper_pid)[1]
    os.kill(keeper_pid, signal.SIGKILL)
    wait_for(lambda: stat_of(pid)[1] != keeper_pid)
    assert stat_of(pid)[1] == run_pid
    (tmp_path / "go").touch()
    wait_for(lambda: stat_of(run_pid) is None)
    shell.await_prompt()
    shell.line("echo status $?")
    shell.await_line("status 9")


def test_the_resident_process_is_small(desk):
    one = desk(*resident("cat"))
    wait_for(lambda: agent_pid(one.pid))
    status = dict(line.split(":", 1) for line in Path(f"/proc/{one.pid}/status").read_text().splitlines())
    modules = subprocess.run(
        [
            PYTHON,
            "-I",
            "-S",
            "-c",
            f"import sys; sys.path.insert(0, {os.getcwd()!r}); import governor.run, json\n"
            "print(json.dumps(sorted(sys.modules)))",
        ],
        capture_output=True,
        check=True,
    ).stdout
    assert not {"typer", "orjson", "pathlib", "dataclasses", "ctypes", "subprocess"} & set(json.loads(modules))
    assert int(status["VmRSS"].split()[0]) < 16 << 10
