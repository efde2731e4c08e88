"""Archives: what goes in, what never does, what comes out."""

import os
import pwd
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import archive
from governor.manifest import MANIFEST_NAME, TAR_NAME
from governor.session_files import find, home_of, parse_pattern
from tests.waiting import wait_for


@pytest.fixture
def home(tmp_path):
    files = {
        "a.jsonl": b"one\n",
        "deep/er/b.jsonl": b"two\n" * 1000,
        "deep/c.txt": b"not asked for",
        "empty.jsonl": b"",
        "name with space\nand newline.jsonl": b"odd",
    }
    for name, content in files.items():
        path = tmp_path / "home" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "home"


def write(tmp_path, home, *globs, limit_bytes=1 << 30):
    patterns = [parse_pattern(glob, str(home)) for glob in globs or ("~/**/*.jsonl",)]
    where = tmp_path / "archives"
    return where, archive.write(where, patterns, "a test", "/sys/fs/cgroup/x y", {"fact": 1}, limit_bytes)


def test_what_is_written_comes_back(tmp_path, home):
    where, manifest = write(tmp_path, home)
    assert archive.names(where) == [manifest.name]
    assert archive.verify(where, manifest.name) == manifest
    assert manifest.reason == "a test" and manifest.facts == {"fact": 1} and manifest.complete
    out = tmp_path / "out"
    written = archive.restore(where, manifest.name, out)
    assert {p.relative_to(out) for p in written} == {p.relative_to("/") for p in home.rglob("*.jsonl")}
    for path in written:
        assert path.read_bytes() == (Path("/") / path.relative_to(out)).read_bytes()


def test_only_its_owner_may_look(tmp_path, home):
    where, manifest = write(tmp_path, home)
    assert (where / manifest.name).stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (where / manifest.name).iterdir()} == {0o600}


def test_links_fifos_and_directories_lead_nowhere(tmp_path, home):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "key.jsonl").write_bytes(b"secret")
    (home / "link.jsonl").symlink_to(secret / "key.jsonl")
    (home / "linked").symlink_to(secret)
    (home / "directory.jsonl").mkdir()
    os.mkfifo(home / "fifo.jsonl")
    (home / "loop").symlink_to(home)
    where, manifest = write(tmp_path, home)
    assert not any("secret" in entry.path or "key" in entry.path for entry in manifest.files)
    assert manifest.skipped[f"{home}/link.jsonl"] == "a symbolic link"
    assert manifest.skipped[f"{home}/fifo.jsonl"] == "not a regular file"
    archive.verify(where, manifest.name)


@pytest.mark.parametrize("named", ["own", "others", "roundabout", "linked", "none", "proc"])
def test_home_is_what_the_agent_was_started_with(tmp_path, named):
    (tmp_path / "link").symlink_to("/usr")
    homes = {"own": str(tmp_path), "others": "/usr", "roundabout": "/usr/../usr", "linked": str(tmp_path / "link")}
    homes |= {"none": str(tmp_path / "none"), "proc": "/proc/self"}
    agent = subprocess.Popen(["cat"], stdin=subprocess.PIPE, env={"HOME": homes[named]})
    wait_for(lambda: Path(f"/proc/{agent.pid}/environ").read_bytes())  # Popen may return in the middle of its exec
    usual = pwd.getpwuid(os.getuid()).pw_dir
    expected = {"own": str(tmp_path), "none": usual, "proc": usual}.get(named, "/usr")
    assert home_of(agent.pid) == expected  # it could read others' just as well
    parse_pattern("~/*.jsonl", home_of(agent.pid))
    agent.communicate()
    assert home_of(agent.pid) == "/"


def test_a_file_twice_matched_is_there_once(tmp_path, home):
    os.link(home / "a.jsonl", home / "same.jsonl")
    _, manifest = write(tmp_path, home, "~/*.jsonl", "~/a*", f"{home}/a.jsonl")
    assert len([e for e in manifest.files if e.path.endswith(("/a.jsonl", "/same.jsonl"))]) == 1


def test_the_limit_leaves_out_what_is_too_large_and_says_so(tmp_path, home):
    with (home / "sparse.jsonl").open("wb") as file:
        file.truncate(1 << 40)
    where, manifest = write(tmp_path, home, limit_bytes=1 << 20)
    assert not manifest.complete
    assert "over what is left of the limit" in manifest.skipped[f"{home}/sparse.jsonl"]
    assert f"{home}/a.jsonl" in {entry.path for entry in manifest.files}
    archive.verify(where, manifest.name)


def test_a_file_that_shrinks_or_grows_meanwhile_still_verifies(tmp_path, home):
    changing = home / "a.jsonl"
    stop = threading.Event()

    def change():
        while not stop.is_set():
            changing.write_bytes(b"x" * 300_000)
            os.truncate(changing, 10)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(20):
            where, manifest = write(tmp_path, home)
            archive.verify(where, manifest.name)
    finally:
        stop.set()
        thread.join()


@pytest.mark.parametrize("file", [TAR_NAME, MANIFEST_NAME])
@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_damage_is_found(tmp_path, home, file, damage):
    where, manifest = write(tmp_path, home)
    path = where / manifest.name / file
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flip":
        at = data.index(b"sha256") + 12 if file == MANIFEST_NAME else len(data) // 2
        data[at] ^= 0x01
    else:
        data = b""
    path.write_bytes(data)
    with pytest.raises(archive.ArchiveError):
        archive.verify(where, manifest.name)
    with pytest.raises(archive.ArchiveError):
        archive.restore(where, manifest.name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_restore_replaces_only_when_asked(tmp_path, home):
    where, manifest = write(tmp_path, home)
    out = tmp_path / "out"
    (written, *_) = archive.restore(where, manifest.name, out)
    written.write_bytes(b"newer")
    with pytest.raises(archive.ArchiveError, match="is there already"):
        archive.restore(where, manifest.name, out)
    assert written.read_bytes() == b"newer"
    archive.restore(where, manifest.name, out, overwrite=True)
    assert written.read_bytes() != b"newer"


def test_restore_does_not_leave_its_directory_by_a_link(tmp_path, home):
    where, manifest = write(tmp_path, home)
    out, outside = tmp_path / "out", tmp_path / "outside"
    out.mkdir()
    outside.mkdir()
    (out / tmp_path.parts[1]).symlink_to(outside)
    with pytest.raises(archive.ArchiveError, match="lead out of"):
        archive.restore(where, manifest.name, out)
    assert list(outside.iterdir()) == []


def test_a_full_or_forbidden_place_is_said_and_leaves_nothing(tmp_path, home):
    (tmp_path / "archives").write_bytes(b"a file")
    with pytest.raises(archive.ArchiveError, match="cannot write an archive to"):
        write(tmp_path, home)


def test_an_unfinished_archive_is_not_listed(tmp_path, home):
    where, manifest = write(tmp_path, home)
    (where / ".building-x").mkdir()
    (where / ".building-x" / MANIFEST_NAME).write_bytes(b"{}")
    assert archive.names(where) == [manifest.name]


@pytest.mark.parametrize("name", ["none", "../home", ".building-x", ""])
def test_an_unknown_archive_is_said(tmp_path, home, name):
    where, _ = write(tmp_path, home)
    with pytest.raises(archive.ArchiveError, match="found no archive"):
        archive.read_manifest(where, name)


@pytest.mark.parametrize("glob", ["relative/*", "", "~user/*", "/a/../b/*"])
def test_a_pattern_that_cannot_be_is_refused(glob):
    with pytest.raises(ValueError, match="found archive pattern"):
        parse_pattern(glob, "/home/x")


@given(st.text(alphabet="abc/*?[].~", max_size=12))
def test_any_pattern_is_parsed_or_refused(glob):
    try:
        pattern = parse_pattern("/" + glob, "/home/x")
    except ValueError:
        return
    assert pattern.fixed.startswith("/")


def test_a_pattern_without_wildcards_names_a_file(home):
    (found,) = find([parse_pattern("~/a.jsonl", str(home))])
    assert found.path == f"{home}/a.jsonl"
    os.close(found.fd)


def test_a_home_that_becomes_a_link_leads_nowhere(tmp_path, home):
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key.jsonl").write_bytes(b"secret")
    (home / "later").mkdir()
    (home / "later" / "own.jsonl").write_bytes(b"own")
    pattern = parse_pattern("~/later/*.jsonl", str(home))
    (home / "later" / "own.jsonl").unlink()
    (home / "later").rmdir()
    (home / "later").symlink_to(tmp_path / "secret")
    assert list(find([pattern])) == []
    assert list(find([parse_pattern("~/later/*.jsonl", str(home))])) == []


def test_a_name_that_is_not_text_is_archived_and_restored(tmp_path, home):
    with open(os.fsencode(home) + b"/\xff.jsonl", "wb") as odd:
        odd.write(b"odd bytes")
    where, manifest = write(tmp_path, home)
    assert f"{home}/\\xff.jsonl" in {entry.path for entry in manifest.files}
    written = archive.restore(where, manifest.name, tmp_path / "out")
    assert b"odd bytes" in [path.read_bytes() for path in written]


def test_holes_do_not_crowd_out_the_session(tmp_path, home):
    with (home / "0.jsonl").open("wb") as file:
        file.truncate(400 << 20)
    _, manifest = write(tmp_path, home)
    assert "holes" in manifest.skipped[f"{home}/0.jsonl"]
    assert not manifest.complete


def test_what_a_killed_archive_left_is_swept(tmp_path, home):
    where, _ = write(tmp_path, home)
    old = where / ".building-old"
    old.mkdir()
    os.utime(old, (0, 0))
    (where / ".building-now").mkdir()
    write(tmp_path, home)
    assert not old.exists() and (where / ".building-now").exists()
