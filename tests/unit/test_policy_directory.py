"""policy_directory and the commands over it: the order, every fault of every file, and what explain says."""

import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from governor import policy_directory
from governor.cli import app
from governor.container import Container
from governor.policy_directory import PoliciesError, load, reload
from governor.policy_explain import answer, as_object, read_container
from governor.selection import ANNOTATION, choose
from governor.toml_file import FileError

AGENTS = '[select]\nnamespace = ["agents"]\n'
GENTLE = 'name = "gentle"\nextends = "cautious"\n[select]\nselectable = true\n'


@pytest.fixture
def directory(tmp_path):
    found = tmp_path / "policies"
    found.mkdir()
    (found / "20-gentle.toml").write_text(GENTLE)
    (found / "10-agents.toml").write_text(AGENTS)
    return found


def faults(directory: Path) -> list[str]:
    with pytest.raises(PoliciesError) as raised:
        load(directory)
    return [
        fault.text(Path(error.where).name)
        for error in raised.value.errors
        for fault in sorted(error.faults, key=lambda fault: fault.line)
    ]


def test_policies_come_in_the_order_of_their_files(directory):
    (directory / "05-x.toml").write_text('name = "z"\n[select]\npod = ["*"]\n')
    policies = load(directory)
    assert list(policies) == [str(directory / name) for name in ("05-x.toml", "10-agents.toml", "20-gentle.toml")]
    assert [loaded.policy.name for loaded in policies.values()] == ["z", "10-agents", "gentle"]
    assert policies[str(directory / "20-gentle.toml")].policy.compact.engage_ratio == 0.60  # of cautious


def test_what_is_no_policy_is_passed_over(directory):
    before = list(load(directory))
    for name in ("10-agents.toml~", "README", ".hidden.toml", "x.toml.bak"):
        (directory / name).write_text("?")
    (directory / "..2026").mkdir()
    assert list(load(directory)) == before


def test_a_config_map_as_kubernetes_mounts_it(tmp_path):
    (tmp_path / "..2026").mkdir()
    (tmp_path / "..2026" / "a.toml").write_text(AGENTS)
    (tmp_path / "..data").symlink_to("..2026")
    (tmp_path / "a.toml").symlink_to("..data/a.toml")
    assert [loaded.policy.name for loaded in load(tmp_path).values()] == ["a"]


def test_an_empty_directory_has_no_policies(tmp_path):
    assert load(tmp_path) == {}


FAULTS = [
    ("no keys", {"30.toml": ""}, ["30.toml: found nothing in [select], expected whom it is for, such as"]),
    ("nothing but a preset", {"30.toml": 'extends = "seed"'}, ["30.toml: found nothing in [select]"]),
    ("everybody", {"30.toml": '[select]\ncgroup = ["*"]'}, []),
    ("a name twice", {"30.toml": f"\n{GENTLE}"}, ['30.toml:2: name = "gentle": expected another name: ']),
    ("by its file", {"gentle.toml": AGENTS}, ['gentle.toml: name = "gentle": expected another name: ']),
    ("no policy", {"none.toml": AGENTS}, ['none.toml: name = "none": expected another name: to choose "none" is']),
    (
        "all of all",
        {"11.toml": "[compact]\nengage = 7\nx = 1", "30.toml": GENTLE + "cgroup = []", "31.toml": 'name = "none"'},
        [
            "11.toml:2: compact.engage = 7: expected a number",
            "11.toml:3: compact.x = 1: expected a key of [compact]",
            '30.toml:1: name = "gentle": expected another name',
            "31.toml: found nothing in [select]",
            '31.toml:1: name = "none": expected another name',
        ],
    ),
]


@pytest.mark.parametrize(("files", "said"), [case[1:] for case in FAULTS], ids=[case[0] for case in FAULTS])
def test_every_fault_of_every_file(directory, files, said):
    for name, text in files.items():
        (directory / name).write_text(text)
    if not said:
        assert len(load(directory)) == 2 + len(files)
        return
    found = faults(directory)
    assert len(found) == len(said), found
    assert all(text.startswith(begin) for text, begin in zip(found, said, strict=True)), found


def test_what_cannot_be_read_is_a_fault_beside_the_others(directory):
    (directory / "15.toml").mkdir()
    os.mkfifo(directory / "16.toml")
    (directory / "17.toml").symlink_to("nowhere")
    (directory / "18.toml").write_text("x")
    assert [text.partition(":")[0] for text in faults(directory)] == ["15.toml", "16.toml", "17.toml", "18.toml"]
    assert "expected a directory of policies" in faults(directory / "10-agents.toml")[0]
    assert "found No such file or directory" in faults(directory / "nowhere")[0]


def test_too_many_files(directory, monkeypatch):
    monkeypatch.setattr(policy_directory, "_FILES_LIMIT", 1)
    assert "found 2 policies, expected at most 1" in faults(directory)[0]


def test_a_bad_file_changes_nothing_and_a_good_one_is_told(directory):
    notes: list[tuple[str, str]] = []

    def note(kind: str, text: str, **_fields: object) -> None:
        notes.append((kind, text))

    old = load(directory)
    as_before = ("policies", f"policies were read again from {directory}: 2, as before")
    assert reload(old, directory, note) == old
    assert notes == [as_before]
    notes.clear()
    (directory / "30.toml").write_text("[compact]\nengage = 7\ndwell = 7")
    assert reload(old, directory, note) is old
    [(kind, text)] = notes
    assert kind == "policy_refused"
    assert "stay as they were" in text
    assert "compact.engage" in text
    assert "compact.dwell" in text
    (directory / "30.toml").unlink()
    assert reload(old, directory, note) == old
    assert notes[1:] == [as_before]
    (directory / "30.toml").write_text('[select]\npod = ["x"]')
    assert [loaded.policy.name for loaded in reload(old, directory, note).values()] == ["10-agents", "gentle", "30"]
    assert notes[2:] == [("policies", f"policies were read again from {directory}: 10-agents, gentle, 30")]
    for path in directory.iterdir():
        path.unlink()
    assert reload(old, directory, note) == {}
    assert notes[-1][1].endswith("none: nothing is governed")


# The command line


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["policy", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def test_check_says_of_a_directory_that_no_policy_is_in_it(tmp_path):
    (tmp_path / "policy.txt").touch()
    assert run("check", tmp_path) == (0, f"{tmp_path}: no policy is in it (*.toml): nothing would be governed\n", "")


def test_check_takes_presets_files_and_directories_and_says_every_fault_of_all(directory, tmp_path):
    single = tmp_path / "single.toml"
    single.write_text("")  # a policy of its own need not select
    status, out, error = run("check", "seed", single, directory)
    assert (status, error) == (0, "")
    assert out.splitlines() == [
        "seed: good: policy seed",
        f"{single}: good: policy single",
        f"{directory}/10-agents.toml: good: policy 10-agents",
        f"{directory}/20-gentle.toml: good: policy gentle",
    ]
    single.write_text("x = 1")
    (directory / "30.toml").write_text("y = 1")
    (directory / "31.toml").write_text("\x00")
    status, out, error = run("check", single, "seed", directory, "nowhere.toml")
    assert (status, out) == (2, "seed: good: policy seed\n")
    assert [line.partition(": ")[0] for line in error.splitlines()] == [
        f"{single}:1",
        f"{directory}/30.toml:1",
        f"{directory}/31.toml:1",
        "nowhere.toml",
    ]


def describe(tmp_path: Path, **fields: object) -> Path:
    path = tmp_path / "container.json"
    path.write_text(json.dumps(fields))
    return path


EXPLAINED = [  # fields, status, the policy, a line that is said
    ("the first", {"namespace": "agents", "pod": "a", "name": "c"}, 0, "10-agents", "agents/a/c: policy 10-agents"),
    (
        "by annotation",
        {"namespace": "agents", "annotations": {ANNOTATION: "gentle"}},
        0,
        "gentle",
        "which it may choose",
    ),
    ("by environment", {"chosen_policy": "gentle"}, 0, "gentle", 'taken: environment GOVERNOR_POLICY = "gentle"'),
    ("none", {"namespace": "web", "pod": "a"}, 3, None, "web/a/?: not governed: no policy matches"),
    ("where it says so", {"namespace": "web"}, 3, None, "10-agents.toml:2]"),
    ("in vain", {"chosen_policy": "10-agents"}, 3, None, 'found "10-agents", which is not selectable'),
    ("nothing known", {}, 3, None, "the container: not governed"),
]


@pytest.mark.parametrize("case", EXPLAINED, ids=[case[0] for case in EXPLAINED])
def test_explain(directory, tmp_path, case):
    _, fields, expected_status, policy, said = case
    path = describe(tmp_path, **fields)
    status, out, error = run("explain", "--policies", directory, "--as", path)
    assert (status, error) == (expected_status, "")
    assert said in out
    status, out, _ = run("explain", "--policies", directory, "--as", path, "--json")
    found = json.loads(out)
    assert (status, found["policy"], found["governed"]) == (expected_status, policy, policy is not None)
    assert [verdict["taken"] for verdict in found["verdicts"]].count(True) == (policy is not None)
    assert found["file"] is None or Path(found["file"]).parent == directory


WRONG = [
    ("[]", r"found \[\], expected an object"),
    ("{", "found no JSON, expected an object"),
    ("\udcff", "found no JSON"),
    ("[" * 60000, "found no JSON"),
    (" " * 70000, "found a larger file"),
    ('{"pods": "x"}', 'pods = "x": expected one of cgroup, .*; did you mean "pod"\\?'),
    ('{"pod": 1, "labels": {"a": 1}, "annotations": []}', "pod = 1: .*\n.*labels = a table: .*\n.*annotations = "),
]


@pytest.mark.parametrize(("text", "said"), WRONG, ids=range(len(WRONG)))
def test_a_description_that_is_none(directory, tmp_path, text, said):
    path = tmp_path / "c.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    status, out, error = run("explain", "--policies", directory, "--as", path)
    assert (status, out) == (2, "")
    assert re.search(said, error)


def test_bad_policies_explain_nothing(directory, tmp_path):
    (directory / "30.toml").write_text("x = 1")
    status, out, error = run("explain", "--policies", directory, "--as", describe(tmp_path))
    assert (status, out) == (2, "")
    assert error.startswith(f"{directory}/30.toml:1: x = 1: expected")


@given(st.text(), st.sampled_from([1, 5000]))
def test_what_is_explained_of_a_container_is_bounded(text, times):
    text *= times
    container = Container(text, text, text, text, text, text, text, text, {"app": text}, {ANNOTATION: text})
    policies = {"/p/a.toml": policy_file_of('[select]\nlabel = ["app=?x"]')}
    choice = choose([loaded.policy for loaded in policies.values()], container)
    assert all(len(line) < 5000 for line in answer(container, choice, policies))
    assert len(json.dumps(as_object(container, choice, policies))) < 12 * 8 * 5000


def policy_file_of(text: str) -> policy_directory.Loaded:
    return policy_directory.policy_file.parse(text.encode(), "a.toml")


HOSTILE = "\x1b[2J\x07\u202e\x9b31m\x7f\n\ud800"


@pytest.mark.parametrize("options", [[], ["--json"]], ids=["people", "json"])
def test_no_text_of_a_container_reaches_a_terminal_raw(directory, tmp_path, options):
    (directory / "30.toml").write_text('[select]\nlabel = ["app=x"]\n')
    (directory / "31.toml").write_text('[select]\ncgroup = ["x"]\n')
    texts = dict.fromkeys(("cgroup", "container_id", "namespace", "pod", "name", "chosen_policy", "qos"), HOSTILE)
    path = describe(tmp_path, **texts, labels={"app": HOSTILE * 100}, annotations={ANNOTATION: HOSTILE})
    status, out, error = run("explain", "--policies", directory, "--as", path, *options)
    assert (status, error) == (3, "")
    assert out.replace("\n", "").isprintable()
    assert len(out.splitlines()) == (1 if options else 8)


def test_a_description_is_a_container(tmp_path):
    path = describe(tmp_path, pod="p", labels={"a": "b"})
    assert read_container(str(path)) == Container("", "", "", "", pod="p", labels={"a": "b"})
    with pytest.raises(FileError, match="regular file"):
        read_container("/dev/zero")
