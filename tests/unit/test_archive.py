"""Archives: what goes in, what never does, what comes out."""

import os
import pwd
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import archive
from governor.children import fork
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


def test_of_more_files_than_an_archive_holds_the_newest_are_in_it(tmp_path, home):
    many = [home / f"{number:05}.jsonl" for number in range(10_300)]
    for number, path in enumerate(many):
        path.touch()
        os.utime(path, (number, number))
    os.utime(many[10_150], (1 << 30, 1 << 30))
    where, full = write(tmp_path, home, "~/*.jsonl")
    assert (len(full.files), full.left_out, full.complete) == (10_100, 10_303 - 10_100, False)
    paths = [entry.path for entry in full.files]
    assert set(paths) >= {str(path) for path in (many[0], many[10_150], *many[-90:])}
    assert all("10000 files" in why for why in full.skipped.values()) and len(full.skipped) == full.left_out
    assert archive.verify(where, full.name) == full
    patterns = [parse_pattern("~/*.jsonl", str(home))]
    delta = archive.write(where, patterns, "a test", "t", {}, 1 << 30, since=full)
    assert (delta.base, delta.left_out) == (full.name, 0)
    assert {entry.path for entry in (*full.files, *delta.files)} == {str(path) for path in home.glob("*.jsonl")}


def test_files_without_number_and_with_long_names_take_little_memory(tmp_path):
    directory = os.open(tmp_path, os.O_RDONLY)
    for _ in range(14):
        os.mkdir("d" * 240, dir_fd=directory)
        outer, directory = directory, os.open("d" * 240, os.O_RDONLY, dir_fd=directory)
        os.close(outer)
    for number in range(20_000):
        os.close(os.open(f"{'f' * 225}{number:06}.jsonl", os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    where = tmp_path / "archives"

    def work():
        archive.write(where, [parse_pattern(f"{tmp_path}/**/*.jsonl", "/")], "a test", "t", {}, 1 << 30)
        return Path("/proc/self/status").read_bytes()

    status = of_a_fork(work).decode()
    before_kib, most_kib = (
        int(re.search(rf"{name}:\s*(\d+)", text)[1])
        for name, text in (("VmRSS", Path("/proc/self/status").read_text()), ("VmHWM", status))
    )
    assert most_kib - before_kib < 64 << 10
    (name,) = archive.names(where)
    made = archive.read_manifest(where, name)
    assert made.left_out == 20_000 - len(made.files) and 500 < len(made.files) < 1000
    assert (where / name / MANIFEST_NAME).stat().st_size < 8 << 20


def test_a_directory_of_more_names_than_there_is_memory_for_is_left(tmp_path, home):
    (home / "many").mkdir()
    for number in range(40_000):
        (home / "many" / f"{number:0240}.jsonl").touch()
    ask = f"""
from pathlib import Path
from governor import archive, archiving
from governor.session_files import find, parse_pattern
archiving._SEARCH_BYTES = 8 << 20  # as if there were ten times as many
patterns = [parse_pattern(glob, "{home}") for glob in ("~/a.jsonl", "~/many/*", "~/deep/**/*.jsonl")]
matches = lambda: archiving.in_little_memory(find(patterns))
made = archive.write(Path("{tmp_path}/archives"), [], "a test", "t", {{}}, 1 << 30, matches=matches)
kept = [str(number) for number in range(300_000)]  # the bound was the search's
print((len(made.files), made.skipped, made.complete))
"""
    told = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
    cut_short = {"/": "the search was cut short: there are too many names"}
    assert told.stdout == f"{(1, cut_short, False)}\n", told.stderr


def of_a_fork(work):
    """What `work` returns in a child."""
    child = fork(work, time.monotonic_ns() + 60 * 10**9, "a test")
    while child.drain():
        time.sleep(0.01)
    assert child.end() == 0, child.output
    return child.output


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


@pytest.mark.parametrize("first", ["x.jsonl", "x.jsonl/y.jsonl"])
def test_a_file_that_became_a_directory_or_was_one_is_restored_as_it_was_last(tmp_path, home, first):
    last = {"x.jsonl": "x.jsonl/y.jsonl", "x.jsonl/y.jsonl": "x.jsonl"}[first]
    (home / first).parent.mkdir(exist_ok=True)
    (home / first).write_bytes(b"first")
    where, full = write(tmp_path, home)
    shutil.rmtree(home / "x.jsonl") if (home / "x.jsonl").is_dir() else (home / first).unlink()
    (home / last).parent.mkdir(exist_ok=True)
    (home / last).write_bytes(b"last")
    patterns = [parse_pattern("~/**/*.jsonl", str(home))]
    delta = archive.write(where, patterns, "a test", "t", {}, 1 << 30, since=full)
    assert delta.base == full.name
    out = tmp_path / "out"
    written = archive.restore(where, delta.name, out)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == written
    restored = out / home.relative_to("/")
    assert (restored / last).read_bytes() == b"last"
    assert (restored / "a.jsonl").read_bytes() == b"one\n"


@pytest.mark.parametrize("name", ["", "a.jsonl"])
def test_what_cannot_be_replaced_is_said_before_anything_is_written(tmp_path, home, name):
    where, manifest = write(tmp_path, home)
    inside = tmp_path / "out" / home.relative_to("/")
    (inside / name).mkdir(parents=True) if name else inside.parent.mkdir(parents=True)
    if not name:
        inside.touch()
    before = sorted((tmp_path / "out").rglob("*"))
    with pytest.raises(archive.ArchiveError, match="directory"):
        archive.restore(where, manifest.name, tmp_path / "out", overwrite=True)
    assert sorted((tmp_path / "out").rglob("*")) == before


def test_a_part_that_is_no_file_or_far_too_large_is_said(tmp_path, home):
    where, manifest = write(tmp_path, home)
    stream = where / manifest.name / TAR_NAME
    stream.unlink()
    os.mkfifo(stream)
    with pytest.raises(archive.ArchiveError, match="Not a regular file"):
        archive.verify(where, manifest.name)
    os.truncate(where / manifest.name / MANIFEST_NAME, 3 << 30)
    with pytest.raises(archive.ArchiveError, match="larger than 16 MiB"):
        archive.verify(where, manifest.name)


def test_a_full_or_forbidden_place_is_said_and_leaves_nothing(tmp_path, home):
    (tmp_path / "archives").write_bytes(b"a file")
    with pytest.raises(archive.ArchiveError, match="cannot write an archive to"):
        write(tmp_path, home)


@pytest.fixture
def small_disk(tmp_path):
    """Of 8 MiB, half of it taken: 3.6 MiB are left that an archive may have."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", place]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounts nothing here")
    (place / "taken").write_bytes(b"x" * (4 << 20))
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_file_system_is_never_filled_up(tmp_path, home, small_disk):
    for name in ("x1.jsonl", "x2.jsonl"):
        (home / name).write_bytes(os.urandom(3 << 20))
    patterns = [parse_pattern("~/**/*.jsonl", str(home))]
    made = archive.write(small_disk, patterns, "a test", "t", {}, 1 << 30, fallbacks=[tmp_path / "roomy"])
    why = "less than 5 % or 4 GiB of the file system would be left free"
    assert made.facts["fallback"]["refused"] == {str(small_disk): why} and made.complete
    made = archive.write(small_disk, patterns, "a test", "t", {}, 1 << 30)
    assert made.skipped == {f"{home}/x2.jsonl": f"{3 << 20} bytes: {why}"} and (made.left_out, made.complete) == (
        1,
        False,
    )
    assert archive.verify(small_disk, made.name) == made and len(made.files) == 5
    with pytest.raises(archive.ArchiveError, match="less than 5 %"):
        archive.write(small_disk, [parse_pattern("~/x*.jsonl", str(home))], "a test", "t", {}, 1 << 30)
    assert {path.name for path in small_disk.iterdir()} == {"taken", made.name}


def test_where_no_place_has_room_for_all_the_roomiest_takes_what_fits(tmp_path, home, small_disk):
    for name in ("x1.jsonl", "x2.jsonl"):
        (home / name).write_bytes(os.urandom(3 << 20))
    tighter = tmp_path / "tighter"
    tighter.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tighter], check=True)
    try:
        patterns = [parse_pattern("~/**/*.jsonl", str(home))]
        made = archive.write(small_disk, patterns, "a test", "t", {}, 1 << 30, fallbacks=[tighter])
        assert list(made.facts["fallback"]["refused"]) == [str(tighter)] and list(made.skipped) == [
            f"{home}/x2.jsonl"
        ]
        assert archive.verify(small_disk, made.name) == made and not list(tighter.iterdir())
    finally:
        subprocess.run(["umount", tighter], check=True)


def test_a_file_system_without_a_limit_has_room(tmp_path, home):
    (tmp_path / "endless").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=0", "none", tmp_path / "endless"]).returncode:
        pytest.skip("mounts nothing here")
    try:
        made = archive.write(
            tmp_path / "endless", [parse_pattern("~/a.jsonl", str(home))], "a test", "t", {}, 1 << 30
        )
        assert made.complete and len(made.files) == 1
    finally:
        subprocess.run(["umount", tmp_path / "endless"], check=True)


def test_a_small_session_is_saved_however_full_the_file_system_is(home, small_disk):
    (small_disk / "more").write_bytes(b"x" * (3700 << 10))  # 396 KiB are left, less than 5 %
    patterns = [parse_pattern("~/a.jsonl", str(home))]
    made = archive.write(small_disk, patterns, "a test", "t", {}, 1 << 30)
    assert made.complete and archive.verify(small_disk, made.name) == made and len(made.files) == 1
    (home / "large.jsonl").write_bytes(os.urandom(40 << 10))
    with pytest.raises(archive.ArchiveError, match="less than 5 %"):
        archive.write(small_disk, [parse_pattern("~/large.jsonl", str(home))], "a test", "t", {}, 1 << 30)


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
