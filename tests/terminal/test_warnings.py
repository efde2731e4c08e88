"""What a person sees of a warning: on the status line of real tmux clients, and at the terminal of `governor run`."""

import os
import re
import select
import shutil
import sys
import time

import pytest
from desk import RUN, AtTerminal, ask, resident, wait_for

from governor import person
from governor.channels.pty import Renderer
from governor.channels.terminal import ChannelError
from governor.run_notice import Notices, is_inside, sequence
from governor.run_streams import Flow, Sink
from tests.fakes.stage import TmuxStage

TEXT = "governor: warning: 71.5 % #(touch {0}) #{{pane_id}} %H; é漢 ;"
XTERM = {"TERM": "xterm-256color"}


class Attached(AtTerminal):
    """A real client of a tmux server, and what its screen shows."""

    def __init__(self, socket, columns=160):
        size = {"rows": 20, "columns": columns}
        command = ["tmux", "-S", socket, "attach", "-t", "agent"]
        super().__init__(*command, **size, environment={"TERM": "xterm", "LC_ALL": "C.UTF-8", "TMUX": ""})
        self._size = (20, columns)

    def shows(self):
        while self.read(0.05):
            pass
        return "\n".join(Renderer(*self._size).show(self.output))


@pytest.fixture
def stage(tmp_path):
    stage = TmuxStage(tmp_path, ["cat", "-v"], {})
    yield stage
    stage.close()


def test_every_attached_client_shows_it_as_it_is_and_nothing_is_typed_or_run(stage, tmp_path):
    clients = [Attached(stage.socket), Attached(stage.socket)]
    try:
        wait_for(lambda: stage.tmux("list-clients").count("\n") == 2)
        text = TEXT.format(tmp_path / "ran")
        found = person.places(stage.pid)  # by the agent's own environment
        assert person.show(found, text) == "on the status line of 2 tmux clients"
        for client in clients:
            wait_for(lambda client=client: text in client.shows())
        clients[0].type(b"x")  # takes the message away, and goes where it would have gone
        wait_for(lambda: text not in clients[0].shows())
        wait_for(lambda: stage.tmux("capture-pane", "-p", "-t", "agent").strip() == "x")
        assert not (tmp_path / "ran").exists()
    finally:
        for client in clients:
            client.close()


def test_who_is_attached_to_another_session_is_not_told(stage):
    stage.tmux("new-session", "-d", "-s", "other", "cat")
    with pytest.raises(ChannelError, match="nobody is attached"):
        person.show(person.places(stage.pid), "governor: x")
    there = AtTerminal("tmux", "-S", stage.socket, "attach", "-t", "other", environment={"TERM": "xterm", "TMUX": ""})
    try:
        wait_for(lambda: stage.tmux("list-clients").count("\n") == 1)
        with pytest.raises(ChannelError, match="nobody is attached"):
            person.show(person.places(stage.pid), "governor: x")
    finally:
        there.close()


# The terminal of governor run


@pytest.fixture
def terminal(tmp_path):
    made = []

    def start(*command, environment=XTERM, **options):
        socket_path = tmp_path / f"{len(made)}.sock"
        words = resident(*command, socket_path=str(socket_path), **options)
        made.append(AtTerminal(*words, environment={"TMUX": "", "STY": "", "VTE_VERSION": "", **environment}))
        made[-1].socket = socket_path
        return made[-1]

    yield start
    for each in made:
        each.close()


DRAWING = r"""
import os, sys, termios, time, tty
tty.setraw(0)
sys.stdout.write("\x1b[?1049h\x1b[2J\x1b[Hfull screen\x1b]0;the agent's title\x07")
sys.stdout.flush()
while True:
    key = os.read(0, 1)
    if key == b"q":
        break
    if key == b"b":  # begin a sequence
        os.write(1, b"\x1b[31")
    if key == b"e":  # and end it
        os.write(1, b";1mred\x1b[m")
    if key == b"h":  # half a character
        os.write(1, "漢".encode()[:2])
    if key == b"w":
        os.write(1, "漢".encode()[2:])
sys.stdout.write("\x1b[?1049l")
"""


def test_a_full_screen_program_is_not_drawn_into(terminal):
    run = terminal(sys.executable, "-c", DRAWING)
    run.await_output(b"title\x07")
    before = Renderer(24, 80).show(run.output)
    assert ask(run.socket, {"ask": "warn", "text": "governor: clear in 5 s; hold it"}) == [{"ok": True}]
    run.await_output(
        b"\x1b]9;governor: clear in 5 s; hold it\x07\x1b[22;2t\x1b]2;governor: clear in 5 s; hold it\x07\x07"
    )
    assert Renderer(24, 80).show(run.output) == before
    run.type(b"q")
    assert run.wait() == 0
    assert run.output.count(b"\x1b[23;2t") == 1  # the title is back
    assert run.output.index(b"\x1b[23;2t") > run.output.index(b"\x1b[22;2t")


@pytest.mark.parametrize(("begin", "end", "whole"), [(b"b", b"e", b"\x1b[31;1mred"), (b"h", b"w", "漢".encode())])
def test_it_waits_for_the_end_of_a_sequence_and_of_a_character(terminal, begin, end, whole):
    run = terminal(sys.executable, "-c", DRAWING)
    run.await_output(b"title\x07")
    run.type(begin)
    wait_for(lambda: run.read() is not None and run.output.endswith((b"\x1b[31", "漢".encode()[:2])))
    ask(run.socket, {"ask": "warn", "text": "governor: wait"})
    time.sleep(0.3)
    run.read()
    assert b"wait" not in run.output
    run.type(end)
    run.await_output(b"governor: wait")
    assert whole in run.output


REFUSED = ["", "a\nb", "\x1b[2J", "x" * 1001, 7, None]


@pytest.mark.parametrize("text", REFUSED)
def test_what_is_no_line_of_text_is_refused(terminal, text):
    run = terminal("cat")
    wait_for(run.socket.exists)
    [answer] = ask(run.socket, {"ask": "warn", "text": text})
    assert answer["ok"] is False


def test_at_a_terminal_without_sequences_it_is_a_line(terminal):
    run = terminal("cat", environment={"TERM": "dumb"})
    wait_for(run.socket.exists)
    ask(run.socket, {"ask": "warn", "text": "governor: soon"})
    run.await_output(b"\r\ngovernor: soon\r\n\a")


def test_a_real_terminal_shows_the_title_rings_and_draws_nothing(tmp_path):
    """tmux as a terminal that is not known to be tmux: it has a title, a stack of titles and a bell."""
    (tmp_path / "draw.py").write_text(DRAWING)
    socket_path = tmp_path / "run.sock"
    draw = resident(sys.executable, str(tmp_path / "draw.py"), socket_path=str(socket_path))
    stage = TmuxStage(tmp_path, ["sh", "-c", '"$@"; exec cat', "sh", *draw], {"TERM": "xterm"})

    def told(what):
        return stage.tmux("display-message", "-p", "-t", "agent:0", what).strip()

    try:
        stage.tmux("new-window", "-t", "agent", "-d", "-n", "other", "cat")
        stage.tmux("select-window", "-t", "agent:other")  # a bell of a window that nobody looks at is remembered
        wait_for(lambda: told("#{pane_title}") == "the agent's title")
        before = stage.tmux("capture-pane", "-p", "-t", "agent:0")
        ask(socket_path, {"ask": "warn", "text": "governor: clear in 5 s"})
        wait_for(lambda: told("#{pane_title} #{window_bell_flag}") == "governor: clear in 5 s 1")
        assert stage.tmux("capture-pane", "-p", "-t", "agent:0") == before
        stage.tmux("send-keys", "-t", "agent:0", "q")
        wait_for(lambda: told("#{pane_title}") == "the agent's title")
    finally:
        stage.close()


@pytest.mark.skipif(not shutil.which("screen"), reason="GNU screen is not installed")
def test_in_gnu_screen_it_is_on_the_message_line(tmp_path):
    socket_path = tmp_path / "run.sock"
    words = resident("cat", socket_path=str(socket_path))
    environment = {"TERM": "xterm", "SCREENDIR": str(tmp_path), "TMUX": "", "LC_ALL": "C.UTF-8"}
    tmp_path.chmod(0o700)
    outer = AtTerminal("screen", "-U", "-c", "/dev/null", *words, environment=environment)
    try:
        wait_for(lambda: outer.read() is not None and socket_path.exists())
        time.sleep(0.5)
        ask(socket_path, {"ask": "warn", "text": "governor: clear in 5 s"})
        outer.await_output(b"governor: clear in 5 s")
        outer.type(b"\x04")
        assert outer.wait() == 0
    finally:
        outer.close()


KINDS = [
    ({"TERM": "xterm"}, b"\x1b]9;governor: a; b\a\x1b[22;2t\x1b]2;governor: a; b\a\a"),
    ({"TERM": "xterm", "VTE_VERSION": "7000"}, b"\x1b]777;notify;governor;a, b\a\x1b[22;2t\x1b]2;governor: a; b\a\a"),
    ({"TERM": "screen", "STY": "1.tty"}, b"\x1b^governor: a; b\x1b\\\a"),
    ({"TERM": "linux"}, b"\a"),
    ({}, b"\r\ngovernor: a; b\r\n\a"),
]


@pytest.mark.parametrize(("environment", "shown"), KINDS)
def test_each_kind_of_terminal_gets_what_it_knows(environment, shown):
    assert sequence("governor: a; b", environment, is_titled=False) == shown


INSIDE = [
    (b"", False),
    (b"text", False),
    (b"\x1b", True),
    (b"\x1b[", True),
    (b"\x1b[38;5", True),
    (b"\x1b[38;5m", False),
    (b"\x1b]0;title", True),
    (b"\x1b]0;title\x07", False),
    (b"\x1b]0;title\x1b", True),
    (b"\x1b]0;title\x1b\\", False),
    (b"\x1bPq" + b"#" * 100_000, True),
    ("é".encode(), False),
    ("é".encode()[:1], True),
    ("漢".encode()[:2], True),
    ("漢".encode(), False),
    ("😀".encode()[:3], True),
    (b"\x1b[31mx\x1b(", True),
    (b"\x1b(B", False),
]


@pytest.mark.parametrize(("output", "inside"), INSIDE)
def test_where_a_sequence_or_a_character_is_not_whole(output, inside):
    assert is_inside(output) is inside


def test_the_former_title_comes_back_after_a_while():
    read_fd, write_fd = os.pipe()
    flow, notices = Flow(-1, Sink(write_fd, is_ours=True), keeps_tail=True), Notices(XTERM)
    for text in ("one", "two"):
        notices.put(text)
    notices.turn(flow, 1000)
    due_ns = notices.due_ns()
    notices.turn(flow, due_ns - 1)
    shown = os.read(read_fd, 4096)
    assert (shown.count(b"\x1b[22;2t"), shown.count(b"\x1b]2;"), b"\x1b[23;2t" in shown) == (1, 2, False)
    flow.put(b"\x1b[3")
    notices.turn(flow, due_ns)  # not now
    assert os.read(read_fd, 4096) == b"\x1b[3"
    flow.put(b"1m")
    notices.turn(flow, notices.due_ns())
    assert os.read(read_fd, 4096) == b"1m\x1b[23;2t"
    assert notices.due_ns() is None
    assert not select.select([read_fd], [], [], 0)[0]
    flow.close()
    os.close(read_fd)


# The whole way


POLICY = """
extends = "default"
[brake]
enabled = false
[signals]
stalled_compact = 0.2
[compact]
exec = ["false"]
engage = 0.2
release = 0.1
cooldown_waived = 0.2
[clear]
exec = ["true"]
engage = 0.3
release = 0.2
warning = "4s"
"""
GROWS = "import time; kept = b'x' * (50 << 20); print('big', flush=True); time.sleep(600)"


@pytest.fixture
def desk(memcg, tmp_path):
    """`governor run` with an agent that holds half of its memcg, which is to be cleared."""
    (tmp_path / "policy.toml").write_text(POLICY)
    state = {"XDG_STATE_HOME": str(tmp_path / "state")}
    words = [*RUN, "--policy", str(tmp_path / "policy.toml"), "--memory-max", "96MiB", "--source", "poll"]
    made = []

    def start(**environment):
        environment = {**start.environment, **environment}
        made.append(AtTerminal(*words, "--", sys.executable, "-c", GROWS, environment=environment))
        return made[-1]

    start.words, start.environment = words, {"STY": "", "VTE_VERSION": "", **XTERM, **state}
    yield start
    for each in made:
        each.close()


def test_before_a_clear_the_user_is_warned_at_the_terminal_and_told_that_it_was_done(desk):
    run = desk(TMUX="", TMUX_PANE="")
    run.await_output(b"the agent's context is cleared in 4 s; to forbid it: governor hold 10m", 40)
    run.await_output(b"clear: carried out, as warned of", 20)
    assert re.search(rb"\x1b\]9;governor: warning: [^\x07]* % of max is in use; compact: \w+\x07", run.output)


def test_a_veto_is_told_where_the_warning_was(desk, tmp_path):
    stage = TmuxStage(tmp_path, ["sh", "-c", "sleep 600"], {})  # run's terminal is another one: not its pane
    run = desk(TMUX=f"{stage.socket},1,0", TMUX_PANE="%0")
    try:
        run.await_output(b"the agent's context is cleared in 4 s", 40)
        done = AtTerminal(sys.executable, "-m", "governor", "hold", "10m")
        assert done.wait() == 0
        done.close()
        run.await_output(b"clear: vetoed, it does not come", 20)
        assert b"carried out" not in run.output
    finally:
        stage.close()


def test_where_governor_run_sits_in_tmux_its_status_line_shows_it(desk, tmp_path):
    words, environment = desk.words, desk.environment
    stage = TmuxStage(tmp_path, [*words, "--", sys.executable, "-c", GROWS], {**os.environ, **environment})
    client = Attached(stage.socket)
    try:
        shown = "governor: warning: the agent's context is cleared in 4 s; to forbid it: governor hold 10m"
        wait_for(lambda: shown in client.shows(), 40)
        wait_for(lambda: "clear: carried out, as warned of" in client.shows(), 20)
        assert "governor: warning" not in stage.tmux("capture-pane", "-p", "-t", "agent")
    finally:
        client.close()
        if os.path.exists(f"/proc/{stage.pid}"):
            os.kill(stage.pid, 15)
        wait_for(lambda: not os.path.exists(f"/proc/{stage.pid}"))
