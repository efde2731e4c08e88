"""Which of an agent's options outlast a resume: those that its profile names, with their values, and no prompt."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import kept_options, profile_file, run_resume

CLAUDE = profile_file.load("claude-code").profile
NAMED = ("--verbose", "-n, --name <name>", "--add-dir, --dir <path...>", "-d, --debug [filter]", "-m <model>")
CASES = [
    ("", ""),
    ("--verbose", "--verbose"),
    ("--name x", "--name x"),
    ("--name=x", "--name=x"),
    ("-n x --name=", "-n x --name="),
    ("-nx", "-nx"),
    ("--name --verbose", "--name --verbose"),  # a value is what comes next, whatever it looks like
    ("--name", ""),  # the agent itself refuses that
    ("--verbose=1", ""),
    ("-n x fix --verbose it", "-n x --verbose"),
    ("fix it", ""),
    ("--name x --name y --verbose --verbose", "--name x --name y --verbose --verbose"),
    ("--add-dir a b --verbose c", "--add-dir a b --verbose"),
    ("--add-dir -a b", "--add-dir -a b"),
    ("--add-dir a - b --other c", "--add-dir a - b"),
    ("--dir=a b", "--dir=a"),
    ("--add-dir a --add-dir b", "--add-dir a --add-dir b"),
    ("--debug fix", "--debug"),
    ("--debug=api fix", "--debug=api"),
    ("-dapi -d fix", "-dapi -d"),
    ("--resume SID --name x", "--name x"),
    ("--unknown=--verbose", ""),
    ("--verbose -- --verbose --name x", "--verbose"),
    ("--add-dir a -- b", "--add-dir a"),
]


def kept(words, named=NAMED, program="agent"):
    return [words[place] for place in kept_options.places(named, program, words)]


@pytest.mark.parametrize(("given", "wanted"), CASES)
def test_what_is_kept(given, wanted):
    assert kept(["agent", *given.split()]) == wanted.split()


@pytest.mark.parametrize(
    ("command", "program", "wanted"),
    [
        (["/opt/bin/agent", "--verbose"], "agent", ["--verbose"]),
        (["agent", "--verbose"], "/opt/bin/agent", ["--verbose"]),
        (["nice", "-n", "5", "agent", "--verbose"], "agent", ["--verbose"]),  # nice's own -n is none of the agent's
        (["sh", "-c", "agent --verbose"], "agent", []),
        (["other", "--verbose"], "agent", []),
    ],
)
def test_only_what_follows_the_program_is_the_agents(command, program, wanted):
    assert kept(command, program=program) == wanted


@pytest.mark.parametrize(
    "option", ["", "-", "--", "verbose", "--name <x", "--name x", "--name <x> <y>", "-a,b", "--a=b", "--verbose "]
)
def test_what_is_no_option_is_told(option):
    with pytest.raises(ValueError, match=f"^{re.escape(option)}$"):
        kept_options.parse(["--fine", option])


@given(
    st.lists(st.sampled_from(["--verbose", "--name", "-n", "--dir", "-d", "--debug=x", "--", "-", "-x", "p", "q"]))
)
def test_words_come_once_in_their_order_and_are_options_or_their_values(words):
    places = kept_options.places(NAMED, "agent", ["agent", *words])
    assert places == sorted(set(places))
    again = [words[place - 1] for place in places]
    assert kept(["agent", *again]) == again  # a resumed agent that is resumed once more


CLAUDES = [
    "--model opus --dangerously-skip-permissions",
    "--model=opus (fix)",
    "(--continue) --model opus",
    "(-c -r SID --resume SID --session-id U --fork-session --from-pr 7 -p --print -w x --worktree y --tmux)",
    "(--cloud x --teleport y --bg --remote-control z --output-format json --input-format text)",
    "--allowedTools Bash Edit --disallowed-tools Web --tools Read",
    "--mcp-config a b --strict-mcp-config --add-dir c",
    "--permission-mode plan (fix --fork-session) --settings {} --append-system-prompt x",
]


@pytest.mark.parametrize("words", CLAUDES)
def test_what_claude_code_keeps_is_all_but_what_stands_in_brackets(words):
    given, wanted = re.sub(r"[()]", "", words).split(), re.sub(r"\(.*?\)", "", words).split()
    assert kept(["claude", *given], CLAUDE.session.keep_options, CLAUDE.session.resume[0]) == wanted


def test_the_place_of_the_options_takes_any_number_of_words():
    order = run_resume.Order("terminated", ["a", "{options}", "-r"], "full", ["a", "{options}", "-c", "{options}x"])
    assert order.given(["--model", "x y"]).command == ["a", "--model", "x y", "-r"]
    assert order.given([])[1:4] == (["a", "-r"], "full", ["a", "-c", "{options}x"])
