"""What the measurements share: memcgs, a running `governor guard`, quantiles and tables."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import platform
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
AGENT = ROOT / "tests/fakes/agent.py"
MIB = 1 << 20
PATIENCE_S = 60.0
_numbers = itertools.count()


def where() -> str:
    return f"kernel {platform.release()}, {os.cpu_count()} CPUs"


def make_memcg(name: str, limit_mib: int) -> Path:
    cgroup = Path("/sys/fs/cgroup")
    if "memory" not in (cgroup / "cgroup.subtree_control").read_text().split():
        (cgroup / "cgroup.subtree_control").write_text("+memory")
    memcg = cgroup / f"governor-bench-{name}-{os.getpid()}-{next(_numbers)}"
    memcg.mkdir()
    (memcg / "memory.max").write_text(str(limit_mib * MIB))
    return memcg


def remove(memcg: Path) -> None:
    """Whatever is in it is killed first."""
    with contextlib.suppress(OSError):
        (memcg / "cgroup.freeze").write_text("0")
        (memcg / "cgroup.kill").write_text("1")
    for _ in range(100):
        with contextlib.suppress(OSError):
            memcg.rmdir()
            return
        time.sleep(0.05)


@contextlib.contextmanager
def memcg(name: str, limit_mib: int) -> Iterator[Path]:
    made = make_memcg(name, limit_mib)
    try:
        yield made
    finally:
        remove(made)


def unreclaimable_bytes(memcg: Path) -> int:
    stat = dict(line.split() for line in (memcg / "memory.stat").read_text().splitlines())
    cache = sum(int(stat[key]) for key in ("inactive_file", "active_file", "slab_reclaimable"))
    return int((memcg / "memory.current").read_text()) - cache


def sources() -> list[str]:
    """What `governor guard --source` knows; only BPF where it has no such option."""
    told = subprocess.run(
        [sys.executable, "-m", "governor", "guard", "--help"], capture_output=True, text=True
    ).stdout
    found = re.search(r"--source(.*?)(?:--|╰|\Z)", told, re.DOTALL)
    return [name for name in ("bpf", "psi", "poll") if name in found[1]] if found else ["bpf"]


class Governed:
    """A `governor guard` of a memcg, as a user starts it, and its journal."""

    def __init__(self, memcg: Path, *options: object, source: str = "bpf", archive: str = "") -> None:
        """Returns once it protects by `source`."""
        self.scratch = tempfile.TemporaryDirectory(prefix="governor-bench-")
        directory = Path(self.scratch.name)
        self.journal, self.log = directory / "journal", directory / "log"
        command = [sys.executable, "-m", "governor", "guard", "--cgroup", memcg, "--journal", self.journal]
        command += ["--archive-dir", directory / "archive", *(["--archive", archive] if archive else []), *options]
        environment = {**os.environ, "XDG_STATE_HOME": str(directory)}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(word) for word in command], stderr=log, env=environment)
        self.wait_for("protecting", source=source)

    def lines(self, *kinds: str) -> list[dict]:
        whole = self.journal.read_bytes().rpartition(b"\n")[0] if self.journal.exists() else b""
        read = [json.loads(line) for line in whole.splitlines()]
        return [line for line in read if not kinds or line["kind"] in kinds]

    def wait_for(self, kind: str, **wanted: object) -> None:
        until = time.monotonic() + PATIENCE_S
        while not any(all(line.get(key) == value for key, value in wanted.items()) for line in self.lines(kind)):
            if self.process.poll() is not None or time.monotonic() > until:
                sys.exit(f"scripts/bench: governor guard said nothing of {kind!r}:\n{self.log.read_text()}")
            time.sleep(0.05)

    def reflex_pid(self) -> int:
        return int(self.lines("reflex_started")[-1]["pid"])

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()
        self.scratch.cleanup()


class Agent:
    """tests/fakes/agent.py in a memcg."""

    def __init__(self, memcg: Path, directory: Path, burst: str, *options: object) -> None:
        self.session = directory / "session.jsonl"
        self._begin = directory / "begin"
        self._begin.unlink(missing_ok=True)
        command = [sys.executable, AGENT, self.session, burst, "--begin", self._begin, *options]

        def enter() -> None:
            (memcg / "cgroup.procs").write_text(str(os.getpid()))

        words = [str(word) for word in command]
        self.process = subprocess.Popen(words, preexec_fn=enter, stdout=subprocess.PIPE, text=True)
        self.hear()

    def hear(self, within_s: float = 600.0) -> str:
        """Its next line; empty once it has ended, "silent" when it said nothing in time."""
        assert self.process.stdout
        if not select.select([self.process.stdout], [], [], within_s)[0]:
            return "silent"
        return self.process.stdout.readline().strip()

    def go(self, total_mib: int) -> None:
        beside = self._begin.with_suffix(".new")
        beside.write_text(str(total_mib))
        beside.rename(self._begin)

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()

    @property
    def saved(self) -> bool:
        return self.session.with_name(self.session.name + ".saved").exists()


def at(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def table(head: list[str], rows: list[list[object]]) -> None:
    """A Markdown table."""
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join("---" for _ in head) + " |")
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print(flush=True)


def loaded(instance: str) -> Path:
    """Load the programs; where their pins are."""
    from governor import pins, probe

    told = probe.run_loader(instance)
    directory = pins.current(instance)
    if not directory:
        sys.exit(f"scripts/bench: {told['error']}")
    return directory
