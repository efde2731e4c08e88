"""The control socket of `governor run`: for its user and root, and never in the terminal's way."""

import base64
import os
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import pytest
from desk import AtTerminal, ask, resident

from tests.waiting import wait_for


def keys(text):
    return {"ask": "type", "keys": base64.b64encode(text).decode()}


@pytest.fixture
def started(tmp_path):
    """An agent at a terminal ("terminal") or with pipes; its control socket is at tmp_path/socket."""
    made = []

    def start(kind, *command, path=tmp_path / "socket"):
        words = resident(*command, socket_path=str(path))
        if kind == "terminal":
            made.append(AtTerminal(*words, rows=30, columns=90))
        else:
            made.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE))
        wait_for(path.exists)
        return made[-1]

    yield start
    for one in made:
        if isinstance(one, AtTerminal):
            one.close()
        else:
            one.kill()
            one.wait()
            for stream in (one.stdin, one.stdout):
                stream.close()


def output(path):
    [answer] = ask(path, {"ask": "terminal"})
    return base64.b64decode(answer["output"])


def test_a_terminal_that_does_not_say_its_size_is_none_of_pipes(tmp_path):
    agent = AtTerminal(*resident("cat", socket_path=str(tmp_path / "socket")), rows=0, columns=0)
    wait_for((tmp_path / "socket").exists)
    [shown] = ask(tmp_path / "socket", {"ask": "terminal"})
    agent.close()
    assert (shown["rows"], shown["columns"]) == (24, 80)


@pytest.mark.parametrize("kind", ["terminal", "pipes"])
def test_what_is_typed_arrives_and_what_is_shown_is_told(started, tmp_path, kind):
    started(kind, "cat")
    path = tmp_path / "socket"
    assert ask(path, keys(b"hello\n")) == [{"ok": True}]
    wait_for(lambda: b"hello" in output(path))
    [shown] = ask(path, {"ask": "terminal"})
    assert (shown["rows"], shown["columns"]) == ((30, 90) if kind == "terminal" else (0, 0))
    assert Path(f"/proc/{shown['pid']}/comm").read_text() == "cat\n"


def test_the_last_256_kib_of_a_long_output(started, tmp_path):
    process = started("pipes", sys.executable, "-c", "print('x' * 400_000 + 'end', end='', flush=True); input()")
    assert process.stdout.read(400_003).endswith(b"end")
    assert output(tmp_path / "socket") == b"x" * ((256 << 10) - 3) + b"end"


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"no JSON\n",
        b"[" * 60_000 + b"\n",
        b'"text"\n',
        b"{}\n",
        b'{"ask": "other"}\n',
        b'{"ask": ["type"]}\n',
        b'{"ask": "type"}\n',
        b'{"ask": "type", "keys": 5}\n',
        b'{"ask": "type", "keys": "***"}\n',
        b'{"ask": "type", "keys": "\xff"}\n',
    ],
)
def test_anything_else_is_refused_with_a_reason(started, tmp_path, line):
    started("pipes", "cat")
    [answer, still] = ask(tmp_path / "socket", line, {"ask": "terminal"})
    assert answer["ok"] is False
    assert answer["reason"]
    assert still["output"] == ""


def test_who_floods_or_is_slow_is_dropped_and_holds_nobody_up(started, tmp_path):
    process = started("pipes", "cat")
    path = str(tmp_path / "socket")
    crowd = []
    for sent in (b"x" * 70_000, b'{"ask": "terminal"}\n' * 3000, *[b""] * 10):
        crowd.append(socket.socket(socket.AF_UNIX))
        crowd[-1].connect(path)
        crowd[-1].setblocking(False)
        with suppress(BlockingIOError):
            crowd[-1].sendall(sent)
    process.stdin.write(b"through\n")
    process.stdin.flush()
    assert process.stdout.readline() == b"through\n"
    wait_for(lambda: ask(path, {"ask": "terminal"})[0], 20)  # once the silent ones were dropped
    for one in crowd:
        one.close()


def test_typing_is_refused_while_nobody_reads_it(started, tmp_path):
    started("pipes", "sleep", "60")
    path = tmp_path / "socket"
    answers = ask(path, *[keys(b"x" * 40_000)] * 4)
    assert answers[0] == {"ok": True}
    assert answers[-1]["ok"] is False
    assert "does not read" in answers[-1]["reason"]


def test_typing_is_refused_where_the_input_is_closed(started, tmp_path):
    process = started("pipes", "sleep", "60")
    process.stdin.close()
    wait_for(lambda: ask(tmp_path / "socket", keys(b"x"))[0]["ok"] is False)


def test_it_is_for_its_user_and_root_only(started):
    if os.geteuid() != 0:
        pytest.skip("needs root to be somebody else")
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "socket")
        started("pipes", "cat", path=path)
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        Path(directory).chmod(0o755)
        pid = os.fork()
        if pid == 0:
            try:
                os.setuid(65534)
                with socket.socket(socket.AF_UNIX) as client:
                    client.connect(str(path))
                    os._exit(9 if client.recv(1) == b"" else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
        assert ask(path, {"ask": "terminal"})[0]["pid"]


def test_it_is_gone_with_the_agent(started, tmp_path):
    process = started("pipes", "cat")
    process.stdin.close()
    assert process.wait(timeout=20) == 0
    assert not (tmp_path / "socket").exists()


def test_an_idle_governor_does_not_wake_up(started, tmp_path):
    process = started("pipes", "cat")
    time.sleep(0.3)

    def switches():
        status = Path(f"/proc/{process.pid}/status").read_text()
        return int(status.split("\nvoluntary_ctxt_switches:")[1].split()[0])

    before = switches()
    time.sleep(0.5)
    assert switches() <= before + 1
