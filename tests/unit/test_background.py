"""A guard in the background: when who started it may go, and with which status."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

START = "import os, sys, time\nfrom pathlib import Path\nfrom governor import background\nfd = background.detach()\n"
GOES_ON = START + (
    "background.leave_streams(Path(sys.argv[1]))\nprint('protects', os.getsid(0) == os.getpid(), flush=True)\n"
    "fd = background.ready(fd)\nos.chdir(sys.argv[2])\nwhile not Path('end').exists(): time.sleep(0.01)\n"
    "background.ready(fd)\nPath('ended').touch()"
)


def start(code, *arguments):
    """Returns once the command has ended and nobody holds its streams, as a kubelet's exec does."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, stdin=subprocess.DEVNULL)


def test_who_started_it_ends_when_it_is_ready_and_it_goes_on(tmp_path):
    log = tmp_path / "state" / "log"
    for turn in range(2):
        assert start(GOES_ON, log, tmp_path).returncode == 0
        assert log.read_text() == "protects True\n"
        assert not Path(tmp_path, "ended").exists()
        Path(tmp_path, "end").touch()
        until = time.monotonic() + 20
        while not Path(tmp_path, "ended").exists():
            assert time.monotonic() < until, turn
            time.sleep(0.01)
        for name in ("end", "ended"):
            Path(tmp_path, name).unlink()
    assert log.with_name("log.1").exists()


SAYS = START + (
    "background.leave_streams(Path(sys.argv[1]))\n"
    "os.execv(sys.executable, [sys.executable, '-c', sys.argv[2], str(fd)])"  # the guard is another program
)
MUCH = """
import os, subprocess, sys
from governor import background
from governor.journal import say
child = subprocess.Popen(["cat"], stdin=subprocess.PIPE)  # has the log as well
for number in range(40_000):
    say(f"{number} " + 94 * "x")
child.communicate(b"the child\\n")
background.ready(int(sys.argv[1]))
"""


def test_its_log_holds_a_mebibyte_and_what_was_before(tmp_path):
    log, other = tmp_path / "log", tmp_path / "other"
    assert start(SAYS, log, MUCH).returncode == 0
    lines = (log.with_name("log.1").read_text() + log.read_text()).splitlines()
    sizes = [log.stat().st_size, log.with_name("log.1").stat().st_size]
    assert sizes[0] <= 1 << 20 < sizes[1] < (1 << 20) + 200
    assert lines[-1] == "the child"
    numbers = [int(line.split()[1]) for line in lines[:-1]]
    assert numbers == list(range(numbers[0], 40_000))
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1"]
    moved = f"import os; os.rename({str(log)!r}, {str(other)!r}); open({str(log)!r}, 'w').close()\n"
    assert start(SAYS, log, moved + MUCH).returncode == 0
    assert other.stat().st_size > 4 << 20  # who moves it looks after it
    assert log.stat().st_size == 0


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        ("sys.exit(0)", 0, ""),  # somebody else guards it
        ("print('found ...', file=sys.stderr); sys.exit(2)", 2, "found ...\n"),
        ("sys.exit(1)", 1, "governor: NOT PROTECTED: the guard has ended with status 1\n"),
        ("os.kill(os.getpid(), 9)", 137, "governor: NOT PROTECTED: the guard has ended with status -9\n"),
    ],
)
def test_who_started_it_ends_as_it_does_where_it_is_never_ready(end, status, said):
    done = start(START + end)
    assert (done.returncode, done.stderr) == (status, said)
