"""profile_file and governor profile: what a profile may say, the profiles that come along, and trying one."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from governor import delivery, profile_file
from governor.cli import app
from governor.delivery import deliver, open_terminal
from governor.model import Status, Tier
from governor.policy import SECOND
from governor.profile import Profile, WhileBusy
from governor.profile_agent import find_agent
from governor.profile_cli import as_toml
from governor.profile_file import KEYS, Loaded, ProfileError, load, parse, profiles
from governor.profile_state import State, first_match, look, read_screen
from tests.fakes.stage import PtyStage, TmuxStage, wait_for

FAKES = Path(__file__).resolve().parent.parent / "fakes"
WAY = '[signals]\ncompact = "SIGUSR1"\n'


def read(text: str) -> Loaded:
    return parse(text.encode(), "p.toml")


def faults(text: str) -> list[str]:
    with pytest.raises(ProfileError) as raised:
        read(text)
    return [fault.text("p.toml") for fault in raised.value.faults]


def run(*arguments: str):
    return CliRunner().invoke(app, ["profile", *arguments])


# What a profile may say


@pytest.mark.parametrize("name", profiles())
def test_the_profiles_that_come_along_are_good_and_are_shown_as_they_are_read(name):
    loaded = load(name)
    assert loaded.profile.name == name
    shown = "\n".join(as_toml(loaded))
    assert parse(shown.encode(), f"{name}.toml").profile == loaded.profile
    assert name in run("list").stdout


FAULTS = [
    ("", 0, "no way to compact or clear"),
    (WAY + 'clear = "SIGKILL"', 3, "a signal that the agent can handle"),
    (WAY + 'clear = "SIGSEGV"', 3, "a signal that means something"),
    (WAY + "[match]\nprocess = ['a/b']", 4, "names of programs"),
    (WAY + "[match]\nproces = ['b']", 4, 'did you mean "process"?'),
    (WAY + "[screen]\nprompt = '^> '", 4, '"(?P<draft>...)"'),
    (WAY + "[screen]\nprompt = '^> (?P<draft>'", 4, "a regular expression (missing )"),
    (WAY + "[screen]\nbusy = ['a*']", 4, "that an empty screen does not match"),
    (WAY + "[state_file]\npath = '~/{user}.json'", 4, "no other field than {pid}"),
    (WAY + "[state_file]\npath = '~/*.json'", 4, "a path without wildcards"),
    (WAY + "[state_file]\npath = '../x'", 4, "begins with / or ~/"),
    (WAY + "[state_file]\nidle = ['idle']", 4, "state_file.status beside it"),
    (WAY + "[state_file]\npath='~/x'\nstatus='s'\nidle = ['a']\nbusy=['a']", 7, "each status in one list only"),
    (WAY + "[confirm]\ncompact_record = ['x']", 4, "confirm.transcript beside it"),
    (WAY + "[confirm]\nwithin = 0", 4, "more than 0"),
    (WAY + "[session]\nresume = ['a', '{session}']", 4, "state_file.session beside it"),
    (WAY + "[session]\nresume = ['']", 4, "begins with the program to run"),
    ("[type]\ncompact = '/compact'", 2, "screen.prompt beside it"),
    (WAY + "[type]\ncompact = '/compact'\n[screen]\nprompt='>(?P<draft>)'", 2, "only one of"),
    (
        "[screen]\nprompt='>(?P<draft>)'\n[type]\ncompact = 'a\\tb'\n".replace("'a\\tb'", '"a\\tb"'),
        4,
        "one line of text",
    ),
    (WAY + 'standing = "proven"', 3, "a key of [signals]"),
    ("standing = 1\n" + WAY, 1, 'one of "proven", "experimental"'),
]


@pytest.mark.parametrize(("text", "line", "expected"), FAULTS)
def test_a_fault_is_said_with_its_line_and_what_was_expected(text, line, expected):
    (fault,) = faults(text)
    assert fault.startswith(f"p.toml:{line}: " if line else "p.toml: ")
    assert expected in fault


def test_every_fault_is_said_at_once_and_the_command_exits_with_2(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text("standing = 1\n[type]\npause = 3\n[match]\nwrapped = 1\n[x]\ny = 1\n")
    done = run("check", str(path))
    assert (done.exit_code, done.stderr.count("\n")) == (2, 4)
    assert run("check", "clade-code").exit_code == 2
    assert "did you mean" in run("check", "clade-code").stderr


@given(st.binary() | st.text().map(str.encode))
def test_no_bytes_bring_the_reader_down(data):
    try:
        parse(data, "p.toml")
    except ProfileError as error:
        assert error.faults


def test_show_prints_json_with_units():
    told = json.loads(run("show", "claude-code", "--json").stdout)
    assert (told["type"]["pause_ns"], told["efficacy"]["clear"]) == (300_000_000, "useless")
    assert {path.split(".")[0] for path in KEYS} == set(told)


# What the screens of real agents say; taken from the real ones, shortened

RULE, SIGN = "─" * 60, "\u276f"
CLAUDE = [
    ("idle", [" ▐▛███▛█   Claude Code", "● It is done.", RULE, f"{SIGN}", RULE, "  ? for shortcuts"], State.IDLE, ""),
    ("nbsp", [f"{SIGN} hello", RULE, f"{SIGN}\u00a0half a thought", RULE], State.IDLE, "half a thought"),
    (
        "lines",
        [RULE, f"{SIGN}\u00a0line one", "  line two", RULE, "  ctrl+g to edit in Vim"],
        State.IDLE,
        "line one\nline two",
    ),
    ("queued", [f"  {SIGN} /compact", RULE, f"{SIGN}\u00a0Press up to edit queued messages", RULE], State.IDLE, ""),
    ("typed", [RULE, f"{SIGN}\u00a0/compact", RULE, "/compact       Free up context"], State.IDLE, "/compact"),
    ("shell", [f"{SIGN} /clear", RULE, "!\u00a0ls", RULE, "  ! for shell mode"], State.SHELL, None),
    (
        "dialog",
        [
            f"{SIGN} TOOL touch x",
            RULE,
            " Bash command",
            "   touch x",
            " Do you want to proceed?",
            f" {SIGN} 1. Yes",
            "   2. No",
        ],
        State.WAITING,
        None,
    ),
    (
        "picker",
        [f"{SIGN} /model", RULE, "  Select model", f"  {SIGN} 1. Default", "  Enter to set · Esc to cancel"],
        State.WAITING,
        None,
    ),
    (
        "search",
        [RULE, "  Search prompts", "  ⌕ Filter", "  Esc i / for commands · Esc to cancel"],
        State.WAITING,
        None,
    ),
    ("talk of it", ["● Esc to cancel, I said", RULE, f"{SIGN}", RULE, "  ? for shortcuts"], State.IDLE, ""),
]


@pytest.mark.parametrize(("lines", "state", "draft"), [case[1:] for case in CLAUDE], ids=[case[0] for case in CLAUDE])
def test_the_screen_of_claude_code(lines, state, draft):
    found, seen_draft, _ = read_screen(load("claude-code").profile, lines)
    assert (found.state, seen_draft) == (state, draft)


REFUSALS = [
    ([f"{SIGN} /compact", "  ⎿ \u00a0Error: No messages to compact"], True),
    ([f"{SIGN} /compact", "  ⎿  Not enough messages to compact."], True),
    ([f"{SIGN} /compact", "  ⎿  Compacted (ctrl+o to see full summary)"], False),
    (["● Bash(false)", "  ⎿ \u00a0Error: Exit code 1"], False),
]


@pytest.mark.parametrize(("lines", "refused"), REFUSALS)
def test_a_refusal_of_claude_code_is_told_from_a_tools_error(lines, refused):
    assert bool(first_match(load("claude-code").profile.confirm.refused, "\n".join(lines))) is refused


# The generic profiles on real programs


class Lines:
    """The program of lines.py on a stage."""

    def __init__(self, kind, home: Path, *options: str) -> None:
        self.record = home / "record"
        self.stage = kind(home, [sys.executable, str(FAKES / "lines.py"), str(self.record), *options], {})
        self.profile = load("generic-repl").profile
        self.agent = find_agent(self.profile.match, self.stage.pid)
        self.terminal = open_terminal(self.stage.channel, self.agent)
        wait_for(lambda: self.seen().draft == "")

    def seen(self):
        return look(self.profile, self.agent, self.terminal.screen())

    def deliver(self, tier=Tier.COMPACT):
        return deliver(self.profile, tier, self.agent, self.terminal, time.monotonic_ns() + 30 * SECOND)

    def done(self) -> list[str]:
        return self.record.read_text().split("\n")[:-1] if self.record.exists() else []


@pytest.fixture(params=[TmuxStage, PtyStage], ids=["tmux", "pty"])
def lines(request, tmp_path):
    started = []

    def start(*options: str) -> Lines:
        started.append(Lines(request.param, tmp_path, *options))
        return started[-1]

    yield start
    for program in started:
        program.stage.close()


def test_a_program_that_reads_lines_gets_its_commands_and_nothing_in_between(lines):
    program = lines("0.5")
    assert program.deliver().status is Status.DELIVERED
    assert program.deliver(Tier.CLEAR).status is Status.DELIVERED
    program.stage.type("half")
    wait_for(lambda: program.seen().draft == "half")
    outcome = program.deliver()
    assert (outcome.status, "a draft is in its input ('half')" in outcome.reason) == (Status.DEFERRED, True)
    program.stage.type("\x15ask\r")
    wait_for(lambda: program.seen().state is State.UNKNOWN)  # at work: there is no prompt
    assert program.deliver().status is Status.DEFERRED
    wait_for(lambda: program.seen().state is State.WAITING)
    outcome = program.deliver()
    assert (outcome.status, "it is waiting" in outcome.reason) == (Status.DEFERRED, True)
    assert program.done() == ["/compact", "/clear", "ask"]


def test_a_program_in_the_background_of_its_terminal_is_not_typed_to(tmp_path):
    shell = f"set -m; {sys.executable} -c 'import time; time.sleep(600)' & echo $! > {tmp_path}/background; cat"
    stage = PtyStage(tmp_path, ["bash", "-c", shell], {})
    try:
        pid = int(str(wait_for(lambda: (tmp_path / "background").exists() and (tmp_path / "background").read_text())))
        profile = load("generic-repl").profile
        agent = find_agent(profile.match, pid)
        terminal = open_terminal(stage.channel, agent)
        outcome = deliver(profile, Tier.COMPACT, agent, terminal, time.monotonic_ns() + 30 * SECOND)
        assert (outcome.status, "not in the foreground" in outcome.reason) == (Status.DEFERRED, True)
    finally:
        os.kill(pid, signal.SIGKILL)
        stage.close()


def test_signals_reach_who_handles_them_and_nobody_else(tmp_path):
    record = tmp_path / "record"
    heard = subprocess.Popen([sys.executable, str(FAKES / "lines.py"), str(record)], stdin=subprocess.PIPE, stdout=-1)
    deaf = subprocess.Popen(["sleep", "600"])
    profile = load("generic-signal").profile
    try:
        wait_for(lambda: run("try", "generic-signal", "--pid", str(heard.pid)).exit_code == 0)
        for tier, name in ((Tier.COMPACT, "SIGUSR1"), (Tier.CLEAR, "SIGUSR2")):
            outcome = deliver(profile, tier, find_agent(profile.match, heard.pid), None, 0)
            assert (outcome.status, outcome.reason) == (Status.DELIVERED, f"{name} sent")
            wait_for(lambda name=name: record.exists() and name in record.read_text())
        child = delivery.start(profile, Tier.COMPACT, deaf.pid, "", time.monotonic_ns() + SECOND)
        os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
        assert (child.end(), child.output) == (1, b"the agent does not handle SIGUSR1: not sent")
        tried = run("try", "generic-signal", "--pid", str(deaf.pid))
        assert (tried.exit_code, "does not handle SIGUSR1, SIGUSR2" in tried.stdout) == (1, True)
        assert deaf.poll() is None
    finally:
        for process in (heard, deaf):
            process.kill()
            process.wait()


# Trying


def test_trying_says_what_it_sees_and_types_nothing(lines, tmp_path):
    program = lines()
    kind, _, where = program.stage.channel.partition(":")
    option = "--tmux" if kind == "tmux" else "--control"
    arguments = ["try", "generic-repl", "--pid", str(program.stage.pid), option, where]
    before = program.terminal.screen()
    done = run(*arguments, "--json")
    told = json.loads(done.stdout)
    assert (done.exit_code, told["state"], told["draft"], told["why_not"]) == (0, "idle", "", "")
    assert told["would_compact"] == "type '/compact', wait 200 ms, look again, press '\\r', await its effect for 50 s"
    assert (program.terminal.screen(), program.done()) == (before, [])
    program.stage.type("a draft")
    wait_for(lambda: program.seen().draft == "a draft")
    done = run(*arguments)
    assert (done.exit_code, "why_not          a draft is in its input" in done.stdout) == (1, True)


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["generic-repl", "--pid", str(os.getpid()), "--tmux", "nothing"], 2, "expected SOCKET:TARGET"),
        (["generic-repl", "--pid", str(os.getpid()), "--tmux", "a:b", "--control", "c"], 2, "expected one of them"),
        (["generic-repl", "--pid", str(os.getpid())], 1, "no terminal was named"),
        (["generic-repl", "--pid", str(os.getpid()), "--control", "/nowhere"], 1, "cannot ask governor run"),
        (["claude-code", "--pid", str(os.getpid())], 1, "expected it or what it started to be called claude"),
        (["generic-repl", "--pid", "999999999"], 1, "found no process 999999999"),
    ],
)
def test_trying_in_vain_says_why(arguments, status, said):
    done = run("try", *arguments)
    assert (done.exit_code, said in done.output) == (status, True)


def test_a_busy_program_is_asked_only_where_it_queues():
    lines_shown = ["working", "> "]
    for while_busy, asked in ((WhileBusy.QUEUED, True), (WhileBusy.REFUSED, False), (WhileBusy.KEPT, False)):
        screen = "[screen]\nprompt='^> ?(?P<draft>.*)'\nbusy=['working']\n"
        profile: Profile = read(f"{screen}[type]\ncompact='/c'\nwhile_busy='{while_busy.value}'").profile
        agent = find_agent(profile.match, os.getpid())
        why = delivery.refusal(profile, look(profile, agent, lines_shown))
        assert (why == "") is asked or "not in the foreground" in why


def test_profiles_are_no_weight_on_the_process_that_stays():
    """What the resident process imports for deliveries leaves out the command line and the emulator."""
    code = "import governor.delivery, governor.profile_file, sys; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"pyte", "typer", "rich", "wcwidth", "socket"} & set(loaded)
    assert profile_file.__name__ in loaded
