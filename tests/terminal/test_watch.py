"""`governor watch` at a real terminal: keys, sizes, Ctrl-Z, terminals that can do little; on plain files."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.screen import Screen
from tests.unit.watch_fixture import make_memcg
from tests.waiting import wait_for

PROGRAM = """
import sys
from governor import cgroup, instance, status_cli
cgroup.ROOT, cgroup.ROOT_V1 = sys.argv[1], "/nowhere"
status_cli.sockets = lambda: []
sys.argv[1:] = sys.argv[2:]
from governor.cli import main
main()
"""


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "sys" / "fs" / "cgroup"
    for name, usage_mib in (("agent", 100), ("cron", 20), ("mail", 40)):
        make_memcg(root / "system.slice" / f"{name}.service", usage_mib, pids=[os.getpid()])
    return root


@pytest.fixture
def screen(tmp_path, root):
    opened = []

    def open_screen(*words, **options):
        command = [sys.executable, "-c", PROGRAM, root, "watch", *words]
        opened.append(Screen(tmp_path, command, PYTHONPATH=os.getcwd(), **options))
        return opened[-1]

    yield open_screen
    for one in opened:
        one.close()


def chosen(screen):
    return next((line.split()[1] for line in screen.text().splitlines() if line.startswith("▶")), "")


def test_keys(screen, root):
    shown = screen("--source", "poll")
    text = shown.shows("all memcgs: 3", "agent.service", "by usage")
    assert [line.split()[-6] for line in text.splitlines() if ".service" in line] == [
        *("agent.service", "mail.service", "cron.service")
    ]
    shown.keys("Down")
    wait_for(lambda: chosen(shown) == "mail.service")
    shown.keys("Enter")
    shown.shows("mail.service by", "unreclaimable 30.0 of 128.0 MiB", "b back")
    shown.keys("Space")
    held = shown.shows("HELD")
    time.sleep(2.2)
    assert shown.text() == held
    shown.keys("Escape")
    shown.shows("all memcgs: 3")
    shown.keys("s", "s", "s")
    shown.shows("by name")
    shown.keys("q")
    shown.shows("ended with 0")


def test_it_is_drawn_anew_when_the_window_changes(screen):
    shown = screen("agent", "--source", "poll")
    shown.shows("agent.service by poll")
    shown.resize(40, 12)
    wait_for(lambda: "q quit" in shown.text().splitlines()[11])
    assert max(map(len, shown.text().splitlines())) <= 40
    shown.resize(120, 30)
    wait_for(lambda: "q quit" in shown.text().splitlines()[29])


def test_one_that_is_gone_leaves_its_log_and_its_successor_is_followed(screen, root):
    shown = screen("agent", "--source", "poll")
    shown.shows("agent.service by poll", "unreclaimable 90.0 of 128.0 MiB")
    one = root / "system.slice" / "agent.service"
    for name in ("memory.stat", "memory.current"):
        (one / name).write_text("")  # as unreadable as those of one that is gone
    one.rename(one.with_name("before"))
    shown.shows("the memcg is gone", "source: poll", "gone: the memcg is gone")
    make_memcg(one, 60)
    text = shown.shows("unreclaimable 50.0 of 128.0 MiB", "gone: the memcg is gone")
    assert text.count("source: poll") == 2


def test_ctrl_z_gives_the_terminal_back_and_fg_takes_it_again(screen):
    shown = screen("agent", "--source", "poll", shell=True)
    shown.shows("agent.service by poll")
    shown.keys("C-z")
    shown.shows("Stopped")
    shown.keys("stty -a | grep -wo -e '-icanon' -e icanon", "Enter")
    wait_for(lambda: "\nicanon" in shown.text() or "\n icanon" in shown.text())
    shown.keys("fg", "Enter")
    shown.shows("agent.service by poll")
    assert "Stopped" not in shown.text()
    shown.keys("C-c")
    shown.shows("watched for", "crossings upwards", "$")
    shown.keys("echo status $?", "Enter")
    shown.shows("status 0")


def test_ctrl_z_where_nobody_could_wake_it_stops_nothing(screen):
    shown = screen("agent", "--source", "poll")
    shown.shows("agent.service by poll")
    shown.keys("C-z")
    shown.keys("Space")
    shown.shows("HELD")


@pytest.mark.parametrize(
    ("options", "environment"), [([], {"TERM": "dumb"}), (["--plain"], {})], ids=["dumb", "--plain"]
)
def test_lines_where_no_picture_can_be(screen, options, environment):
    shown = screen("agent", "--source", "poll", "--for", "1.5", *options, **environment)
    text = shown.shows("ended with 0")
    assert len(re.findall(r"^\d\d:\d\d:\d\d {2}unreclaimable", text, re.MULTILINE)) == 2


def written(root, environment, *words):
    """Everything that is written to a terminal until it is ended."""
    command = [sys.executable, "-c", PROGRAM, root, "watch", "agent", "--source", "poll", "--for", "1.5", *words]
    line = " ".join(f"'{word}'" if "\n" not in str(word) else '"$PROGRAM"' for word in command)
    done = subprocess.run(
        ["script", "-qec", line, "/dev/null"],
        capture_output=True,
        env={**os.environ, "TERM": "xterm-256color", "PROGRAM": PROGRAM, "PYTHONPATH": os.getcwd(), **environment},
        timeout=60,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout.decode()


def test_colours_only_where_they_are_wanted(root):
    coloured = re.compile(r"\x1b\[[\d;]*3[0-7]")
    assert coloured.search(written(root, {}))
    assert not coloured.search(written(root, {"NO_COLOR": "1"}))


def test_ascii(root):
    text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", written(root, {}, "--ascii"))
    assert "#" * 20 in text
    assert text.isascii()


def test_it_ends_with_its_terminal(screen):
    shown = screen("agent", "--source", "poll")
    shown.shows("agent.service by poll")
    [pid] = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(shown.pid)], text=True).split()]
    shown.close()
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"), 10)


def test_the_terminal_is_given_back_when_it_is_told_to_end(screen):
    shown = screen("agent", "--source", "poll")
    shown.shows("agent.service by poll")
    [pid] = [int(pid) for pid in subprocess.check_output(["pgrep", "-P", str(shown.pid)], text=True).split()]
    os.kill(pid, signal.SIGTERM)
    text = shown.shows("watched for", "ended with 0")
    assert "unreclaimable" not in text
