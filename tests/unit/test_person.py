"""Whoever sits before an agent: where that is, and what is shown when much is to be shown at once."""

import os
import subprocess
import sys

import pytest

from governor import person
from governor.channels.terminal import ChannelError
from governor.children import Ended
from governor.person import Person, Places
from governor.policy import SECOND

HERE = Places(controls=("/run/governor/run-1.sock",))


class Shown:
    """A person whose children are only begun, and ended by the case."""

    def __init__(self, monkeypatch, places=HERE):
        self.texts, self.notes, self.ends = [], [], []
        monkeypatch.setattr(person, "places", lambda *_: places)
        monkeypatch.setattr(person, "show", lambda _, text: self.texts.append(text) or "here")
        monkeypatch.setattr(person, "fork", lambda work, *_: work())
        self.person = Person(self._start, lambda kind, text: self.notes.append((kind, text)))
        self.person.at(1, "")

    def _start(self, make, on_end):
        make()
        self.ends.append(on_end)

    def end(self, status=0, output=b"here"):
        self.ends.pop(0)(Ended(status, output, False))


def test_one_at_a_time_and_what_came_meanwhile_together_the_newest_first(monkeypatch):
    shown = Shown(monkeypatch)
    for number in range(7):
        shown.person.show("warning", f"number {number}\x1b[2J", number)
    assert shown.texts == ["governor: number 0\\x1b[2J"]
    shown.end()
    assert [text.partition(" |")[0] for text in shown.texts[1:]] == ["governor: number 6\\x1b[2J"]
    assert shown.texts[1].count("governor: number") == 4
    shown.end(1, b"nobody is attached")
    assert len(shown.texts) == 2
    assert shown.notes == [
        ("shown", "the user was shown it here"),
        ("not_shown", "the user was not shown it: nobody is attached"),
    ]


def test_what_comes_again_and_again_is_not_shown_each_time(monkeypatch):
    shown = Shown(monkeypatch)
    for second in (100, 101, 109, 111):
        shown.person.show("oom_kills", "killed", second * SECOND)
        shown.person.show("warning", "soon", second * SECOND)
        while shown.ends:
            shown.end()
    assert sum("killed" in text for text in shown.texts) == 2
    assert sum("soon" in text for text in shown.texts) == 4


def test_where_nobody_is_nothing_is_begun(monkeypatch):
    shown = Shown(monkeypatch, Places())
    shown.person.show("warning", "x", 1)
    assert (shown.texts, shown.notes) == ([], [])


STRANGE = [
    ({}, ""),
    ({"TMUX": "/tmp/x,1,0"}, ""),
    ({"TMUX": "relative,1,0", "TMUX_PANE": "%1"}, ""),
    ({"TMUX": "/tmp/x,1,0", "TMUX_PANE": "%1;kill-server"}, ""),
    ({"TMUX": "/tmp/x,1,0", "TMUX_PANE": "%12"}, "/tmp/x"),
]


@pytest.mark.parametrize(("environment", "socket"), STRANGE)
def test_what_an_environment_says_of_tmux_is_taken_only_if_it_is_that(environment, socket):
    wanted = {"PATH": os.environ["PATH"], **environment}
    code = "print(flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=wanted
    )
    process.stdout.readline()
    try:
        found = person.places(process.pid)
        assert found.socket == socket
        assert person.places(process.pid, "tmux:/tmp/y:session").pane == "session"
    finally:
        process.communicate(b"\n")
    assert person.places(process.pid) == Places()


def test_where_nothing_takes_it_each_says_why():
    with pytest.raises(ChannelError, match="cannot ask governor run at /nowhere"):
        person.show(Places(controls=("/nowhere",)), "x")
