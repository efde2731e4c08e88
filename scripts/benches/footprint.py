"""Resident memory: reflex and governor, idle and after a burst; and the loader's peak."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benches.common import Agent, Governed, memcg, table, where

INSTANCE = "bench"


def resident_kib(pid: int) -> tuple[int, int]:
    """(RSS, PSS)."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines[1:]}
    return int(values["Rss"]), int(values["Pss"])


def load() -> int:
    """Load the programs; the loader's peak, KiB."""
    loader = subprocess.Popen([sys.executable, "-P", "-m", "governor.loader", INSTANCE], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(loader.pid, 0)
    if status:
        sys.exit("scripts/bench: the loader failed")
    return used.ru_maxrss


def footprint() -> None:
    from governor import pins

    print(f"{where()}; KiB\n", flush=True)
    peak_kib = load()
    rows: list[list[object]] = []
    try:
        with memcg("footprint", 256) as pod, tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            agent = Agent(pod, directory, "touch", "--picture-mb", 8)
            governed = Governed(pod, "--instance", INSTANCE, archive=f"{directory}/*.jsonl")
            pids = {"reflex": governed.reflex_pid(), "governor": governed.process.pid}

            def look(when: str) -> None:
                time.sleep(2)
                rows.extend([name, when, *resident_kib(pid)] for name, pid in pids.items())

            try:
                look("idle")
                agent.go(1024)
                agent.process.wait()
                governed.wait_for("agent_ended")
                look("after a burst, an archive and a termination")
            finally:
                agent.end()
                governed.stop()
    finally:
        pins.unload(INSTANCE)
    rows.append(["loader, for some seconds", "peak", peak_kib, ""])
    table(["process", "when", "RSS", "PSS"], rows)
