"""The spool among other users: what it uses, what it removes, and what it never touches."""

import fcntl
import os
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent import spool
from governor.agent.spool import Spool, SpoolError, sweep

OURS = f"governor-agent-{os.geteuid()}"
OLD_S = 2 * spool.STALE_S


def name(number=0):
    return f"spool-{number:016x}"


def age(path, seconds=OLD_S):
    at = time.time() - seconds
    os.utime(path, (at, at), follow_symlinks=False)


def test_written_read_and_gone(tmp_path):
    with Spool(directory=tmp_path) as one:
        one.write(b"abc")
        one.write(b"defg")
        assert (one.read(3, 2), one.size_bytes) == (b"cde", 7)
        assert stat.S_IMODE(one.path.stat().st_mode) == 0o600
        assert stat.S_IMODE(one.path.parent.stat().st_mode) == 0o700
    assert list((tmp_path / OURS).iterdir()) == []
    one.close()  # once more is nothing


def test_what_a_killed_process_left(tmp_path):
    """Not while it lives, however old; when it is old, once it is dead."""
    code = "import sys, time; from governor.agent.spool import Spool\n"
    code += "s = Spool(directory=sys.argv[1]); s.write(b'x'); print(s.path, flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    path = Path(child.stdout.readline().strip())
    age(path)
    assert sweep(tmp_path) == []
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    os.utime(path)
    assert sweep(tmp_path) == []
    age(path)
    with Spool(directory=tmp_path) as another:
        assert list(path.parent.iterdir()) == [another.path]


SQUATTED = {
    "another user's": lambda path: (path.mkdir(mode=0o700), os.chown(path, 12345, 12345)),
    "open to others": lambda path: (path.mkdir(), path.chmod(0o777)),
    "a link": lambda path: path.symlink_to("/etc"),
    "a file": lambda path: path.touch(),
}


@pytest.mark.parametrize("how", SQUATTED)
def test_a_directory_that_is_not_ours_is_not_used(tmp_path, monkeypatch, how):
    if how == "another user's" and os.geteuid():
        pytest.skip("only root can make another user's directory")
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    SQUATTED[how](first / OURS)
    with pytest.raises(SpoolError, match="name another with directory= or TMPDIR"):
        Spool(directory=first)
    monkeypatch.setattr(spool, "_bases", lambda: [first, second])
    with Spool() as one:
        assert one.path.parent == second / OURS


def test_a_disk_before_memory(tmp_path, monkeypatch, caplog):
    mounts = tmp_path / "mountinfo"
    real = Path("/dev/shm")
    device = real.stat().st_dev
    odd = b"29 1 7:0 / /mnt/\xff\xc2\x85 rw - ext4 /dev/loop0 rw\n"  # no UTF-8; what str.splitlines() splits at
    mounts.write_bytes(odd + f"30 1 {os.major(device)}:{os.minor(device)} / /dev/shm rw - tmpfs tmpfs rw\n".encode())
    monkeypatch.setattr(spool, "_MOUNTS", mounts)
    monkeypatch.setenv("TMPDIR", str(real))
    assert spool._bases()[-1] == real
    monkeypatch.setattr(spool, "_bases", lambda: [real])
    try:
        Spool().close()
    finally:
        (real / OURS).rmdir()
    assert "is memory (tmpfs)" in caplog.text


# What may lie there, and whether it goes. Each gets a directory and its name.


def a_stale_file(directory, named):
    (directory / named).write_bytes(b"x" * 100)
    age(directory / named)


def a_young_file(directory, named):
    a_stale_file(directory, named)
    age(directory / named, 10)


def from_the_future(directory, named):
    a_stale_file(directory, named)
    age(directory / named, -OLD_S)


def a_link_to_a_file(directory, named):
    (directory / named).symlink_to("../precious")
    age(directory / named)


def a_link_to_nowhere(directory, named):
    (directory / named).symlink_to("/nowhere")
    age(directory / named)


def a_second_name(directory, named):
    os.link(directory.parent / "precious", directory / named)


def a_directory(directory, named):
    (directory / named).mkdir()
    (directory / named / "inner").touch()
    age(directory / named)


def a_fifo(directory, named):
    os.mkfifo(directory / named)
    age(directory / named)


KINDS = {
    a_stale_file: True,
    a_young_file: False,
    from_the_future: False,
    a_link_to_a_file: False,
    a_link_to_nowhere: False,
    a_second_name: False,
    a_directory: False,
    a_fifo: False,
}
hostile_names = st.sampled_from(
    ["spool-", "spool-..", "spool-0123456789ABCDEF", "spool-0123456789abcdef\n", "spool-0123456789abcdef.bak", "-rf"]
) | st.text(st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda text: text not in (".", "..") and len(text.encode()) < 200
)


@given(
    made=st.lists(st.tuples(st.sampled_from(list(KINDS)), st.none() | hostile_names), max_size=12),
    locked=st.sets(st.integers(0, 11)),
)
def test_only_what_is_ours_old_and_nobodys_goes(tmp_path_factory, made, locked):
    base = tmp_path_factory.mktemp("spools")
    directory = base / OURS
    directory.mkdir(mode=0o700)
    precious = base / "precious"
    precious.write_bytes(b"precious")
    age(precious)
    expected, used, locks = set(), set(), []
    for number, (kind, hostile) in enumerate(made):
        named = hostile or name(number)
        if named in used:
            continue
        used.add(named)
        kind(directory, named)
        is_locked = number in locked and kind is a_stale_file
        if is_locked:
            locks.append((directory / named).open())
            fcntl.flock(locks[-1], fcntl.LOCK_EX)
        if KINDS[kind] and not hostile and not is_locked:
            expected.add(named)
    assert set(sweep(base)) == expected
    assert {path.name for path in directory.iterdir()} == used - expected
    assert precious.read_bytes() == b"precious"
    for each in locks:
        each.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_another_users_file_stays(tmp_path):
    (tmp_path / OURS).mkdir(mode=0o700)
    a_stale_file(tmp_path / OURS, name())
    os.chown(tmp_path / OURS / name(), 12345, 12345)
    assert sweep(tmp_path) == []


def test_a_name_that_becomes_another_file_meanwhile(tmp_path, monkeypatch):
    """Between the look and the removal: the new one stays."""
    (tmp_path / OURS).mkdir(mode=0o700)
    path = tmp_path / OURS / name()
    a_stale_file(path.parent, path.name)
    real = fcntl.flock

    def flock(fd, how):
        path.unlink()
        path.write_bytes(b"another")
        real(fd, how)

    monkeypatch.setattr(spool.fcntl, "flock", flock)
    assert sweep(tmp_path) == []
    assert path.read_bytes() == b"another"


SWEEPER = """
import sys
from governor.agent.spool import Spool, sweep
for _ in range(150):
    with Spool(directory=sys.argv[1], stale_s=0) as one:
        one.write(b"mine")
        sweep(sys.argv[1], 0)
        assert one.read(9, 0) == b"mine" and one.path.read_bytes() == b"mine"
"""


def test_many_at_once_remove_nothing_of_each_other(tmp_path):
    children = [subprocess.Popen([sys.executable, "-c", SWEEPER, tmp_path]) for _ in range(4)]
    assert [child.wait(timeout=60) for child in children] == [0] * 4
    assert list((tmp_path / OURS).iterdir()) == []


def test_swept_between_its_making_and_its_lock(tmp_path, monkeypatch):
    real, chance = fcntl.flock, random.Random(3)

    def flock(fd, how):
        if chance.random() < 0.5:
            for path in (tmp_path / OURS).iterdir():
                path.unlink()
        real(fd, how)

    monkeypatch.setattr(spool.fcntl, "flock", flock)
    for _ in range(20):
        with Spool(directory=tmp_path) as one:
            assert one.path.exists()
