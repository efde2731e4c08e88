"""What a report says of a journal: episodes, answers, trace, timeline, and its three forms."""

import os
import re
import shlex
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from story import AHEAD_NS, EPOCH_NS, Story
from test_ladder import DRY, MIB, NO_BRAKE, REACHED, braked, memory, tool
from typer.testing import CliRunner

from governor import (
    cli,
    instance,
    replay,
    report_cli,
    report_findings,
    report_html,
    report_json,
    report_markdown,
    report_read,
    report_timeline,
    report_words,
)
from governor.codec import plain
from governor.model import AgentEnded, Answered, Archived, Sampled, Shedded, Signalled, Status, Tier
from governor.policy import SECOND, Policy

JOURNAL = Path(__file__).parent.parent / "journals" / "burst.ndjson"


@pytest.fixture
def tell(monkeypatch, tmp_path):
    return lambda policy=None, **named: Story(monkeypatch, tmp_path, policy, **named)


def document(*stories):
    return report_words.document(report_read.read(line for story in stories for line in story.lines))


def words(told, question):
    (answer,) = (one for one in told.answers if question in one.question)
    return " ".join((*answer.sentences, *answer.commands))


def crossed(story, level, rising=True, pages=190_000):
    fields = ("ktime_ns", "cgroup_id", "kind", "flags", "valid", "level", "pid", "tid", "usage_pages", "bound_pages")
    values = (story.now_ns, 1, 1, int(rising), 3, level, 99, 99, pages, pages)
    record = dict(zip(fields, values, strict=True)) | {"max_pages": 256_000, "charged_pages": 0}
    record |= {"fill_rate_pages": 25_600, "time_to_max_ns": (1 << 64) - 1, "stall_ns": 0, "trend_pages": 0}
    story.write("crossing", record=record, called_back_ns=story.now_ns)


# Histories of one episode each


def calm(story):
    for _ in range(5):
        story.look(0.3)
        story.look(0.33)


def grown(story):
    story.look(0.2)
    story.look(0.201)
    story.look(0.6, after_s=0.5)


def held(story, ratio=0.92, growth=None, rate_mib=10):
    grown(story)
    crossed(story, 1)
    story.now_ns += SECOND
    story.brake(braked(ratio, rate_mib, growth=growth))


def let_go(story):
    held(story)
    story.archived()
    story.feed(Archived(True, memory(0.92)), after_s=0.1)
    story.thaw()
    story.look(0.3)


def shed(story):
    held(story, growth=tool())
    story.archived()
    story.feed(Archived(True, memory(0.92)), after_s=0.1)
    story.thaw()
    story.look(0.92)
    story.brake(braked(0.94, growth=tool()))
    story.note("shed", "SIGKILL to make (77)", pids=[77])
    story.feed(Shedded(1))
    story.look(0.2, after_s=0.1)
    story.feed(Archived(True, memory(0.2)))
    story.thaw()


def ended(story, killed=False):
    held(story, rate_mib=5000)
    story.archived()
    story.feed(Archived(True, memory(0.92)), after_s=0.1)
    story.note("terminating", "SIGTERM to the agent (process 4711): no room", sent=True)
    story.feed(Signalled(memory(0.98 if killed else 0.92)))
    story.now_ns += SECOND // 4
    story.note("agent_ended", "the agent (process 4711) ended", pid=4711)
    story.feed(AgentEnded())
    story.archived("two", 1, "one")
    story.look(0.01, after_s=0.5)


def compacted(story):
    story.look(0.72)
    story.look(0.75)
    story.feed(Answered(Tier.COMPACT, Status.DELIVERED, memory(0.75)), after_s=1)
    story.look(0.40, after_s=31)


def pretended(story):
    story.look(0.72)
    story.look(0.75)
    story.feed(Answered(Tier.COMPACT, Status.UNAVAILABLE))


def unsent(story):
    held(story, rate_mib=5000)
    story.archived()
    story.feed(Archived(True, memory(0.92)), after_s=0.1)
    story.note("terminating", "the agent is not known: no room", sent=False)
    story.feed(Signalled(memory(0.92)))
    story.thaw()


def unheard(story):
    """A hold whose thaw was not journaled: another governor began two seconds later."""
    held(story)
    story.now_ns += 2 * SECOND
    story.begin()
    story.look(0.3, after_s=100)


def rotated(story):
    """Another file begins in the middle of a hold."""
    held(story)
    story.now_ns += SECOND // 2
    story.begin()
    story.thaw(0.5)
    story.look(0.3, after_s=100)


def braked_again(story):
    held(story)
    story.now_ns += 3 * SECOND
    story.brake(braked(0.92))
    story.thaw(1)
    story.look(0.3, after_s=100)


def oom_killed(story):
    held(story)
    story.note(
        "oom_killed", "the agent (process 4711) was killed: by the kernel's OOM killer, at the limit of its memcg"
    )
    story.feed(AgentEnded())
    story.archived("late", 3)


STORIES = [
    # name, policy, what happens, outcome, tiers that freed, restore, words of an answer
    ("let go", None, let_go, "held", [], "one", ("lost", "Nothing. Time: ")),
    ("shed", None, shed, "shed", ["shed"], "one", ("Who grew", "make (process 77) grew by 300 MiB in 1.0 s")),
    ("ended", None, ended, "terminated", ["terminate"], "two", ("do?", "it ended 250 ms later")),
    ("killed", None, lambda story: ended(story, True), "killed", ["terminate"], "two", ("lost", "cut short")),
    ("nobody signalled", None, unsent, "held", [], "one", ("do?", "nobody was signalled: the agent is not known")),
    ("no thaw", None, unheard, "held", [], None, ("do?", "Held it once, at most 2.0 s in all")),
    ("no thaw, and lost", None, unheard, "held", [], None, ("lost", "Time: at most 2.0 s in which")),
    ("a file begun meanwhile", None, rotated, "held", [], None, ("do?", "Held it once, 1.0 s in all")),
    ("one thaw of two", None, braked_again, "held", [], None, ("do?", "Held it twice, at most 4.0 s in all")),
    ("compacted", REACHED, compacted, "compacted", ["compact"], None, ("do?", "to compact: delivered")),
    ("killed by the kernel", None, oom_killed, "oom_killed", [], "late", ("do?", "at the limit of its memcg")),
    ("dry run", DRY, pretended, "crossed", [], None, ("do?", "the policy is a dry run")),
    (
        "only crossed",
        NO_BRAKE,
        lambda s: (grown(s), crossed(s, 1)),
        "crossed",
        [],
        None,
        ("do?", "no action was due"),
    ),
]


@pytest.mark.parametrize("case", STORIES, ids=[case[0] for case in STORIES])
def test_what_is_said_of_what_happened(tell, case):
    _, policy, happens, outcome, freed, restore, (question, expected) = case
    story = tell(policy)
    happens(story)
    (told,) = document(story).episodes
    findings = report_findings.of(told.episode)
    assert findings.outcome.value == outcome
    assert [one.tier for one in findings.freed] == freed
    assert all(one.bytes is not None and one.bytes > 100 * MIB for one in findings.freed)
    assert (findings.restore and findings.restore.name) == restore
    assert expected in words(told, question)
    assert told.headline.startswith("Dry run") == (policy is DRY)
    assert [row.at_ns for row in told.rows] == sorted(row.at_ns for row in told.rows)
    assert [row.number for row in told.rows if row.number] == list(
        range(1, 1 + sum(bool(r.number) for r in told.rows))
    )


def test_the_beginning_is_where_memory_began_to_grow(tell):
    story = tell()
    for _ in range(20):
        story.look(0.2)
    held(story)
    (told,) = document(story).episodes
    assert told.episode.rise.memory.unreclaimable_ratio == pytest.approx(0.201, abs=1e-3)
    assert told.episode.rise.at_ns - EPOCH_NS == pytest.approx(1022 * SECOND, abs=1e6)
    assert "from 20.1 % (201 MiB of 1000 MiB). It grew to 92.0 % (920 MiB of 1000 MiB) in 1.5 s" in words(
        told, "start"
    )
    assert "The first crossing was heard at" in words(told, "start")


def test_the_trace_has_the_rule_and_the_values(tell):
    story = tell()
    shed(story)
    (told,) = document(story).episodes
    rules = [row.rule for row in told.rows if row.rule]
    assert "watching → held: there is room" in rules and "probation → held: again, the growth is a tool's" in rules
    brake = next(row for row in told.rows if row.what.startswith("Braked: held, 1.00 ms after the crossing"))
    assert "at 10 MiB/s 97.0 % is 5.0 s away (room: 250 ms)" in brake.values
    assert "(a tool is shed from 50 MiB on)" in brake.values
    decided = " ".join(one for row in told.rows for one in row.decided)
    assert "kill the tree of process 77 while it is held: make (process 77) grew by" in decided


def test_a_long_trace_keeps_its_ends_and_says_what_is_missing(tell):
    story = tell()
    held(story)
    for _ in range(3000):
        story.now_ns += 10_000_000
        story.note("fault", "something")
    (told,) = document(story).episodes
    assert len(told.rows) == 400 and told.left_out > 2600
    assert f"{told.left_out} lines in the middle" in report_html.render(document(story))


def test_crossings_that_follow_each_other_are_told_as_a_few(tell):
    story = tell()
    grown(story)
    for number in range(50):
        story.now_ns += 1_000_000
        crossed(story, 1 + number % 2, rising=not number % 2)
    (told,) = document(story).episodes
    assert len(told.rows) == 5 and "46 more crossings" in " ".join(row.what for row in told.rows)


def test_episodes_are_told_apart_and_the_newest_first(tell):
    story = tell()
    for _ in range(25):
        let_go(story)
        for _ in range(20):
            story.look(0.3)
    told = document(story)
    assert len(told.episodes) == report_words.EPISODES_LIMIT
    begins = [one.episode.from_ns for one in told.episodes]
    assert begins == sorted(begins, reverse=True)
    assert "The 20 newest of 25 episodes are told" in " ".join(told.remarks)


def test_a_governor_that_comes_back_soon_goes_on_with_the_episode(tell):
    story = tell()
    held(story)
    for gap_s, expected in ((5, 1), (3600, 2)):
        story.now_ns += gap_s * SECOND
        story.begin()
        story.look(0.93)
        assert len(document(story).episodes) == expected


def test_a_policy_that_is_read_again_counts_from_then_on(tell):
    story = tell()
    story.look(0.5)
    wanted = Policy(name="strict", compact=REACHED.compact.__class__(0.4, 0.35))
    story.note("policy", "policy 'strict' from now on", policy=plain(wanted))
    story.look(0.51)
    (told,) = document(story).episodes
    assert told.episode.policy.name == "strict"


def test_what_needs_no_archive_says_how_there_would_be_one(tell):
    story = tell()
    held(story)
    story.archived(files=0)
    (told,) = document(story).episodes
    assert "no session file was found to archive: name them with --archive" in words(told, "back")


@given(st.text(max_size=40), st.text(max_size=40))
def test_the_command_is_one_word_for_each_word(name, directory):
    saved = report_read.Saved(0, name, directory, "", 1, 0, True)
    command = report_findings.restore_command(saved)
    argv = ["governor", "archive", "restore", name, "--to", "restored", "--archive-dir", directory]
    assert shlex.split(command) == argv


# Nothing to tell


def test_where_nothing_happened_that_is_said_and_drawn(tell):
    story = tell()
    calm(story)
    told = document(story)
    assert told.remarks == ("No level was crossed, and governor had nothing to do.",)
    page = report_html.render(told)
    assert "Nothing happened" in page and page.count('<svg class="wide"') == 1
    assert orjson.loads(report_json.render(told))["episodes"] == []


def test_what_was_passed_over_is_said(tell):
    story = tell()
    story.lines += [b"{\n", b"{}\n", b"{}\n"]
    remarks = " ".join(document(story).remarks)
    assert "1 line of 4 cut off" in remarks and "2 lines of 4 not known" in remarks


# The timeline


def charts(told):
    drawn = (report_timeline.of_episode, report_timeline.of_the_burst)
    found = (draw(told.episode, told.rows, narrow) for draw in drawn for narrow in (False, True))
    return [chart for chart in found if chart]


def numbers(path):
    return [float(number) for number in re.findall(r"-?[\d.]+", path)]


looks = st.lists(st.tuples(st.floats(0, 1.2), st.floats(0.001, 400)), min_size=1, max_size=30)


@settings(max_examples=30)
@given(looks, st.floats(0.5, 0.99))
def test_every_picture_stays_within_its_frame(tmp_path_factory, seen, ratio):
    with pytest.MonkeyPatch.context() as patch:
        story = Story(patch, tmp_path_factory.mktemp("story"))
    story.now_ns += SECOND
    for share, after_s in seen:
        story.look(share, after_s, file_bytes=50 * MIB)
    held(story, ratio)
    for told in document(story).episodes:
        assert charts(told)
        for chart in charts(told):
            drawn = [*(one.path for one in (*chart.areas, *chart.levels)), chart.counted]
            flat = [numbers(path) for path in drawn]
            assert all(chart.scale.left <= x <= chart.scale.right for path in flat for x in path[::2])
            assert all(chart.scale.top <= y <= chart.scale.bottom for path in flat for y in path[1::2])
            rows = [label.y for label in chart.level_labels]
            assert all(after - before >= 14.9 for before, after in pairwise(rows))
            ends = [(flag.x, flag.x + flag.width) for flag in chart.flags]
            assert all(end < begin for (_, end), (begin, _) in pairwise(ends))
            assert all(begin >= 0 and end <= chart.width for begin, end in ends)
            xs = [tick.x for tick in chart.x_ticks]
            assert 1 <= len(xs) <= 10 and xs == sorted(set(xs))


def test_a_burst_in_a_long_episode_is_drawn_by_itself(tell):
    story = tell()
    let_go(story)
    assert len(charts(document(story).episodes[0])) == 2
    for _ in range(20):
        story.look(0.72)
    assert len(charts(document(story).episodes[0])) == 4


def test_a_limit_that_is_changed_moves_the_levels(tell):
    story = tell()
    story.look(0.8)
    for ratio in (0.4, 0.42):
        story.feed(Sampled(memory(ratio, 2000 * MIB), story.now_ns + AHEAD_NS + SECOND), after_s=1)
    (told,) = document(story).episodes
    most = charts(told)[0].levels[0]
    assert len(set(numbers(most.path)[1::2])) == 2


# The three forms

HOSTILE = "<script>x</script>|`*_[a](http://x)& @you #1 www.x"


def test_markdown_has_no_markup_of_the_journals(tell):
    story = tell(target=f"/sys/fs/cgroup/{HOSTILE}")
    held(story)
    story.archived("a``` b", directory="/``````")
    story.note("killed", f"SIGKILL to process 7 ({HOSTILE})", pids=[7])
    text = report_markdown.render(document(story))
    fenced = re.sub(r"(?ms)^(`{3,})$.*?^\1$", "", text)
    assert "SIGKILL to process 7" in fenced and "governor archive restore" not in fenced
    assert not re.search(r"(?<!\\)<script|(?<!\\)\[a|(?<!\\)://|(?<!\\)@you|(?<!\\)#1|www\.x", fenced)
    rows = [line for line in fenced.splitlines() if line.startswith("| +")]
    assert rows and all(len(re.findall(r"(?<!\\)\|", row)) == 5 for row in rows)


def test_html_escapes_and_names_its_sheet(tell):
    story = tell(target=f"/sys/fs/cgroup/{HOSTILE}")
    held(story)
    page = report_html.render(document(story))
    assert "<script>" not in page and "&lt;script&gt;" in page
    assert "http" not in re.sub(r"\(http://x\)|http-equiv", "", page)
    assert re.search(r"default-src 'none'; style-src 'sha256-[A-Za-z0-9+/]{43}='", page)
    assert " style=" not in page


def test_json_is_as_its_module_says(tell):
    story = tell()
    shed(story)
    told = orjson.loads(report_json.render(document(story)))
    described = set(re.findall(r"[a-z_]{3,}", report_json.__doc__))
    (episode,) = told["episodes"]
    for one in (
        told,
        episode,
        *episode["looks"][:1],
        *episode["crossings"][:1],
        *episode["holds"],
        *episode["trace"],
    ):
        assert set(one) <= described
    assert episode["freed"][0] == {
        "tier": "shed",
        "at_ns": episode["freed"][0]["at_ns"],
        "bytes": 740 * MIB,
        "is_use": None,
    }


# The command


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(instance, "state_directory", lambda: tmp_path / "state")
    monkeypatch.setattr(report_cli, "_NODE_STATE", tmp_path / "node")
    monkeypatch.chdir(tmp_path)
    return lambda *argv: CliRunner().invoke(cli.app, ["report", *map(str, argv)])


@pytest.mark.parametrize(
    ("options", "begins"),
    [
        (["-o", "x.html"], "<!doctype html>"),
        (["-o", "x.md"], "# governor report"),
        (["-o", "x.json"], "{\n"),
        (["-o", "x.txt", "--format", "md"], "# governor report"),
        (["-o", "x"], "<!doctype html>"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_written_where(run, tmp_path, options, begins):
    done = run(JOURNAL, *options)
    assert (done.exit_code, done.stdout) == (0, ""), done.output
    assert (tmp_path / options[1]).read_text().startswith(begins)
    assert os.listdir(tmp_path) == [options[1]]
    assert run(JOURNAL, *options, "-o", "-").stdout.startswith(begins if "--format" in options else "<!doctype html>")


def test_a_link_in_the_way_is_replaced_and_not_followed(run, tmp_path):
    (tmp_path / "elsewhere").write_text("kept")
    (tmp_path / "x.html").symlink_to("elsewhere")
    assert run(JOURNAL, "-o", "x.html").exit_code == 0
    assert (tmp_path / "elsewhere").read_text() == "kept" and not (tmp_path / "x.html").is_symlink()


def test_rotated_files_are_read_first_and_the_newest_journal_is_the_default(run, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    lines = JOURNAL.read_bytes().splitlines(keepends=True)
    (state / "journal.ndjson").write_bytes(b"".join(lines[20:]))
    (state / "journal.ndjson.1").write_bytes(b"".join(lines[:20]))
    done = run("--format", "json")
    assert done.exit_code == 0 and f"the newest journal: {state}/journal.ndjson" in done.stderr
    assert done.stdout == run(JOURNAL, "--format", "json").stdout


def test_of_a_pod_the_newest_journal_is_found_wherever_governors_keep_theirs(run, tmp_path):
    lines = JOURNAL.read_text()
    names = {"old": "agents/claude-0/agent", "new": "agents/claude-0/agent", "other": "agents/claude-01/agent"}
    for age, (name, target) in enumerate(names.items()):
        path = tmp_path / f"node/containers/{name}.ndjson"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(lines.replace('"target":"/sys/fs/cgroup/test-0"', f'"target":"{target} ({name})"'))
        os.utime(path, (age, age))
    (tmp_path / "node/journal-node.ndjson").write_text(lines)  # the newest of all, and of no container
    (tmp_path / "node/containers/garbage.ndjson").write_bytes(b"[1]\n")
    os.utime(tmp_path / "node/containers/garbage.ndjson", (-1, -1))
    for named in ("agents/claude-0", "agents/claude-0/agent"):
        done = run(named, "--format", "md")
        assert done.exit_code == 0, done.output
        assert done.stdout.startswith("# governor report: agents/claude-0/agent (new)")
    for named in (tmp_path / "node", tmp_path / "node/containers"):
        assert f"the newest journal: {tmp_path}/node/containers/other.ndjson" in run(named, "--format", "md").stderr
    assert "containers/other.ndjson" in run("--format", "md").stderr


@pytest.mark.parametrize("number", [1, 2])
def test_standard_output_by_another_name_is_written_to_and_not_replaced(tmp_path, number):
    name = tmp_path / "stdout.md"  # as root, this could be /dev/stdout itself
    name.symlink_to(f"/proc/self/fd/{number}")
    command = [sys.executable, "-m", "governor", "report", str(JOURNAL), "-o", str(name)]
    with (tmp_path / "to").open("wb") as to:
        subprocess.run(command, **{("stdout", "stderr")[number - 1]: to}, timeout=60, check=True)
    assert (tmp_path / "to").read_text().startswith("# governor report") and name.is_symlink()


def rotate(journal):
    for before, after in (("ndjson.1", "ndjson.2"), ("ndjson", "ndjson.1")):
        journal.with_suffix(f".{before}").rename(journal.with_suffix(f".{after}"))
    journal.write_bytes(b"")


def test_a_journal_that_is_rotated_while_it_is_opened_is_read_whole(run, tmp_path, monkeypatch):
    lines = JOURNAL.read_bytes().splitlines(keepends=True)
    journal = tmp_path / "j.ndjson"
    journal.with_suffix(".ndjson.1").write_bytes(b"".join(lines[:20]))
    journal.write_bytes(b"".join(lines[20:]))
    listed, rotations = replay.files, [rotate]

    def files(path):
        found = listed(path)
        while rotations:
            rotations.pop()(journal)
        return found

    monkeypatch.setattr(replay, "files", files)
    assert run(journal, "--format", "json").stdout == run(JOURNAL, "--format", "json").stdout


def test_what_is_no_file_among_the_rotated_ones_is_passed_over(run, tmp_path):
    journal = tmp_path / "j.ndjson"
    journal.write_bytes(JOURNAL.read_bytes())
    os.mkfifo(tmp_path / "j.ndjson.1")
    done = subprocess.run(
        [sys.executable, "-m", "governor", "report", str(journal), "--format", "md"], capture_output=True, timeout=60
    )
    assert done.stdout.startswith(b"# governor report")


def test_no_journal_is_replaced_by_its_report(run, tmp_path):
    for name in ("j.ndjson", "j.ndjson.1"):
        (tmp_path / name).write_bytes(JOURNAL.read_bytes())
    for name in ("j.ndjson", "j.ndjson.1", f"{tmp_path}/j.ndjson"):
        done = run("j.ndjson", "-o", name)
        assert done.exit_code == 2 and "which is read for it" in done.stderr
    assert (tmp_path / "j.ndjson").read_bytes() == (tmp_path / "j.ndjson.1").read_bytes() == JOURNAL.read_bytes()


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 2, "found no journal in"),
        (["nope"], 2, "nope: found no such file, expected a journal, or a pod of which there is one"),
        (["agents/nope"], 2, "agents/nope: found no such file"),
        (["."], 2, "found no journal in ."),
        ([Path("/dev/zero")], 2, "/dev/zero: found what is no regular file"),
        (["garbage"], 1, "garbage: 3 lines, none of them a governor journal's"),
        ([JOURNAL, "-o", "/nope/x.html"], 1, "No such file or directory: '/nope/x.html'"),
        ([JOURNAL, "--format", "pdf"], 2, "'pdf' is not one of"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_is_said_of_wrong_use(run, tmp_path, words, status, said):
    (tmp_path / "garbage").write_bytes(b"x\ny\n{}\n")
    done = run(*words)
    assert done.exit_code == status, done.output
    assert said in done.stderr or said in str(done.exception)


def test_a_nodes_own_journal_is_told_as_that(tell):
    story = tell(target="node")
    story.lines.clear()
    story.write("begin", wanted={"policies": "/etc/governor/policies"})
    story.note("governed", "agents/claude-0/agent: governed by policy 'agents'", slot=0)
    told = document(story)
    assert told.remarks[0].endswith("Each container has a journal of its own.")
    assert "node" in report_html.render(told) and told.episodes == ()


def test_a_page_is_not_poured_over_a_terminal():
    master, slave = os.openpty()
    command = [sys.executable, "-m", "governor", "report", str(JOURNAL)]
    done = subprocess.run(command, stdout=slave, stderr=subprocess.PIPE, text=True)
    os.close(slave)
    os.close(master)
    assert done.returncode == 2 and "--format md is for reading here" in done.stderr
