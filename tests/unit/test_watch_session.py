"""`governor watch` on a tree of plain files, and beside a governor's socket; lines, JSON and exit statuses."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
from typer.testing import CliRunner

from governor import cgroup, instance, status_cli, watch_all, watch_governor, watch_one, watch_target
from governor.cli import app
from governor.poll_source import PollSource
from governor.poller import Poller
from governor.watch_all import SORTS, All
from governor.watch_model import NOT_YET, SILENT
from governor.watch_one import One
from governor.watch_overview import Many
from governor.watch_target import Target
from tests.unit import watch_fixture
from tests.unit.test_status import Governor, standing
from tests.unit.watch_fixture import MIB, SECOND, make_memcg
from tests.waiting import wait_for

SAMPLE = {"type", "time", "target", "memory", "level", "levels", "fill_rate_bytes", "time_to_max_s", "stalls"}
SAMPLE |= {"events", "frozen", "processes", "governor", "next"}
MEMORY = {"usage_bytes", "max_bytes", "high_bytes", "anon_bytes", "kernel_bytes", "cache_bytes", "headroom_bytes"}
MEMORY |= {"unreclaimable_bytes", "unreclaimable_ratio", "limit"}
END = {"type", "time", "target", "name", "seconds", "samples", "first_bytes", "last_bytes", "peak_bytes", "max_bytes"}
END |= {"peak_ratio", "worst_rate_bytes", "crossings", "events", "changes", "freed_bytes", "grew_most"}


@pytest.fixture
def root(tmp_path, monkeypatch):
    run = tmp_path / "run"
    run.mkdir()
    monkeypatch.setattr(instance, "run_directory", lambda: run)
    real = status_cli.Path
    for module in (status_cli, watch_one):
        monkeypatch.setattr(module, "Path", lambda path: run if path == "/run/governor" else real(path))
    root = tmp_path / "sys" / "fs" / "cgroup"
    monkeypatch.setattr(cgroup, "ROOT", str(root))
    monkeypatch.setattr(cgroup, "ROOT_V1", "/nowhere")
    make_memcg(root / "system.slice" / "agent.service", pids=[os.getppid()])
    make_memcg(root / "system.slice" / "cron.service", usage_mib=20, anon_mib=5)
    return root


def watch(*words):
    return CliRunner().invoke(app, ["watch", *words, "--source", "poll"])


def lines(done):
    return [orjson.loads(line) for line in done.stdout.splitlines()]


def test_the_schema_of_a_target(root):
    done = watch("agent", "--json", "--for", "0.2")
    assert done.exit_code == 0, done.output
    source, sample, end = lines(done)
    assert set(source) == {"type", "time", "target", "source"}
    assert set(sample) == SAMPLE
    assert set(sample["memory"]) == MEMORY
    assert set(end) == END
    assert sample["target"] == {
        "name": "agent.service",
        "cgroup": f"{root}/system.slice/agent.service",
        **dict.fromkeys(("namespace", "pod", "container"), ""),
    }
    assert sample["memory"]["unreclaimable_bytes"] == 50 * MIB
    assert sample["memory"]["cache_bytes"] == 10 * MIB
    assert sample["events"]["max"] == {"count": 3, "since": 0}
    assert sample["stalls"]["some_ratio"] == pytest.approx(0.015)
    assert [process["pid"] for process in sample["processes"]] == [os.getppid()]


def test_the_schema_of_many(root):
    first, second = lines(watch("--json", "--once"))
    assert set(first) == {"type", "time", "target", "memory", "level", "fill_rate_bytes", "governor"}
    assert [one["target"]["name"] for one in (first, second)] == ["agent.service", "cron.service"]


STATUSES = [(60, 0), (100, 10), (120, 20), (126, 30), (137, 40)]  # usage; 10 MiB of that are cache, 128 is max


@pytest.mark.parametrize(("usage_mib", "status"), STATUSES)
def test_exit_statuses(root, usage_mib, status):
    make_memcg(root / "system.slice" / "agent.service", usage_mib)
    done = watch("agent", "--once")
    assert done.exit_code == status
    assert len(done.stdout.splitlines()) == 1
    assert watch("--once").exit_code == status  # of all, the highest


def test_until_a_crossing_that_does_not_come(root):
    assert watch("agent", "--until", "crossing", "--for", "0.1").exit_code == 1


def test_until_a_crossing_that_comes(root):
    grown = (root / "system.slice" / "agent.service", 126)
    later = threading.Timer(1, make_memcg, grown)
    later.start()
    done = watch("agent", "--until", "crossing", "--for", "30")
    later.join()
    assert done.exit_code == 30
    assert "* crossing: rising to brake" in done.stdout


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([""], 2, "found an empty TARGET, expected NAMESPACE/POD"),
        (["agent", "--for", "nan"], 2, "found --for nan"),
        (["agent", "--for", "inf"], 2, "found --for inf"),
        (["agent", "--for", "1", "--source", "bpf"], 1, "--source bpf: no BPF here"),
    ],
)
def test_what_is_said_of_wrong_use(root, monkeypatch, words, status, said):
    monkeypatch.setattr(watch_one.guard_options, "bpf_refused", lambda _: "no BPF here")
    done = CliRunner().invoke(app, ["watch", *words])
    assert (done.exit_code, said in done.stderr) == (status, True), done.output


def test_who_is_left_out_for_want_of_descriptors_is_counted_once(root, monkeypatch):
    monkeypatch.setattr(watch_all, "_SPARE_DESCRIPTORS", 1 << 30)
    many = Many(Poller(), [], lambda _: None)
    for second in (1, 2, 40):
        many.turn(second * SECOND)
    assert many.overview(0).count == "0 and 2 left out for want of descriptors"
    assert "left out" in many.summary(SECOND)
    many._all.govern([watch_fixture.standing(cgroup=f"{root}/system.slice/agent.service")] * 2)
    assert many.overview(0).count.startswith("0 and 2 ")
    many.close()


def test_until_needs_one_container(root, monkeypatch):
    two = [Target(f"{root}/system.slice/{name}.service", "a", "pod", name) for name in ("agent", "cron")]
    monkeypatch.setattr(watch_target, "resolve", lambda *_: two)
    done = watch("a/pod", "--until", "crossing")
    assert done.exit_code == 2
    assert "a/pod has 2: a/pod/agent, a/pod/cron" in done.stderr
    assert [line.split()[1] for line in watch("a/pod", "--once").stdout.splitlines()] == ["a/pod/agent", "a/pod/cron"]


def test_a_line_for_people(root):
    text = watch("agent", "--for", "0.1").stdout
    assert "source: poll" in text
    assert "unreclaimable    50.0 of   128.0 MiB ( 39.1 %)" in text
    assert "0 crossings upwards" in text


def test_names_do_not_steer_a_terminal(root):
    make_memcg(root / "system.slice" / "x\x1b[2Jy.service")
    for words in (("--once",), ("--once", "--json")):
        done = watch(*words)
        assert "\x1b" not in done.output
        assert "x\\x1b[2Jy" in done.output.replace("\\\\", "\\")


# What a governor tells


@pytest.fixture
def governed(root):
    """agent.service, governed: its socket, and what it says of itself."""
    path = root / "system.slice" / "agent.service"
    for file in ("memory.pressure", "memory.events"):  # plain ones cannot be waited for
        (path / file).unlink()
    cgroup_id = path.stat().st_ino
    told = [replace(standing(), cgroup=str(path), cgroup_id=cgroup_id)]
    governor = Governor(instance.run_directory(), told, name=f"memcg-{cgroup_id}.sock")
    yield governor
    if not governor.ends.is_set():
        governor.close()


def turned(view, poller, until, seconds=5):
    def found():
        view.turn(time.monotonic_ns())
        poller.wait(20_000_000)
        return until()

    return wait_for(found, seconds)


def test_a_governor_is_heard(root, governed):
    poller, entries = Poller(), []
    one = One(Target(f"{root}/system.slice/agent.service"), poller, "auto", entries.append)
    turned(one, poller, lambda: one.model.standing)
    assert one.model.source == f"governor {os.getpid()}"
    assert one.model.name == "shop/agent-0/agent"
    assert one.model.picture(0).next.startswith("compact at 70 %")
    governed.subscribers.tell("event", kind="braked", text="held \x1b[2J")
    memory = {"level": "brake", "rising": True, "unreclaimable_bytes": 9, "max_bytes": 10, "monotonic_ns": 1}
    governed.subscribers.tell("memory", **memory)
    turned(one, poller, lambda: {"braked", "crossing"} <= {entry.kind for entry in entries})
    assert [entry.text for entry in entries if entry.kind == "crossing"] == ["rising to brake: 90.0 % of max"]
    governed.close()
    turned(one, poller, lambda: one.model.standing is None)
    assert entries[-2].kind == "governor_gone"
    one.close()


@pytest.fixture
def says(root, monkeypatch):
    """agent.service, governed by what says what it is told to, once for each connection, and then hangs."""
    monkeypatch.setattr(watch_governor, "_PATIENCE_NS", SECOND // 5)
    path = root / "system.slice" / "agent.service"
    for file in ("memory.pressure", "memory.events"):
        (path / file).unlink()
    cgroup_id = path.stat().st_ino
    target = {"type": "target", **watch_fixture.standing(cgroup=str(path), cgroup_id=cgroup_id)}
    connections, lines = [], []

    def serve():
        with suppress(OSError):
            while True:
                connections.append(listening.accept()[0])
                connections[-1].sendall(b"".join(orjson.dumps(line) + b"\n" for line in lines))

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(instance.run_directory() / f"memcg-{cgroup_id}.sock"))
        listening.listen()
        threading.Thread(target=serve, daemon=True).start()
        yield (
            lambda **fields: lines.extend(({**target, **fields}, {"type": "status", "next": None})),
            lines,
            connections,
        )
        listening.shutdown(socket.SHUT_RDWR)
    for connection in connections:
        connection.close()


def test_a_governor_that_hangs_is_not_gone_by_until_it_answers(root, says):
    answer, lines, connections = says
    path, poller, entries = root / "system.slice" / "agent.service", Poller(), []
    one = One(Target(str(path)), poller, "auto", entries.append, brief=True)
    one.turn(time.monotonic_ns())
    assert one.model.source == f"governor {os.getpid()}"
    assert one.model.picture(0).next == NOT_YET
    turned(one, poller, lambda: one.model.source.startswith("poll"))
    assert entries[-2].text.endswith("it does not answer")
    assert one.model.picture(0).next == SILENT
    make_memcg(path, 126)
    turned(one, poller, lambda: any(entry.kind == "crossing" for entry in entries))
    answer()
    connections[0].sendall(b"".join(orjson.dumps(line) + b"\n" for line in lines))
    turned(one, poller, lambda: one.model.standing)
    assert one.model.source == f"governor {os.getpid()}"
    assert [entry.kind for entry in entries].count("governor_gone") == 1 == len(connections)
    one.close()


@pytest.mark.parametrize("has_told", [False, True])
def test_what_is_crossed_before_a_silence_is_noticed_is_told_once(root, says, has_told):
    answer, _, connections = says
    answer()
    path, poller, entries = root / "system.slice" / "agent.service", Poller(), []
    one = One(Target(str(path)), poller, "auto", entries.append, brief=True)
    turned(one, poller, lambda: one.model.standing)
    make_memcg(path, 126)
    if has_told:
        told = {"type": "memory", "level": "brake", "rising": True, "unreclaimable_bytes": 9, "max_bytes": 10}
        connections[0].sendall(orjson.dumps(told) + b"\n")
    turned(one, poller, lambda: one.model.source.startswith("poll"))
    told_by = [(entry.kind, entry.fields.get("level")) for entry in entries if entry.kind != "source"]
    assert told_by == [("crossing", "brake"), ("governor_gone", None)]
    one.close()


def test_a_governor_that_hangs_is_not_gone_by_among_many(root, says):
    answer, lines, _ = says
    answer()
    lines.append({"type": "event", "kind": "braked", "text": "held"})
    poller, entries = Poller(), []
    many = Many(poller, [], entries.append)
    turned(many, poller, lambda: many.rows[0].standing)
    turned(many, poller, lambda: many.source.startswith("poll"))
    many.turn(time.monotonic_ns())
    assert [row.standing for row in many.rows] == [None, None]
    assert [entry.kind for entry in entries] == ["braked", "governor_gone"]
    many.close()


UNSAID = [
    {"type": "memory", "level": "brake", "rising": True, "unreclaimable_bytes": "x", "max_bytes": 1},
    {"type": "memory", "level": "zzz", "rising": True, "unreclaimable_bytes": 1, "max_bytes": 1},
    {"type": "event", "kind": "braked"},
    {"type": "status", "next": "x"},
    {"type": "target", "cgroup_id": 7},
    {"frozen_for_ms": "x"},
    {"frozen_for_ms": True},
    {"decided": {}},
    {"levels": {"compact": "x"}},
    {"levels": {"compact": 1e308}},
    {"memory": {"max_bytes": 1}},
    {"tiers": {"compact": []}},
    {"freed_bytes": {"shed": 1.5}},
    {"namespace": None},
]


@pytest.mark.parametrize("wrong", UNSAID, ids=str)
def test_what_no_governor_says_is_not_believed(root, says, wrong):
    answer, lines, _ = says
    lines.append(wrong) if "type" in wrong else answer(**wrong)
    poller, entries = Poller(), []
    one = One(Target(f"{root}/system.slice/agent.service"), poller, "auto", entries.append, brief=True)
    many = Many(poller, [], entries.append)
    turned(one, poller, lambda: entries[-1].kind == "source" and len(entries) > 2)
    turned(many, poller, lambda: entries[-1].kind == "governor_gone")
    assert {entry.text.partition(": ")[2] for entry in entries if entry.kind == "governor_gone"} == {
        "it says what no governor says"
    }
    for view in (one, many):
        view.close()


def test_what_a_governor_says_does_not_steer_a_terminal(root, says):
    answer, _, _ = says
    answer(phase="watching\x1b[2J", policy="\x1b]0;x\x07", frozen_for_ms=None)
    for words in ([], ["--json"]):
        done = CliRunner().invoke(app, ["watch", "agent", "--once", *words])
        assert "watching\\x1b[2J" in done.output.replace("\\\\", "\\")
        assert "\x1b" not in done.output


HELD = [({"frozen_for_ms": None, "phase": "watching"}, 0), ({}, 50), ({"frozen_for_ms": None}, 50)]
HELD += [({"phase": "watching"}, 50), ({"frozen_for_ms": None, "phase": "terminating"}, 50)]


@pytest.mark.parametrize(("fields", "status"), HELD, ids=str)
def test_the_exit_status_of_what_is_held(root, says, fields, status):
    answer, _, _ = says
    memory = {"unreclaimable_bytes": MIB, "max_bytes": 128 * MIB, "unreclaimable_ratio": 1 / 128}
    answer(**fields, memory=memory)
    for target in (["agent"], []):
        assert CliRunner().invoke(app, ["watch", *target, "--once"]).exit_code == status


def test_a_memcg_that_goes(root):
    path, poller, entries = root / "system.slice" / "agent.service", Poller(), []
    one = One(Target(str(path)), poller, "poll", entries.append)
    one.turn(SECOND)
    (path / "memory.stat").write_text("")
    (path / "memory.current").write_text("")  # as unreadable as one that is gone
    one.turn(2 * SECOND)
    one.turn(3 * SECOND)
    assert [entry.kind for entry in entries] == ["source", "gone"]
    assert one.model.gone
    assert one.due_ns == 4 * SECOND
    one.close()


def test_the_kernel_is_not_asked_to_wake_it_for_a_memcg_that_has_gone(root, monkeypatch):
    class Stirring(PollSource):
        """Its descriptor is ready for ever, as those of a removed memcg are."""

        def __init__(self, limits, poller, with_psi, now_ns, on_stir):
            super().__init__(limits, poller, False, now_ns, on_stir)
            reader, writer = os.pipe()
            os.close(writer)
            poller.register(reader, on_stir)
            self.fds.append(reader)

    monkeypatch.setattr(watch_one, "PollSource", Stirring)
    path, poller, entries = root / "system.slice" / "agent.service", Poller(), []
    one = One(Target(str(path)), poller, "poll", entries.append)
    one.turn(SECOND)
    assert poller.wait(0)
    (path / "memory.stat").write_text("")
    (path / "memory.current").write_text("")
    for second in range(2, 20):
        one.turn(second * SECOND)
        assert not poller.wait(0)
    assert [entry.kind for entry in entries] == ["source", "gone"]
    one.close()


WATCH = """
import sys
from pathlib import Path
from governor import cgroup, cli, instance
cgroup.ROOT, cgroup.ROOT_V1 = sys.argv[1], "/nowhere"
instance.run_directory = lambda: Path(sys.argv[2])
sys.argv[1:] = ["watch", "agent", *sys.argv[3:]]
cli.main()
"""


def catches(pid, number):
    (mask,) = re.findall(r"SigCgt:\s(\w+)", Path(f"/proc/{pid}/status").read_text())
    return int(mask, 16) >> (number - 1) & 1


def test_who_does_not_read_any_more_does_not_keep_it_from_ending(root):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(256))
    os.set_blocking(writer, True)
    command = [sys.executable, "-c", WATCH, root, instance.run_directory(), "--source", "poll"]
    with subprocess.Popen(command, stdout=writer) as process:
        os.close(writer)

        def ended():
            process.terminate()
            return process.poll() is not None

        try:
            wait_for(lambda: catches(process.pid, signal.SIGTERM), 30)
            wait_for(ended, 10)
        finally:
            process.kill()
            os.close(reader)


def test_who_has_left_ends_it_quietly(root):
    command = [sys.executable, "-c", WATCH, root, instance.run_directory(), "--source", "poll", "--for", "20"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")


def test_all_that_is_governed_comes_first(root, governed):
    make_memcg(root / "system.slice" / "large.service", 900, 1024)
    poller, entries = Poller(), []
    many = Many(poller, [], entries.append)
    turned(many, poller, lambda: many.rows and many.rows[0].standing)
    assert [row.target.name for row in many.rows] == ["shop/agent-0/agent", "large.service", "cron.service"]
    assert many.source == f"governor {os.getpid()}"
    many.close()


def test_what_is_selected_stays_selected(root):
    many = Many(Poller(), [], lambda _: None)
    many.turn(SECOND)
    many.select(5)  # the last
    assert many.rows[many.selected].target.name == "cron.service"
    make_memcg(root / "system.slice" / "cron.service", usage_mib=100)
    many.turn(2 * SECOND)
    assert many.selected == 0
    assert many.rows[0].target.name == "cron.service"
    many.close()


def test_what_comes_and_goes(root):
    every = All(str(root))
    assert [row.target.name for row in every.look(1, 10, "name")] == ["agent.service", "cron.service"]
    make_memcg(root / "system.slice" / "new.service")
    assert len(every.look(2, 10, "name")) == 2
    assert len(every.look(30 * SECOND, 10, "name")) == 3
    assert {sort: every.look(31 * SECOND, 1, sort)[0].target.name for sort in SORTS[:2]} == {
        "usage": "agent.service",
        "share of max": "agent.service",
    }
    every.close()


def test_rich_is_imported_when_a_picture_is_drawn_and_not_before():
    code = "import sys, governor.cli, governor.watch_session; sys.exit('rich.console' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
