"""Real memcgs, real bursts and the real command line. These tests need root, cgroup v2 and BPF: scripts/vm."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from governor import cgroup, cli, instance, pins, probe
from governor.brake import KnobFile
from tests.journal_lines import lines_of
from tests.waiting import wait_for

AGENT = Path(__file__).parent.parent / "fakes" / "agent.py"
MIB = 1 << 20
INSTANCE = "tests"


class Container:
    """A memcg with a limit, and processes in it."""

    def __init__(self, name, limit_mib, parent=None, oom_group=False):
        self.path = Path(parent or cgroup.ROOT) / name
        self.path.mkdir()
        if limit_mib:
            self.write("memory.max", limit_mib * MIB)
        if oom_group:
            self.write("memory.oom.group", 1)
        self.started = []

    def write(self, name, value):
        (self.path / name).write_text(str(value))

    def read(self, name):
        return (self.path / name).read_text().strip()

    def events(self):
        return {k.decode(): v for k, v in cgroup.parse_flat_keyed((self.path / "memory.events").read_bytes()).items()}

    def ratio(self):
        memcg = cgroup.Memcg(str(self.path))
        try:
            return memcg.memory_state().unreclaimable_ratio
        finally:
            memcg.close()

    def start(self, *argv, **options):
        def enter():
            self.write("cgroup.procs", os.getpid())

        process = subprocess.Popen([str(a) for a in argv], preexec_fn=enter, text=True, **options)
        self.started.append(process)
        return process

    def agent(self, session, burst, *options):
        """An agent-like process that waits for .go() before it bursts, to so many MiB if told."""
        begin = session.with_suffix(".begin")
        process = self.start(
            sys.executable, AGENT, session, burst, "--begin", begin, *options, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == "ready\n"

        def go(total_mib=""):
            beside = begin.with_suffix(".new")  # an empty one that is written afterwards is read before
            beside.write_text(str(total_mib))
            beside.rename(begin)

        process.go = go
        return process

    def close(self):
        with suppress(OSError):
            self.write("cgroup.freeze", 0)
        with suppress(OSError):
            self.write("cgroup.kill", 1)
        for process in self.started:
            process.wait(timeout=20)
            if process.stdout:
                process.stdout.close()

        def gone():
            for path in (*sorted(self.path.rglob("*/"), reverse=True), self.path):
                with suppress(OSError):
                    path.rmdir()
            return not self.path.exists()

        wait_for(gone, what=f"removing {self.path}")


numbers = itertools.count()


@pytest.fixture
def container():
    made = []

    def make(limit_mib, **options):
        made.append(Container(f"test-{next(numbers)}", limit_mib, **options))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


def in_a_fork(argv, environment=os.environ):
    """For subprocess: the command line, and no new Python that imports typer: that takes seconds under emulation."""

    def command_line():
        os.environ.update(environment)
        sys.argv, sys.stdout, sys.stderr = argv, os.fdopen(1, "w"), os.fdopen(2, "w")
        status = 1
        try:
            cli.main()  # a guard becomes another program here, by exec
        except SystemExit as ended:
            status = ended.code
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status or 0)

    return command_line


class Guard:
    """`governor guard`, as a user starts it."""

    def __init__(self, tmp_path, target, *options, loaded=True, wrap=(), environment=None, forked=True):
        self.directory = tmp_path / "archives"
        self.journal_path = tmp_path / "journal.ndjson"
        self.log_path = tmp_path / "guard.log"
        command = [*wrap, "governor", "guard", "--cgroup", target.path, "--archive", f"{tmp_path}/*.jsonl"]
        command += ["--archive-dir", self.directory, "--journal", self.journal_path]
        command += ["--instance", INSTANCE] if loaded else []
        argv = [str(c) for c in (*command, *options)]
        environment = {**os.environ, **(environment or {})}
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                argv,
                stdout=log,
                stderr=log,
                env=environment,
                preexec_fn=in_a_fork(argv, environment) if forked and not wrap else None,
            )

    def log(self):
        return self.log_path.read_text()

    def lines(self, *kinds):
        return [line for line in lines_of(self.journal_path) if not kinds or line["kind"] in kinds]

    def await_line(self, kind, seconds=30.0, count=1):
        def found():
            assert self.process.poll() is None or kind == "stopping", self.log()
            lines = self.lines(kind)
            return lines[count - 1] if len(lines) >= count else None

        try:
            return wait_for(found, seconds, f"journal line {kind!r}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the log:\n{self.log()}") from None

    def ready(self):
        self.await_line("agent")
        self.await_line("protecting")
        return self

    def reflex_pid(self):
        return self.lines("reflex_started")[-1]["pid"]

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@pytest.fixture
def guard(tmp_path, loaded):
    made = []

    def make(target, *options, within=tmp_path, **named):
        made.append(Guard(within, target, *options, **named))
        return made[-1]

    yield make
    for one in made:
        print(one.log())
        one.stop()


@pytest.fixture(scope="session")
def loaded():
    """The programs, compiled once a boot; their pins."""
    result = probe.run_loader(INSTANCE)
    assert "error" not in result, result["error"]
    yield pins.current(INSTANCE)
    pins.unload(INSTANCE)


@pytest.fixture(autouse=True)
def leaves_nothing_behind():
    """No test leaves a process of governor or a turned knob."""
    yield
    assert instance.holders() == []
    for path in instance.knob_files():  # what a killed governor leaves for the next one
        assert KnobFile(str(path)).restore_all() == []
        path.unlink()


def pytest_collection_modifyitems(items):
    """Outside a machine that can run them these tests are skipped, in the VM they must run."""
    verdict = probe.decide(probe.probe())
    if verdict.source != "bpf" and not os.environ.get("GOVERNOR_VM"):
        for item in items:
            item.add_marker(pytest.mark.skip(reason=f"use scripts/vm: {verdict.reason}"))
