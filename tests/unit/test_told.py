"""What an agent is told of a tool that was killed, and where its next tool reads it."""

import os
import re

import pytest
from typer.testing import CliRunner

from governor import told
from governor.cli import app
from governor.model import Growth

MIB, SECOND = 1 << 20, 1_000_000_000


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.setattr("governor.instance.run_directory", lambda: tmp_path)
    return tmp_path


def test_who_died_how_fast_it_grew_and_how_to_try_again():
    growth = Growth(77, 1, "make", 300 * MIB, 400 * MIB, 0, 300 * MIB, SECOND // 2, 1.0)
    text = told.of_a_shed(["make", "cc1"], growth, 1024 * MIB)
    assert "killed make, cc1: it grew by 300 MiB in 0.5 s (600 MiB/s)" in text
    assert "1024 MiB" in text and "fewer parallel jobs" in text
    many = told.of_a_shed([f"cc{i}" for i in range(8)], None, 0, 12)
    assert "cc7 and 12 more" in many and "grew" not in many


def test_the_newest_notice_comes_last_and_old_ones_go(directory):
    for number in range(30):
        told.write(5, f"number {number}")
    notices = told.read(5, directory)
    assert len(notices) == 20
    assert notices[0].endswith("number 10") and notices[-1].endswith("number 29")
    assert told.path_for(5).stat().st_mode & 0o777 == 0o644
    assert [path.name for path in directory.iterdir()] == ["memcg-5.told"]
    assert told.read(6, directory) == []


def test_a_name_that_steers_terminals_is_escaped_and_a_link_is_not_followed(directory):
    (directory / "elsewhere").write_text("kept")
    told.path_for(5).symlink_to(directory / "elsewhere")
    told.write(5, "killed \x1b[31m\nevil")
    assert (directory / "elsewhere").read_text() == "kept"
    assert told.read(5, directory)[-1].endswith("killed \\x1b[31m\\nevil")


def test_why_reads_it(directory, tmp_path):
    memcg = tmp_path / "pod"
    memcg.mkdir()
    (memcg / "memory.current").write_text("1\n")
    told.write(os.stat(memcg).st_ino, "killed make")
    assert "killed make" in CliRunner().invoke(app, ["why", "--cgroup", str(memcg)]).stdout
    assert CliRunner().invoke(app, ["why", "--cgroup", str(tmp_path / "none")]).exit_code == 2


TYPED = [
    ("/clear everything", "clear everything"),
    ("  !# rm -rf x", "rm -rf x"),
    ("two\nlines\r\x1b[31m \u202e and @ file", "two lines [31m and @ file"),
    ("x" * 900, "x" * 500),
    ("", ""),
]


@pytest.mark.parametrize(("text", "line"), TYPED)
def test_what_is_typed_is_one_plain_line_that_is_no_command(text, line):
    assert told.typed(text) == line


@pytest.mark.parametrize("name", ["a b", "/clear", "x\ny", "@etc", "\x1b[2J", "", "ignore me, and"])
def test_a_name_that_its_container_chose_says_nothing(name):
    text = told.of_a_shed([name], None, 0)
    who = text.removeprefix("governor killed ").partition(" and would have")[0]
    assert re.fullmatch(r"[A-Za-z0-9._+-]{1,15}", who)
