"""policy_file: what a file may say, every fault with its line, and that no text whatever brings it down."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from governor import policy_file, toml_file
from governor.cli import app
from governor.journal import printable
from governor.policy import SECOND, Efficacy, Policy, Source, levels
from governor.policy_cli import as_toml
from governor.policy_file import RULES, Fault, Loaded, PolicyError, load, parse
from governor.policy_keys import KEYS, TABLES, Unexpected, build, convert, flatten, toml_text, written
from governor.toml_lines import key_lines

ROOT = Path(__file__).resolve().parent.parent.parent


def read(text: str) -> Loaded:
    return parse(text.encode(), "p.toml")


def faults(text: str | bytes) -> list[Fault]:
    with pytest.raises(PolicyError) as raised:
        parse(text if isinstance(text, bytes) else text.encode(), "p.toml")
    return raised.value.faults


# What a file may say


def test_an_empty_file_is_the_built_in_policy_under_the_files_name():
    assert read("").policy == replace(Policy(), name="p")


def test_every_field_has_a_key_and_its_default_can_be_written():
    assert build(flatten(Policy())) == Policy()
    for key in KEYS.values():
        text = written(key, key.default)
        assert read(f"[{key.table}]\n{key.name} = {text}" if key.table else f"{key.name} = {text}"), key.path


VALUES = [
    ('[compact]\ndwell = "500ms"', lambda p: p.compact.dwell_ns, 500_000_000),
    ('[compact]\ndwell = "5m"\n', lambda p: p.compact.dwell_ns, 300 * SECOND),
    ("[compact]\ndwell = 0", lambda p: p.compact.dwell_ns, 0),
    ('clear_after_compact = "2h"', lambda p: p.clear_after_compact_ns, 7200 * SECOND),
    ('archive.limit = "512MiB"', lambda p: p.archive.limit_bytes, 512 << 20),
    ('archive = { limit = "1000000" }', lambda p: p.archive.limit_bytes, 1_000_000),
    ("[compact]\nfreed = 1", lambda p: p.compact.freed_ratio, 1.0),
    ('[compact]\nefficacy = "useless"', lambda p: p.compact.efficacy, Efficacy.USELESS),
    ('[signals]\nsource = "psi"', lambda p: p.signals.source, Source.PSI),
    ('[compact]\nexec = ["/bin/compact", ""]', lambda p: p.compact.exec, ("/bin/compact", "")),
    ('[clear]\nsignal = "SIGUSR2"', lambda p: p.clear.signal, "SIGUSR2"),
    ("dry_run = true", lambda p: p.dry_run, True),
    ('profile = "codex"', lambda p: p.profile, "codex"),
    ("[archive]\nkeep_count = 3", lambda p: p.archive.keep_count, 3),
    ('extends = "seed"', lambda p: p.signals.raised_interval_ns, 15 * SECOND),
    ('[select]\nlabel = ["x.io/a=b=*", "c="]', lambda p: p.select.label, ("x.io/a=b=*", "c=")),
    ("[select]\nopt_out = true", lambda p: p.select.opt_out, True),
    ('extends = "seed"', lambda p: p.name, "p"),
    ('name = "mine"', lambda p: p.name, "mine"),
]


@pytest.mark.parametrize(("text", "get", "value"), VALUES)
def test_values(text, get, value):
    found = get(read(text).policy)
    assert found == value
    assert type(found) is type(value)


def test_each_key_knows_where_its_value_comes_from():
    sources = read('extends = "seed"\n\n[compact]\nengage = 0.71\n').sources
    assert set(sources) == set(KEYS)
    assert sources["compact.engage"] == "p.toml:4"
    assert sources["clear.engage"] == "preset seed"
    assert sources["terminate.grace"] == "built-in"
    assert sources["name"] == "p.toml"


# Faults

FAULTS = [
    ("compakt = 1", 1, "compakt", "1", 'did you mean "compact"?'),
    ("[compact]\nengage_ratio = 0.7", 2, "compact.engage_ratio", "0.7", 'a key of [compact]; did you mean "engage"?'),
    ("[zzz]\nx = 1\ny = 2", 1, "zzz", "a table", "a table or a key"),
    ("\n[[compact]]\nengage = 0.7", 2, "compact", "[a table]", "a table, once: [compact]"),
    ('"compact.engage" = 0.71', 1, "compact.engage", "0.71", "a table or a key"),
    ("compact = 3", 1, "compact", "3", "a table"),
    ('dry_run = "yes"', 1, "dry_run", '"yes"', "true or false"),
    ("[compact]\nengage = true", 2, "compact.engage", "true", "a number from 0 to 1"),
    ("[compact]\nengage = 70", 2, "compact.engage", "70", "a number from 0 to 1"),
    ("[compact]\nengage = nan", 2, "compact.engage", "nan", "a number from 0 to 1"),
    ("[compact]\nfreed = -0.1", 2, "compact.freed", "-0.1", "a number from 0 to 1"),
    ("[compact]\ndwell = 5", 2, "compact.dwell", "5", "a duration"),
    ("[compact]\ndwell = false", 2, "compact.dwell", "false", "a duration"),
    ('[compact]\ndwell = "5 s"', 2, "compact.dwell", '"5 s"', "a duration"),
    ('[compact]\ndwell = "-5s"', 2, "compact.dwell", '"-5s"', "a duration"),
    ('[compact]\ndwell = "5d"', 2, "compact.dwell", '"5d"', "a duration"),
    ('[compact]\ndwell = "25h"', 2, "compact.dwell", '"25h"', 'up to "24h"'),
    ('[compact]\ndwell = "\u0665s"', 2, "compact.dwell", '"\u0665s"', "a duration"),
    ('[archive]\nlimit = "4GB"', 2, "archive.limit", '"4GB"', "a size"),
    ('[archive]\nlimit = "9000000TiB"', 2, "archive.limit", '"9000000TiB"', "a size"),
    ("[archive]\nkeep_count = 2.0", 2, "archive.keep_count", "2.0", "a whole number"),
    ('[signals]\nsource = "ebpf"', 2, "signals.source", '"ebpf"', '"auto", "bpf", "psi", "poll"'),
    ("[signals]\nsource = []", 2, "signals.source", "[]", '"auto"'),
    ('[compact]\nsignal = "SIGUSR"', 2, "compact.signal", '"SIGUSR"', "did you mean"),
    ('[compact]\nsignal = "SIGKILL"', 2, "compact.signal", '"SIGKILL"', "the agent can handle"),
    ('[clear]\nsignal = "SIGSTOP"', 2, "clear.signal", '"SIGSTOP"', "the agent can handle"),
    ('[compact]\nexec = "claude compact"', 2, "compact.exec", '"claude compact"', "a list"),
    ('[compact]\nexec = [""]', 2, "compact.exec", '[""]', "begins with the program"),
    ('[compact]\nexec = ["a\\u0000b"]', 2, "compact.exec", '["a\\u0000b"]', "text"),
    ('[archive]\nglobs = [\n  "~/a",\n  "b/*",\n]', 2, "archive.globs", '["~/a", "b/*"]', 'found "b/*"'),
    ('[archive]\nglobs = ["/../x"]', 2, "archive.globs", '["/../x"]', "'..'"),
    ('[archive]\nglobs = ["/"]', 2, "archive.globs", '["/"]', "globs of files"),
    ('[select]\ncgroup = ["/kubepods*"]', 2, "select.cgroup", '["/kubepods*"]', "below /sys/fs/cgroup"),
    (
        '[select]\npod = ["a", "ns/b"]',
        2,
        "select.pod",
        '["a", "ns/b"]',
        'without "/", such as "agent-*"; found "ns/b"',
    ),
    ('[select]\ncontainer = [""]', 2, "select.container", '[""]', "globs of names"),
    ('[select]\nnamespace = "a"', 2, "select.namespace", '"a"', "a list"),
    ('[select]\nlabel = ["app"]', 2, "select.label", '["app"]', '"key=glob", such as "app=agent-*"'),
    ('[select]\nlabel = ["a=b", "=x"]', 2, "select.label", '["a=b", "=x"]', 'found "=x"'),
    ('[select]\nannotation = ["a b=x"]', 2, "select.annotation", '["a b=x"]', '"key=glob"'),
    ("[select.label]\napp = 1", 1, "select.label", "a table", "a list"),
    ('[select]\nlabels = ["a=b"]', 2, "select.labels", '["a=b"]', 'did you mean "label"?'),
    ('name = "a b"', 1, "name", '"a b"', "a name"),
    ('profile = "cdex"', 1, "profile", '"cdex"', 'did you mean "codex"?'),
    ('profile = "./x.toml"', 1, "profile", '"./x.toml"', "a profile's name, or its absolute path"),
    ('profile = "/nowhere.toml"', 1, "profile", '"/nowhere.toml"', "a good profile"),
    ('extends = "sed"', 1, "extends", '"sed"', 'did you mean "seed"?'),
    ('extends = "/etc/x.toml"', 1, "extends", '"/etc/x.toml"', "a preset"),
    ("extends = 3", 1, "extends", "3", "a preset"),
    ("dry_run = 1979-05-27", 1, "dry_run", "1979-05-27", "true or false"),
    ("dry_run = 0x" + "f" * 9000, 1, "dry_run", "a number of more than 70 digits", "true or false"),
    # Between keys: said of the one that the file gives later.
    ("[compact]\nrelease = 0.7", 2, "compact.release", "0.7", "less than compact.engage = 0.7 (built-in)"),
    (
        "[compact]\nengage = 0.6\nrelease = 0.65",
        3,
        "compact.release",
        "0.65",
        "less than compact.engage = 0.6 (p.toml:2)",
    ),
    ('[compact]\ncooldown = "300s"', 2, "compact.cooldown", '"5m"', 'less than clear_after_compact = "5m"'),
    ("[terminate]\nlast = 1.0", 2, "terminate.last", "1.0", "less than 1"),
    ("[signals]\ninterval = 0", 2, "signals.interval", "0", "more than 0"),
    ('[archive]\nkeep = "1GiB"', 2, "archive.keep", '"1GiB"', 'at least archive.limit = "4GiB"'),
    ('[clear]\nexec = ["x"]\nsignal = "SIGHUP"', 3, "clear.signal", '"SIGHUP"', "only one of"),
    # The whole text
    ("[compact]\nengage 0.7", 2, "", '"engage 0.7"', "TOML: Expected '='"),
    ("x = [\n1,\n2\n", 3, "", '"2"', "TOML: Unclosed array"),
    ("[compact]\n[compact]", 2, "", '"[compact]"', "TOML: Cannot declare"),
    ("x = " + "9" * 5000, 0, "", "a value", "4300 digits"),
    ("x = " + "[" * 5000, 0, "", "arrays or tables within each other without end", "two levels"),
    (b"a = 1\n\xff\xfe", 2, "", "the byte 0xff", "UTF-8"),
    (b"#" * (toml_file.FILE_LIMIT_BYTES + 1), 0, "", "a larger file", "65536 bytes"),
    ("\nx." + "a." * 100 + "a = 1", 2, "", '"x.' + "a." * 59 + "...", "at most 100 dots"),
]


@pytest.mark.parametrize(("text", "line", "key", "value", "expected"), FAULTS)
def test_a_fault(text, line, key, value, expected):
    fault = next(fault for fault in faults(text) if fault.key == key)
    assert (fault.line, fault.value) == (line, value)
    assert expected in fault.expected


def test_every_fault_at_once_in_the_files_order():
    text = """\
[terminate]
last = 2
enabled = 1
[compact]
engage = "0.7"
realease = 0.6
release = 0.9   # not held against a compact.engage that is not known
dwell = "soon"
[clear]
engage = 0.65   # under compact.engage, were that known
[nothing]
"""
    found = [(fault.line, fault.key) for fault in faults(text)]
    assert found == [
        (2, "terminate.last"),
        (3, "terminate.enabled"),
        (5, "compact.engage"),
        (6, "compact.realease"),
        (8, "compact.dwell"),
        (10, "clear.engage"),  # under its release
        (11, "nothing"),
    ]


def test_with_an_unknown_base_a_file_is_held_only_against_itself():
    found = faults('extends = "x"\n[compact]\nengage = 0.95\n[brake]\nengage = 0.4\nrelease = 0.4')
    assert [fault.key for fault in found] == ["extends", "brake.release"]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_each_rule_refuses_what_is_past_it_and_only_that(rule):
    left, comparison, right = rule
    values = flatten(Policy())
    assert all(side in KEYS for side in (left, right) if isinstance(side, str))
    low, high = (values[side] if isinstance(side, str) else side for side in (left, right))
    assert low < high or (comparison, low) == ("<=", high), "the defaults break it"
    blamed, other = (right, left) if isinstance(right, str) else (left, right)
    limit = f"{other} = " if isinstance(other, str) else f" than {other}"
    moved = high if blamed == left else low
    if comparison == "<=":  # equal is still good
        assert not _blames(blamed, moved, limit)
        step = 0.001 if KEYS[blamed].field.endswith("_ratio") else 1
        moved = moved + step if blamed == left else moved - step
    assert _blames(blamed, moved, limit)


def _blames(path: str, value: object, limit: str) -> bool:
    """Whether a file that sets nothing but this key is told of it in terms of the other."""
    key = KEYS[path]
    text = f"{key.name} = {written(key, value)}"
    try:
        read(f"[{key.table}]\n{text}" if key.table else text)
    except PolicyError as error:
        return any(fault.key == path and limit in fault.expected for fault in error.faults)
    return False


# Files


def test_what_cannot_be_read_is_a_fault(tmp_path):
    (tmp_path / "p.toml").write_text("[compact]\nengage = 0.71")
    assert load(str(tmp_path / "p.toml")).policy.compact.engage_ratio == 0.71
    fifo = tmp_path / "fifo"
    subprocess.run(["mkfifo", fifo], check=True)
    for path, expected in [
        (str(tmp_path / "none.toml"), "No such file"),
        (str(tmp_path), "regular file"),
        (str(fifo), "regular file"),  # and does not wait for its writer
        ("/dev/zero", "regular file"),
        ("a\0b", "preset"),
        ("/a\0b", "null byte"),
        ("cautios", 'did you mean "cautious"?'),
        ("", "No such file"),
    ]:
        with pytest.raises(PolicyError) as raised:
            load(path)
        assert expected in str(raised.value), path


# Presets


@pytest.mark.parametrize("name", ["default", "seed", "cautious", "dry-run"])
def test_presets_load(name):
    loaded = load(name)
    assert loaded.policy.name == name
    assert set(loaded.sources) == set(KEYS)
    watched = levels(loaded.policy)
    assert list(watched.engage_ppm) == sorted(watched.engage_ppm)
    assert name in policy_file.presets()


def test_the_default_preset_shows_every_default_and_sets_none():
    assert load("default").policy == Policy()
    path = policy_file.presets()["default"]
    uncommented = re.sub(r"^# (?=\w+ = )", "", path.read_text(), flags=re.M)
    loaded = read(uncommented)
    assert loaded.policy == Policy()
    assert {path for path, source in loaded.sources.items() if source.startswith("p.toml:")} == set(KEYS)
    script = [sys.executable, str(ROOT / "scripts/policy-keys"), "--preset"]
    assert path.read_text() == subprocess.check_output(script, text=True), "scripts/policy-keys --preset writes it"


def test_seed_is_the_pollers_ladder():
    policy = load("seed").policy
    assert (policy.compact.engage_ratio, policy.clear.engage_ratio, policy.terminate.engage_ratio) == (0.7, 0.85, 0.9)
    assert 299 * SECOND <= policy.compact.cooldown_ns < policy.clear_after_compact_ns == 300 * SECOND
    assert (policy.signals.interval_ns, policy.signals.raised_interval_ns) == (60 * SECOND, 15 * SECOND)
    assert not (policy.brake.enabled or policy.shed.enabled or policy.compact.warning_ns or policy.clear.warning_ns)
    assert policy.signals.source is Source.POLL


# Lines

KEY_TEXTS = {"engage": ["engage", '"engage"', "'engage'", '"eng\\u0061ge"', " engage "], "a.b": ['"a.b"', "'a.b'"]}
VALUE_TEXTS = [
    "0.7",
    "1979-05-27 07:32:00",
    '"x = 1 # [y]"',
    '"\\""',
    "''",
    '"""\n[x]\ny = 1\n\\""" """',
    '"""a"""""',
    '""""a""""',
    "'''\n[z]\n# it's\n''''",
    '[\n1, # ]\n[2, "]"],\n]',
    '{ b = 1, "c d" = { e = [ { f = "}" } ] } }',
    "{}",
    "[[{}], [{ a = 1 }, {}]]",
]


@st.composite
def documents(draw):
    """A TOML text in any style, and the line of each key that it gives."""
    text, lines, headed = "", {}, False
    for number in range(draw(st.integers(0, 6))):
        text += draw(st.sampled_from(["", "\n", "# [x]\n", " \t\r\n", "  "]))
        table = f"t{number}"
        style = draw(st.sampled_from(["header", "array", "dotted", "inline", "top"]))
        if style == "header" or style == "array":
            lines[table,], headed = text.count("\n") + 1, True
            inside = draw(st.sampled_from([table, f' "{table}" ']))
            text += f"[{inside}] # x\n" if style == "header" else f"[[{inside}]]\n"
        for key, texts in KEY_TEXTS.items():
            key_text, value = draw(st.sampled_from(texts)), draw(st.sampled_from(VALUE_TEXTS))
            if style in ("header", "array"):
                statement = f"{key_text} = {value}"
            elif headed:
                continue  # what follows a header belongs to it
            elif style == "dotted":
                statement = f"{table} . {key_text} = {value}"
            elif style == "inline":
                if key != "engage":
                    continue
                statement = f"{table} = {{ {key_text.strip()} = {value} }}"
            else:
                lines[table + key,] = text.count("\n") + 1
                text += f'"{table}{key}" = {value}\n'
                continue
            lines.setdefault((table,), text.count("\n") + 1)
            lines[table, key] = text.count("\n") + 1
            text += statement + draw(st.sampled_from(["\n", " # x = 1\n", "\r\n"]))
    return text, lines


@given(documents())
@settings(max_examples=100)
def test_lines_in_any_style(document):
    import tomllib

    text, lines = document
    tomllib.loads(text)  # else the document is not one
    found = key_lines(text, 2)
    assert {path: found.get(path) for path in lines} == lines


# Anything at all


def bounded(data: bytes) -> None:
    """Read; each fault can be shown as one line of bounded length, and stands within the text."""
    try:
        loaded = parse(data, "p.toml")
    except PolicyError as error:
        assert error.faults
        lines = [fault.line for fault in error.faults]
        assert lines == sorted(lines)
        assert all(0 <= line <= data.count(b"\n") + 1 for line in lines)
        assert all(len(printable(fault.text("p.toml"))) < 3000 for fault in error.faults)
        assert all(fault.value and fault.expected for fault in error.faults)
        return
    assert set(loaded.sources) == set(KEYS)
    assert list(levels(loaded.policy).engage_ppm) == sorted(levels(loaded.policy).engage_ppm)


PIECES = [
    *"[]{}=.,#'\"\\\n\r\t \0",
    '"""',
    "'''",
    "\r\n",
    "compact",
    "engage",
    "extends",
    "0.7",
    '"10s"',
    "1",
    "\ufeff",
    "x",
]


@given(st.one_of(st.text(), st.lists(st.sampled_from(PIECES)).map("".join)))
@settings(max_examples=200)
@example("a." * 100 + "a = 1")
@example("[" + "a." * 100 + "a]")
@example("x = " + "{a=" * 400)
def test_arbitrary_text(text):
    bounded(text.encode(errors="surrogatepass"))


@given(st.binary())
def test_arbitrary_bytes(data):
    bounded(data)


SCALARS = st.one_of(
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.sampled_from(["10s", "4GiB", "SIGUSR1", "useless", "~/x", "seed", "poll", "0s", "300s"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(["engage", "a", "b.c"]), inner, max_size=3)
    ),
    max_leaves=8,
)


def as_text(value: object) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_text(key)} = {as_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(as_text, value)) + "]"
    return toml_text(value)


@given(
    st.dictionaries(st.sampled_from([*TABLES, "extends", "name", "dry_run", "clear_after_compact", "other"]), TREES),
    st.dictionaries(st.sampled_from(sorted(KEYS)), TREES),
)
@settings(max_examples=200)
def test_arbitrary_trees(tree, by_key):
    for path, value in by_key.items():
        key = KEYS[path]
        owner = tree.setdefault(key.table, {}) if key.table else tree
        if isinstance(owner, dict):
            owner[key.name] = value
    bounded("\n".join(f"{toml_text(name)} = {as_text(value)}" for name, value in tree.items()).encode())


# Written and read again

ASCENDING = [
    "compact.release",
    "signals.stalled_compact",
    "compact.engage",
    "brake.early",
    "clear.release",
    "clear.engage",
    "compact.cooldown_waived",
    "clear.cooldown_waived",
    "brake.release",
    "terminate.release",
    "brake.probation_below",
    "brake.engage",
    "terminate.engage",
    "brake.unknown_rate",
    "terminate.last",
]
RECYCLE = ["recycle.release", "recycle.engage", "recycle.cooldown_waived"]
SLOWER = ["compact.settle", "compact.cooldown", "clear_after_compact"]
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


STARTS = {"globs": "~/", "cgroup": "x", "exec": "x", "label": "a=", "annotation": "x.io/a="} | dict.fromkeys(
    ("namespace", "pod", "container"), "x-"
)


@st.composite
def policies(draw):
    """A policy with every value drawn, within the rules."""
    values = flatten(Policy())
    for path, key in KEYS.items():
        if key.field.endswith("_ratio"):
            values[path] = draw(st.floats(0.001, 1))
        elif key.field.endswith("_ns"):
            values[path] = draw(st.integers(1, 86_400 * SECOND))
        elif key.field.endswith("_bytes"):
            values[path] = draw(st.integers(1, 10**18 - 1))
        elif isinstance(key.default, bool):
            values[path] = draw(st.booleans())
        elif isinstance(key.default, int):
            values[path] = draw(st.integers(1, 1000))
        elif isinstance(key.default, (Efficacy, Source)):
            values[path] = draw(st.sampled_from(type(key.default)))
        elif path == "profile":
            values[path] = draw(st.sampled_from(["", "codex", "claude-code"]))
        elif key.name == "signal":
            values[path] = draw(st.sampled_from(["", "SIGUSR1", "SIGRTMIN"]))
        elif isinstance(key.default, tuple):
            start = STARTS.get(key.name, "")
            without = ".." if key.name == "globs" else "/" if start == "x-" else "\0"
            values[path] = tuple(start + text.replace(without, "") for text in draw(st.lists(ANY_TEXT, max_size=3)))
    for tier in ("compact", "clear"):
        if values[f"{tier}.signal"]:
            values[f"{tier}.exec"] = ()
    values["archive.globs"] = tuple(f"{glob}x" for glob in values["archive.globs"])
    for paths in (
        ASCENDING,
        SLOWER,
        ["signals.raised_interval", "signals.interval"],
        ["archive.limit", "archive.keep"],
        RECYCLE,
    ):
        kind = st.floats(0.001, 0.999) if paths in (ASCENDING, RECYCLE) else st.integers(1, 86_400 * SECOND)
        drawn = draw(st.lists(kind, unique=True, min_size=len(paths), max_size=len(paths)))
        values.update(zip(paths, sorted(drawn), strict=True))
    return build(values)


@given(policies(), st.sampled_from(["p.toml:1", "x\n[compact]\nengage = 0.1", "\udcff\x1b[31m"]))
def test_show_can_be_read_again(policy, source):
    text = "\n".join(as_toml(Loaded(policy, dict.fromkeys(KEYS, source))))
    assert read(text).policy == policy
    assert printable(text.replace("\n", "")) == text.replace("\n", "")


@given(st.sampled_from(sorted(KEYS)), SCALARS)
def test_a_value_that_is_taken_can_be_written(path, value):
    import tomllib

    try:
        converted = convert(KEYS[path], value)
    except Unexpected:
        return
    assert convert(KEYS[path], tomllib.loads(f"x = {written(KEYS[path], converted)}")["x"]) == converted


# The command line


def run(*arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["policy", *arguments])
    return result.exit_code, result.stdout, result.stderr


def test_check_prints_every_fault_on_a_line_and_exits_2(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('dry_run = 1\n[compact]\n"\\u001b[31m\\n" = 2\nexec = "\\u009b"\n')
    status, out, error = run("check", str(path))
    assert (status, out) == (2, "")
    lines = error.splitlines()
    assert lines[0] == f"{path}:1: dry_run = 1: expected true or false"
    assert lines[1].startswith(f"{path}:3: compact.\\x1b[31m\\n = 2: expected a key of [compact]")
    assert lines[2].startswith(f'{path}:4: compact.exec = "\\u009b": expected a list')
    assert len(lines) == 3


def test_check_says_that_a_good_one_is_good(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('extends = "cautious"\n')
    assert run("check", str(path)) == (0, f"{path}: good: policy p\n", "")


def test_show(tmp_path):
    path = tmp_path / "p.toml"
    path.write_text('extends = "seed"\n[archive]\nglobs = ["~/\\u007f"]\n')
    status, out, _ = run("show", str(path))
    assert status == 0
    assert re.search(r'^interval = "1m" +# preset seed$', out, re.M)
    assert re.search(rf'^globs = \["~/\\u007f"\] +# {path}:3$', out, re.M)
    assert replace(read(out).policy, name="p") == load(str(path)).policy
    status, out, _ = run("show", str(path), "--json")
    found = json.loads(out)
    assert printable(out.strip()) == out.strip()
    assert found["policy"]["signals"]["interval_ns"] == 60 * SECOND
    assert found["policy"]["archive"]["globs"] == ["~/\x7f"]
    assert found["sources"]["archive.globs"] == f"{path}:3"
    assert run("show", "nothing")[0] == 2


def test_list_names_every_preset_with_what_it_is_for():
    status, out, _ = run("list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["cautious", "default", "dry-run", "seed"]
    assert all(len(line.split()) > 5 for line in out.splitlines())


def test_the_resident_process_imports_nothing_heavy_for_it():
    code = "import sys; from governor.policy_file import load; load('seed'); print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True, cwd=ROOT).split()
    assert not {"difflib", "typer", "rich", "click", "orjson", "json", "subprocess"} & set(loaded)
