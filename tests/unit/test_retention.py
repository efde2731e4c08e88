"""Archives over time: deltas and their bases, what is removed, where else one goes, and manifests that lie."""

import hashlib
import json
import os
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from governor import archive, retention
from governor.cli import app
from governor.manifest import MANIFEST_NAME, TAR_NAME, parse_manifest
from governor.session_files import CREDENTIALS, excluded, parse_pattern

TARGET = "/sys/fs/cgroup/pod"


class Place:
    """A home with session files, and a directory of archives."""

    def __init__(self, path):
        self.home, self.archives = path / "home", path / "archives"
        self.home.mkdir()

    def file(self, name, content, age_s=60):
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        os.utime(path, ns=(0, path.stat().st_mtime_ns - age_s * 1_000_000_000))
        return path

    def write(self, **options):
        patterns = [parse_pattern("~/**/*", str(self.home))]
        options = {"target": TARGET, "directory": self.archives, **options}
        return archive.write(patterns=patterns, reason="a test", facts={"fact": 1}, limit_bytes=1 << 30, **options)

    def names(self, manifest):
        return {entry.path.removeprefix(f"{self.home}/") for entry in manifest.files}

    def restored(self, name, to):
        archive.restore(self.archives, name, to)
        below = to / str(self.home).lstrip("/")
        return {str(path.relative_to(below)): path.read_bytes() for path in below.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path):
    return Place(tmp_path)


# Deltas


def test_a_delta_holds_what_changed_and_restores_all(place, tmp_path):
    place.file("same", b"same")
    place.file("grows", b"one\n")
    place.file("deleted", b"still wanted")
    full = place.write()
    place.file("grows", b"one\ntwo\n")
    place.file("new", b"saved on SIGTERM")
    (place.home / "deleted").unlink()
    delta = place.write(since=full)
    assert delta.base == full.name and place.names(delta) == {"grows", "new"}
    assert archive.verify(place.archives, delta.name) == delta
    assert place.restored(delta.name, tmp_path / "out") == {
        "same": b"same",
        "grows": b"one\ntwo\n",
        "deleted": b"still wanted",
        "new": b"saved on SIGTERM",
    }
    assert archive.names(place.archives) == [full.name, delta.name]


@pytest.mark.parametrize("age_s", [60, 0])
def test_a_touched_file_with_the_same_content_is_left_out(place, age_s):
    path = place.file("a", b"content", age_s)
    full = place.write()
    os.utime(path)
    place.file("b", b"new")
    assert place.names(place.write(since=full)) == {"b"}


def test_where_nothing_has_changed_no_delta_is_made(place):
    place.file("a", b"content")
    full = place.write()
    assert place.write(since=full) == full
    assert [path.name for path in place.archives.iterdir()] == [full.name]


def test_a_change_of_the_same_size_is_seen_even_within_one_time_stamp(place):
    path = place.file("a", b"before", age_s=0)
    full = place.write()
    before = path.stat()
    path.write_bytes(b"after!")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert place.names(place.write(since=full)) == {"a"}


def test_a_delta_without_its_base_is_damaged_and_says_so(place, tmp_path):
    place.file("a", b"content")
    full = place.write()
    place.file("b", b"content")
    delta = place.write(since=full)
    shutil.rmtree(place.archives / full.name)
    with pytest.raises(archive.ArchiveError, match="found no archive"):
        archive.restore(place.archives, delta.name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_delta_whose_base_is_elsewhere_is_a_full_archive(place, tmp_path):
    place.file("a", b"content")
    full = place.write(directory=tmp_path / "elsewhere")
    whole = place.write(since=full)
    assert whole.base == "" and place.names(whole) == {"a"}


def test_a_delta_of_a_delta_is_refused(place):
    place.file("a", b"content")
    full = place.write()
    place.file("b", b"content")
    delta = place.write(since=full)
    with pytest.raises(ValueError, match="is a delta itself"):
        place.write(since=delta)


def test_bases_in_a_circle_end(place):
    place.file("a", b"content")
    full = place.write()
    place.file("b", b"content")
    delta = place.write(since=full)
    forge(place, full, base=delta.name)
    with pytest.raises(archive.ArchiveError, match="a base that is a delta itself"):
        archive.verify(place.archives, delta.name)


# Retention


def many(place, count):
    made = []
    for number in range(count):
        place.file("a", os.urandom(1000 + number))
        made.append(place.write())
    return made


@pytest.mark.parametrize("keep_count, left", [(10, 5), (5, 5), (3, 3), (1, 1), (0, 1)])
def test_the_oldest_go_first_and_the_newest_stays(place, keep_count, left):
    made = [manifest.name for manifest in many(place, 5)]
    assert retention.prune(place.archives, TARGET, keep_count, 1 << 30) == made[: 5 - left]
    assert archive.names(place.archives) == made[5 - left :]
    assert len(list(place.archives.iterdir())) == left


def test_bytes_are_counted_as_they_lie_on_the_disk(place):
    made = [manifest.name for manifest in many(place, 4)]
    size_bytes = sum(path.stat().st_size for path in (place.archives / made[-1]).iterdir())
    assert retention.prune(place.archives, TARGET, 100, int(2.5 * size_bytes)) == made[:2]
    assert retention.prune(place.archives, TARGET, 100, 0) == made[2:3]


def test_the_base_of_a_delta_that_stays_stays(place):
    base, lonely, _ = many(place, 3)
    place.file("new", b"new")
    delta = place.write(since=base)
    assert lonely.name in retention.prune(place.archives, TARGET, 1, 1 << 30)
    assert archive.names(place.archives) == [base.name, delta.name]
    archive.verify(place.archives, delta.name)


def container(tmp_path, pod, number):
    return f"{tmp_path}/kubepods/burstable/pod{pod}/{number:064x}"


def test_of_containers_that_are_gone_no_more_is_left_and_the_pod_with_most_goes_first(place, tmp_path):
    place.file("a", os.urandom(1 << 20))
    here = container(tmp_path, "a", 9)
    os.makedirs(here)
    quiet, there = place.write(target=container(tmp_path, "b", 0)).name, place.write(target=here).name
    loud = [place.write(target=container(tmp_path, "a", number)).name for number in range(5)]
    assert retention.prune(place.archives, here, 100, 3 << 20) == loud[:4]
    assert archive.names(place.archives) == [quiet, there, loud[4]]
    assert retention.prune(place.archives, here, 100, 0, spare=loud[4]) == [quiet]


def test_what_the_last_archive_of_a_container_that_is_gone_is_based_on_stays(place, tmp_path):
    gone = container(tmp_path, "a", 0)
    place.file("a", os.urandom(1 << 20))
    full = place.write(target=gone)
    place.file("new", b"saved on SIGTERM")
    delta = place.write(target=gone, since=full)
    other = place.write(target=container(tmp_path, "b", 0)).name
    assert retention.prune(place.archives, gone, 100, 0, spare=delta.name) == [other]
    archive.verify(place.archives, delta.name)


def test_of_a_target_and_of_who_is_gone_all_goes_at_once(place, tmp_path):
    place.file("a", os.urandom(1 << 20))
    gone = [place.write(target=container(tmp_path, "a", number)).name for number in range(2)]
    made = [manifest.name for manifest in many(place, 2)]
    assert retention.prune(place.archives, TARGET, 1, 1 << 20, spare=made[1]) == [made[0], *gone]
    assert archive.names(place.archives) == [made[1]]


def test_what_is_not_governors_or_of_another_target_stays(place, tmp_path):
    other = place.write(target="/sys/fs/cgroup/other").name
    made = [manifest.name for manifest in many(place, 4)]
    (place.archives / made[0] / "note").write_bytes(b"somebody's")
    (place.archives / made[1] / MANIFEST_NAME).write_bytes(b"{}")
    (place.archives / "mine").mkdir()
    (place.archives / "mine" / MANIFEST_NAME).write_bytes(b"{}")
    (place.archives / "link").symlink_to(place.archives / made[3])
    assert retention.prune(place.archives, TARGET, 1, 1 << 30) == [made[2]]
    assert {other, made[0], made[1], "mine", "link"} < {path.name for path in place.archives.iterdir()}


def test_nothing_to_prune(tmp_path):
    assert retention.prune(tmp_path / "none", TARGET, 1, 1) == []


# Fallbacks


def test_where_a_directory_cannot_be_written_the_next_is_used(place, tmp_path):
    place.file("a", b"content")
    (tmp_path / "taken").write_bytes(b"")
    manifest = place.write(directory=tmp_path / "taken", fallbacks=[tmp_path / "taken" / "x", place.archives])
    assert archive.names(place.archives) == [manifest.name]
    assert manifest.facts["fact"] == 1
    assert manifest.facts["fallback"]["directory"] == str(place.archives)
    assert list(manifest.facts["fallback"]["refused"]) == [str(tmp_path / "taken"), str(tmp_path / "taken" / "x")]


def test_list_says_where_else_there_are_archives(place, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    usual = tmp_path / "state" / "governor" / "archive"
    usual.parent.mkdir(parents=True)
    place.file("a", b"content")
    mine, fallen = place.write(), place.write(directory=usual)
    listed = CliRunner().invoke(app, ["archive", "list", "--archive-dir", str(place.archives)])
    assert mine.name in listed.stdout and fallen.name not in listed.stdout
    assert f"1 more in {usual}" in listed.stderr
    assert f"{mine.name}  1 file, 7 bytes" in listed.stdout
    assert CliRunner().invoke(app, ["archive", "list"]).stderr == ""


def test_where_nothing_can_be_written_all_are_named(place, tmp_path):
    (tmp_path / "taken").write_bytes(b"")
    with pytest.raises(archive.ArchiveError, match=r"taken: File exists; .*x: Not a directory"):
        place.write(directory=tmp_path / "taken", fallbacks=[tmp_path / "taken" / "x"])


# What stays out


@pytest.mark.parametrize(
    "name, out",
    [
        (".claude/.credentials.json", True),
        (".codex/auth.json", True),
        (".gemini/oauth_creds.json", True),
        ("project/.env", True),
        ("project/.ENV.local", True),
        ("keys/server.PEM", True),
        (".ssh/known_hosts", True),
        (".ssh/deep/er/file", True),
        ("mcp-oauth-tokens.json", True),
        ("access_token", True),
        (".claude/projects/-home-me-tokenizer/5f3a.jsonl", False),
        (".codex/sessions/2026/rollout-token-5f.jsonl", False),
        (".gemini/tmp/9/chats/session-2026.json", False),
        (".local/share/opencode/opencode.db-wal", False),
        (".claude/projects/environment/keys.jsonl", False),
    ],
)
def test_credentials_are_left_out_and_sessions_are_not(place, name, out):
    place.file(name, b"content")
    manifest = place.write()
    assert manifest.skipped.get(f"{place.home}/{name}") == ("excluded" if out else None)
    assert (name in place.names(manifest)) != out
    assert manifest.complete


def test_nothing_is_left_out_when_so_asked(place):
    place.file(".env", b"content")
    assert place.names(place.write(exclude=())) == {".env"}


@given(st.text(alphabet="ab/*?.", max_size=10), st.text(alphabet="ab/.", max_size=10))
def test_any_glob_is_matched_in_bounded_time(glob, path):
    assert excluded("/" + path, ("**/" + glob,)) in (True, False)
    assert excluded("/x/" + path, ("/**",))


def test_every_credential_glob_matches_at_any_depth():
    assert all(glob.startswith("**/") for glob in CREDENTIALS)


# Manifests that lie


def forge(place, manifest, **values):
    path = place.archives / manifest.name / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_bytes()) | values))


ENTRY = {"path": "/a", "size_bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    "values",
    [
        {"files": None},
        {"files": {}},
        {"files": [None]},
        {"files": [[]]},
        {"files": [{}]},
        {"files": [ENTRY | {"size_bytes": "1"}]},
        {"files": [ENTRY | {"size_bytes": True}]},
        {"files": [ENTRY | {"size_bytes": -1}]},
        {"files": [ENTRY | {"sha256": "A" * 64}]},
        {"files": [ENTRY | {"path": 5}]},
        {"files": [ENTRY | {"path": "relative"}]},
        {"files": [ENTRY | {"path": "/a/../b"}]},
        {"files": [ENTRY | {"path": "/a//b"}]},
        {"files": [ENTRY | {"path": "/"}]},
        {"files": [ENTRY | {"path": "/nul\0"}]},
        {"files": [ENTRY | {"mtime_ns": "now"}]},
        {"files": [ENTRY | {"more": 1}]},
        {"skipped": []},
        {"skipped": {"/a": 1}},
        {"facts": "none"},
        {"complete": 1},
        {"format": "1"},
        {"format": 2},
        {"format": None},
        {"created": 0},
        {"reason": None},
        {"target": []},
        {"name": "another"},
        {"name": ["x"]},
        {"base": "../x"},
        {"base": None},
        {"base": ".building-x"},
        {"more": 1},
    ],
)
def test_a_manifest_that_lies_is_said(place, tmp_path, values):
    place.file("a", b"content")
    manifest = place.write()
    forge(place, manifest, **values)
    for act in (archive.read_manifest, archive.verify):
        with pytest.raises(archive.ArchiveError):
            act(place.archives, manifest.name)
    with pytest.raises(archive.ArchiveError):
        archive.restore(place.archives, manifest.name, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"", b"null", b"[]", b"5", b"{", b"\xff", b"[" * 100_000, b'{"format": 1}'])
def test_a_manifest_that_is_none_is_said(place, data):
    place.file("a", b"content")
    manifest = place.write()
    (place.archives / manifest.name / MANIFEST_NAME).write_bytes(data)
    with pytest.raises(archive.ArchiveError, match="is damaged"):
        archive.read_manifest(place.archives, manifest.name)


words = st.text(alphabet="ab/.\0\x1b", max_size=6)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(["name", "files", "skipped", "base", "format", "complete"]), json_values))
def test_any_json_is_a_manifest_or_a_value_error(values):
    whole = {"name": "n", "created": "c", "reason": "r", "target": "t", **values}
    try:
        parsed = parse_manifest(json.dumps(whole).encode())
    except ValueError:
        return
    assert parsed.name == whole["name"] and isinstance(parsed.files, list)


def test_names_reach_a_terminal_escaped(place, tmp_path):
    place.file("a", b"content")
    manifest = place.write()
    entry = {"path": "/\x1b[2Jgone", "size_bytes": 0, "sha256": hashlib.sha256(b"").hexdigest()}
    forge(place, manifest, files=[*json.loads(archive.encode(manifest))["files"], entry])
    with pytest.raises(archive.ArchiveError) as told:
        archive.verify(place.archives, manifest.name)
    assert "lacks" in str(told.value) and "\x1b" not in str(told.value)


def test_a_path_too_long_to_be_is_said(place, tmp_path):
    place.file("a", b"content")
    manifest = place.write()
    long = {"path": "/" + "x" * 300, "size_bytes": 7, "sha256": hashlib.sha256(b"content").hexdigest()}
    repack(place.archives / manifest.name / TAR_NAME, "x" * 300, b"content")
    forge(place, manifest, files=[long])
    with pytest.raises(archive.ArchiveError, match="File name too long"):
        archive.restore(place.archives, manifest.name, tmp_path / "out")


def repack(path, name, content):
    import io
    import tarfile

    import zstandard

    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo(name)
        member.size, member.mode = len(content), 0o4755
        tar.addfile(member, io.BytesIO(content))
    path.write_bytes(zstandard.compress(plain.getvalue()))


def test_no_archive_gives_a_file_the_rights_of_its_owner(place, tmp_path):
    place.file("a", b"content")
    manifest = place.write()
    repack(place.archives / manifest.name / TAR_NAME, f"{place.home}/a".lstrip("/"), b"content")
    (written,) = archive.restore(place.archives, manifest.name, tmp_path / "out")
    assert written.stat().st_mode & 0o7777 == 0o755
