"""The termination log of a container that may have put anything in its place."""

import os
import subprocess

import pytest

from governor.actions import termination_log


@pytest.fixture
def root(tmp_path):
    (tmp_path / "root" / "dev").mkdir(parents=True)
    return tmp_path / "root"


@pytest.fixture
def log(root):
    path = root / "dev" / "termination-log"
    path.write_text("what was there before, and is longer")
    return path


def test_the_reason_replaces_what_was_there(root, log):
    assert termination_log.write_below(str(root), "97 % of 256 MiB")
    assert log.read_text() == "97 % of 256 MiB\n"


@pytest.mark.parametrize("reason", ["x" * 10_000, "ü" * 3000, "漢" * 3000, "a" + "漢" * 3000])
def test_it_is_one_line_that_kubernetes_reads_whole(root, log, reason):
    assert termination_log.write_below(str(root), reason)
    data = log.read_bytes()
    assert 4096 - 4 <= len(data) <= 4096
    assert reason.startswith(data.decode().removesuffix("\n"))


def test_nothing_in_it_steers_a_terminal(root, log):
    assert termination_log.write_below(str(root), "two\nlines \x1b[2J \ud800")
    assert log.read_text() == "two\\nlines \\x1b[2J \\ud800\n"


def test_without_such_a_file_nothing_is_made(root):
    assert not termination_log.write_below(str(root), "reason")
    assert list((root / "dev").iterdir()) == []


@pytest.mark.parametrize("which", ["file", "directory"])
def test_a_link_leads_nowhere(root, tmp_path, which):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "termination-log").write_text("precious")
    if which == "file":
        (root / "dev" / "termination-log").symlink_to(outside / "termination-log")
        with pytest.raises(OSError, match="a symbolic link"):
            termination_log.write_below(str(root), "reason")
    else:
        (root / "dev").rmdir()
        (root / "dev").symlink_to(outside)
        assert not termination_log.write_below(str(root), "reason")
    assert (outside / "termination-log").read_text() == "precious"


@pytest.mark.parametrize("kind", ["fifo", "directory", "device"])
def test_only_a_regular_file_is_opened(root, kind):
    path = root / "dev" / "termination-log"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    else:
        try:
            os.mknod(path, 0o20600, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("making a device needs root")
    with pytest.raises(OSError, match="a directory" if kind == "directory" else "not a regular file"):
        termination_log.write_below(str(root), "reason")


def test_an_agent_that_is_gone_has_none():
    ended = subprocess.Popen(["true"])
    ended.wait()
    assert not termination_log.write("reason", ended.pid)


def test_no_descriptor_is_left_open(root, log):
    before = len(os.listdir("/proc/self/fd"))
    termination_log.write_below(str(root), "reason")
    log.unlink()
    termination_log.write_below(str(root), "reason")
    assert len(os.listdir("/proc/self/fd")) == before
