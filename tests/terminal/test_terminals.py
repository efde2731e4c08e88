"""The channels by themselves: what the renderer makes of a terminal's output, and whom tmux is asked as."""

import base64
import contextlib
import json
import os
import random
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from governor import delivery, profile_file
from governor.channels import pty, tmux
from governor.channels.pty import PtyTerminal, Renderer
from governor.channels.terminal import ChannelError
from governor.channels.tmux import TmuxTerminal
from governor.children import Children
from governor.model import Tier
from governor.poller import Poller
from governor.subtree import read_stat
from tests.fakes.stage import COLUMNS, ROWS, TmuxStage
from tests.waiting import wait_for

# What the renderer makes of output


def shown(output: bytes, rows: int = 6, columns: int = 20) -> list[str]:
    return [line for line in Renderer(rows, columns).show(output) if line]


OUTPUTS = [
    (b"plain", ["plain"]),
    (b"a\r\nb\x1b[1;1HX", ["X", "b"]),
    (b"\x1b[31;1;4:3mred\x1b[0m \x1b[38;2;1;2;3mblue", ["red blue"]),
    (b"\x1b[>1u\x1b[<u\x1b[=1c\x1b[?2026hx\x1b[?2026l\x1b[>0q", ["x"]),
    (b"\x1b]0;a title\x07\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", ["link"]),
    (b"\x1bPq#0;2;0\x1b\\\x1b_Gi=1;AAAA\x1b\\\x1b^x\x1b\\end", ["end"]),
    (b"one\x1b[2K\x1b[Gtwo\x1b(B\x1b=\x1b>", ["two"]),
    (b"usual\x1b[?1049h\x1b[Hfull screen", ["full screen"]),
    (b"usual\x1b[?1049h\x1b[Hfull screen\x1b[?1049l again", ["usual again"]),
    (b"full screen\x1b[?1049l$", ["$"]),
    (b"a\r\nb\r\nc\x1b[S", ["b", "c"]),
    (b"a\r\nb\r\n\x1b[2T", ["a", "b"]),
    ("wide 漢字 and é".encode(), ["wide 漢字 and é"]),
    ("\u2764\ufe0f and a \u200d joiner, e\u0301".encode(), ["\u2764 and a  joiner, \u00e9"]),
    (b"cut \xe6\xbc", ["cut"]),
    (b"unfinished \x1b[12", ["unfinished"]),
    (b"\x1b[9999999999A\x1b[999;1;999H.", ["."]),
    (b"\x1b[?5A\x1b[1;2;3;4Ax\x1b[5;1r\x1b[0;0r", ["x"]),
]


@pytest.mark.parametrize(("output", "lines"), OUTPUTS)
def test_output_is_rendered_as_a_terminal_shows_it(output, lines):
    assert shown(output) == lines


@given(
    st.lists(st.sampled_from([output for output, _ in OUTPUTS]) | st.binary(max_size=30), max_size=12),
    st.integers(1, 9),
)
@settings(max_examples=150)
def test_no_output_brings_the_renderer_down_and_pieces_show_what_the_whole_shows(pieces, size):
    whole = b"".join(pieces)
    renderer, done = Renderer(6, 20), b""
    for at in range(0, len(whole), 7 * size):
        done = whole[: at + 7 * size]
        renderer.show(done)
    assert renderer.show(whole) == Renderer(6, 20).show(whole)


@pytest.mark.parametrize(
    "piece", [b"\x1b]", b"\x1bP\x1b", b"\x1b[", b"\x1b", b"\x1b[?1049h", b"\x1b[500S", b"\x1b[1;"]
)
def test_output_that_is_made_to_be_slow_is_given_up(monkeypatch, piece):
    monkeypatch.setattr(pty, "_RENDER_S", 0.1)
    data = (piece * (1 << 18))[: 1 << 18]
    with contextlib.suppress(ChannelError):
        Renderer(100, 100).show(data)


def test_a_window_that_slides_over_the_output_shows_the_same(monkeypatch):
    monkeypatch.setattr(pty, "_OVERLAP_BYTES", 64)
    rng = random.Random(7)
    output = b"".join(b"\x1b[%d;1Hline %d\x1b[K" % (rng.randrange(1, 7), number) for number in range(400))
    renderer = Renderer(6, 20)
    for end in range(1000, len(output), 300):
        renderer.show(output[max(0, end - 1000) : end])
    assert renderer.show(output[-1000:]) == Renderer(6, 20).show(output)


def test_it_shows_what_tmux_shows(tmp_path):
    """The same bytes to both: moves, erasures, scroll regions, inserted and deleted lines and characters."""
    rng = random.Random(4)
    moves = [f"\x1b[{rng.randrange(1, 30)};{rng.randrange(1, 90)}H" for _ in range(60)]
    moves += [f"\x1b[{rng.randrange(1, 4)}{final}" for final in "ABCDEFGPX@ST" for _ in range(4)]
    moves += ["\x1b[r\x1b[9;9H\x1b[L\r", "\x1b[r\x1b[9;9H\x1b[2M\r"] * 4  # where terminals agree
    moves += [
        "\x1b[K",
        "\x1b[1K",
        "\x1b[J",
        "\x1b7",
        "\x1b8",
        "\x1bM",
        "\r\n",
        "\n",
        "\x1b[5;20r",
        "\x1b[r",
        "text " * 9,
    ] * 6
    rng.shuffle(moves)
    output = "".join(f"{move}{number}" for number, move in enumerate(moves)).encode()
    (tmp_path / "output").write_bytes(output + b"\x1b[r\x1b[30;80H\x1b[Kend")
    stage = TmuxStage(tmp_path, ["sh", "-c", "stty raw; cat output; exec sleep 600"], {})
    try:
        stat = read_stat(stage.pid)
        terminal = TmuxTerminal(stage.socket, "agent", os.geteuid(), stat.terminal)
        wait_for(lambda: terminal.screen()[-1].endswith("end"))
        assert Renderer(ROWS, COLUMNS).show((tmp_path / "output").read_bytes()) == terminal.screen()
    finally:
        stage.close()


# The control socket


def answering(path: Path, answer: bytes, times: int = 1) -> None:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(path))
    server.listen()

    def serve() -> None:
        for _ in range(times):
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                with contextlib.suppress(OSError):
                    connection.sendall(answer)
        server.close()

    threading.Thread(target=serve, daemon=True).start()


def told(**changed: object) -> bytes:
    answer = {"rows": 5, "columns": 20, "pid": 7, "output": base64.b64encode(b"> hi").decode()}
    return json.dumps(answer | changed).encode() + b"\n"


ANSWERS = [
    (b"", "hung up"),
    (b"\n", "something else than an object"),
    (b"[1]\n", "something else than an object"),
    (b'{"rows":1}\n', "something else than its terminal"),
    (told(rows=True), "something else than its terminal"),
    (told(output="\u00e4"), "cannot ask|no base64"),
    (told(pid=8), "terminal of process 8"),
    (b'{"ok":false,"reason":"no \\u001b[2J agent"}\n', r"no \\x1b\[2J agent"),
    (b"x" * (2 << 20), "too much"),
]


@pytest.mark.parametrize(("answer", "why"), ANSWERS)
def test_an_answer_that_is_none_is_a_reason(tmp_path, answer, why):
    answering(tmp_path / "s", answer)
    with pytest.raises(ChannelError, match=why) as raised:
        PtyTerminal(str(tmp_path / "s"), [7]).screen()
    assert str(raised.value).isprintable()


def test_a_window_without_end_is_rendered_in_bounds_and_pipes_are_no_terminal(tmp_path):
    answering(tmp_path / "s", told(rows=10**9, columns=10**9))
    terminal = PtyTerminal(str(tmp_path / "s"), [7])
    assert terminal.screen() == ["> hi"]
    assert terminal._renderer.size == (500, 500)
    answering(tmp_path / "t", told(rows=0, columns=0))
    with pytest.raises(ChannelError, match="pipes and no terminal"):
        PtyTerminal(str(tmp_path / "t"), [7]).screen()


def test_output_that_takes_a_cpu_for_long_is_left_off_in_time(monkeypatch):
    """Each of these 6 bytes moves 500 lines 500 times."""
    monkeypatch.setattr("governor.channels.pty._RENDER_S", 0.2)
    renderer = Renderer(500, 500)
    began_s = time.process_time()
    with pytest.raises(ChannelError, match="too long to render"):
        renderer.show(b"\x1b[r" + b"\x1b[500S" * 700)
    assert time.process_time() - began_s < 0.2 * 10  # of CPU time; to the end it takes 22 s


class Spinning:
    """A terminal that never has enough of the CPU."""

    def screen(self):
        while True:
            pass


def test_a_delivery_has_so_much_of_a_cpu_and_no_more(monkeypatch):
    monkeypatch.setattr(delivery, "_CPU_S", 1)
    monkeypatch.setattr(delivery, "open_terminal", lambda *_: Spinning())
    profile = profile_file.load("generic-repl").profile
    profile = replace(profile, match=replace(profile.match, process=()))
    ended, poller = [], Poller()
    children = Children(poller)
    child = delivery.start(profile, Tier.COMPACT, os.getpid(), "pty:/x", time.monotonic_ns() + 10**12)
    children.start(child, ended.append)
    wait_for(lambda: (poller.wait(100_000_000), ended)[1], 60)
    assert ended[0].deferred, ended
    assert "more than 1 s of CPU time" in ended[0].why


def test_who_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(pty, "CALL_S", 0.2)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(str(tmp_path / "s"))
    server.listen()
    with server, pytest.raises(ChannelError, match="did not answer within"):
        PtyTerminal(str(tmp_path / "s")).screen()
    with pytest.raises(ChannelError, match="cannot ask governor run"):
        PtyTerminal("x" * 200).screen()


# tmux


@pytest.fixture
def stage(tmp_path):
    stage = TmuxStage(tmp_path, ["cat", "-v"], {})
    yield stage
    stage.close()


def terminal_of(stage: TmuxStage, target: str = "agent", uid: int | None = None) -> TmuxTerminal:
    stat = read_stat(stage.pid)
    return TmuxTerminal(stage.socket, target, os.geteuid() if uid is None else uid, stat.terminal)


def test_keys_arrive_as_they_are(stage):
    terminal = terminal_of(stage)
    terminal.type("-l ; $(x) 'q' \\ #{pane_id} é漢\x01\x1b\x7f\x7fend;\r".encode())
    wait_for(lambda: any("end;" in line for line in terminal.screen()))
    typed = terminal.screen()[0]
    assert typed.startswith("-l ; $(x) 'q' \\ #{pane_id} é漢") or "^A^[" in typed


REFUSED = [
    ("/nowhere/socket", "no tmux server"),
    ("file", "is no socket"),
    ("link", "is no socket"),
    ("nobody", "no server running|error connecting|refused"),
]


@pytest.mark.parametrize(("where", "why"), REFUSED)
def test_what_is_no_tmux_server_is_refused(tmp_path, stage, where, why):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(stage.socket)
    with socket.socket(socket.AF_UNIX) as nobody:
        nobody.bind(str(tmp_path / "nobody"))
    with pytest.raises(ChannelError, match=why):
        TmuxTerminal(str(tmp_path / where), "agent", os.geteuid(), 0).screen()


def test_a_server_that_hangs_is_not_waited_for(stage, monkeypatch):
    monkeypatch.setattr(tmux, "CALL_S", 0.5)
    server = int(stage.tmux("display-message", "-p", "#{pid}"))
    terminal = terminal_of(stage)
    os.kill(server, 19)
    try:
        with pytest.raises(ChannelError, match="did not answer"):
            terminal.screen()
    finally:
        os.kill(server, 18)
    with pytest.raises(ChannelError, match="tmux"):
        terminal_of(stage, "no-such-session").screen()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_the_client_of_a_users_server_runs_as_that_user(tmp_path, monkeypatch):
    """A hostile server may have the client run things; here a wrapper for tmux writes down who it is."""
    uid = 65534
    tmp_path.chmod(0o777)
    for parent in list(tmp_path.parents)[:-2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    socket_path = str(tmp_path / "theirs")
    argv = ["tmux", "-f", "/dev/null", "-S", socket_path, "new-session", "-d", "-s", "agent", "sleep", "600"]
    plain = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"}
    subprocess.run(argv, user=uid, group=uid, extra_groups=[], check=True, cwd="/", env=plain)
    try:
        wrapper = tmp_path / "bin" / "tmux"
        wrapper.parent.mkdir(mode=0o755)
        wrapper.write_text(f'#!/bin/sh\n{{ id -u; id -G; env; }} >> {tmp_path}/who\nexec /usr/bin/tmux "$@"\n')
        wrapper.chmod(0o755)
        monkeypatch.setattr(tmux, "_PATH", f"{wrapper.parent}:{tmux._PATH}")
        monkeypatch.setenv("SECRET", "not for them")
        ask = ["tmux", "-S", socket_path, "display-message", "-p", "#{pane_pid}"]
        pid = int(subprocess.run(ask, capture_output=True, check=True).stdout)
        device = wait_for(lambda: read_stat(pid).terminal, what="a terminal of its own")
        assert TmuxTerminal(socket_path, "agent", uid, device).screen() == [""]
        who = (tmp_path / "who").read_text()
        assert who.startswith("65534\n65534\n")
        assert "SECRET" not in who
        with pytest.raises(ChannelError, match="belongs to another user"):
            TmuxTerminal(socket_path, "agent", 1, device).screen()
    finally:
        subprocess.run(["tmux", "-S", socket_path, "kill-server"], check=False)
