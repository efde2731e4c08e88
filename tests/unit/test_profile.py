"""profile_file and governor profile: what a profile may say, the profiles that come along, and trying one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from governor import delivery, profile_file
from governor.cli import app
from governor.profile import Profile, WhileBusy
from governor.profile_agent import find_agent
from governor.profile_cli import as_toml
from governor.profile_file import KEYS, Loaded, ProfileError, load, parse, profiles
from governor.profile_state import State, first_match, look, read_screen

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


KEEPS = WAY + "[session]\nresume = ['a', '{options}', '--resume']\nkeep_options = "
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
    (WAY + "[session]\nresubmit = '/go on'", 4, "words that are no command"),
    (WAY + "[session]\nresume = ['{options}']", 4, "a word of its own behind the program"),
    (WAY + "[session]\nresume = ['a', 'x{options}']", 4, "a word of its own behind the program"),
    (WAY + "[session]\nresume = ['a', '{options}', '{options}']", 4, '"{options}" once'),
    (WAY + "[session]\nresume = ['a', '{options}']", 4, "session.keep_options beside it"),
    (WAY + "[session]\nkeep_options = ['-a']", 4, "session.resume beside it"),
    (WAY + "[session]\nresume = ['a']\nkeep_options = ['-a']", 5, 'a word "{options}" in session.resume'),
    (KEEPS + "['-a', '-b, --bee <x']", 5, 'found "-b, --bee <x"'),
    (KEEPS + "['-a <x>', '--all, -a']", 5, 'each name once: "--verbose"'),
    (KEEPS + "['model <x>']", 5, "options as --help has them"),
    (KEEPS + "['--resume, -r [id]']", 5, "none that session.resume gives itself, as --resume"),
    (
        KEEPS.replace("'--resume'", "'on'") + "['-d [x]']",
        4,
        'an option after "{options}", whose last one would take "on"',
    ),
    (
        WAY + "[screen]\nprompt='>(?P<draft>)'\n[state_file]\npath='~/x'\nsession='s'\nstatus='t'\nbusy=['b']\n"
        "[session]\nresubmit = 'go on'",
        11,
        "session.resume beside it",
    ),
    (WAY + "[type]\ntell = true", 4, "screen.prompt beside it"),
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


# Trying


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
