"""What is saved: growth at several rates, ungoverned, beside a plain poller, and governed by each source.

Bursts at full speed in every way there is, by each source. And peaks that end by themselves: how many of them cost
the agent or a tool its life.
"""

from __future__ import annotations

import random
import select
import tempfile
import time
from pathlib import Path

from benches.common import MIB, Agent, Governed, loaded, memcg, sources, table, unreclaimable_bytes, where

START_RATIO = 0.65  # below every level: what matters comes after
LIMITS_MIB = (256, 1024)
RATES_MB = (10, 20, 60, 200, 0)  # 0: as fast as the machine can
BURSTS = ("touch", "huge", "read", "tmpfs", "threads", "processes", "populate")
BURST_LIMITS_MIB = (64, 256)
PEAKS = (0.93, 0.95, 0.97)
PEAK_RATES_MB = (20, 0)
POLLER = "15 s poller"
POLLER_POLICY = 'extends = "seed"\n[signals]\ninterval = "15s"\nraised_interval = "15s"\n'
INSTANCE = "bench"
BURST_S = 60.0  # whatever lives then, lives
DEATHS = ("killed", "terminating", "oom_kill")


def govern(pod: Path, way: str, directory: Path) -> Governed:
    """A guard as one of the ways has it."""
    source, options = way, ["--instance", INSTANCE] if way == "bpf" else []
    if way == POLLER:
        policy = directory / "poller.toml"
        policy.write_text(POLLER_POLICY)
        source, options = "poll", ["--policy", policy]
    return Governed(pod, "--source", source, *options, source=source, archive=f"{directory}/*.jsonl")


def growth(
    way: str,
    limit_mib: int,
    rate_mb: int,
    chance: random.Random,
    burst: str = "touch",
    start_ratio: float = START_RATIO,
) -> tuple[str, bool]:
    """One run: what became of it, and whether the session was saved before the end."""
    with memcg("growth", limit_mib) as pod, tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        start_mib = int(start_ratio * limit_mib)
        agent = Agent(pod, directory, burst, "--start-mb", start_mib, "--rate-mb", rate_mb)
        governed = None
        try:
            if way != "ungoverned":
                governed = govern(pod, way, directory)
                if way == POLLER:
                    time.sleep(chance.uniform(0, 15))  # growth begins at any moment of its interval
            agent.go(2 * limit_mib)
            lives = agent.hear(BURST_S) != ""  # its tools are gone, or as many of them as had to go
            status = None if lives else agent.process.wait()
            time.sleep(0.5)  # the journal tells of the end
            archived = governed.lines("archived")[:1] if governed else []
            deaths = governed.lines(*DEATHS)[:1] if governed else []
            first = bool(archived and deaths and archived[0]["monotonic_ns"] < deaths[0]["monotonic_ns"])
            events = (pod / "memory.events").read_text().split()
            kills = int(events[events.index("oom_kill") + 1])
            ended = "lives" if status is None else f"exit {128 - status if status < 0 else status}"
            told = ["archived"] * first + ["handler ran"] * agent.saved + [ended]
            told += [f"{kills} oom_kill"] if kills else []
            return ", ".join(told), first or agent.saved or lives
        finally:
            agent.end()
            if governed:
                governed.stop()


def peak(way: str, limit_mib: int, ratio: float, rate_mb: int, burst: str) -> tuple[list[str], float]:
    """The actions that a peak cost, and how long it took; none was needed."""
    with memcg("peak", limit_mib) as pod, tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        agent = Agent(pod, directory, burst, "--start-mb", int(START_RATIO * limit_mib), "--rate-mb", rate_mb)
        governed = govern(pod, way, directory)
        try:
            begun = time.monotonic()
            agent.go(int((ratio * limit_mib * MIB - unreclaimable_bytes(pod)) / MIB))
            assert agent.process.stdout
            select.select([agent.process.stdout], [], [], 60)  # over, or ended
            took_s = time.monotonic() - begun
            time.sleep(2)  # for what follows late
            actions = [line["kind"] for line in governed.lines("braked", "shed", "terminating", "killed")]
            return actions, took_s
        finally:
            agent.end()
            governed.stop()


def survival(quick: bool, only_mib: int = 0) -> None:
    """`only_mib`: only this size."""
    from governor import pins

    limits = (only_mib,) if only_mib else LIMITS_MIB[:1] if quick else LIMITS_MIB
    rates = (20, 200, 0) if quick else RATES_MB
    chance = random.Random(1)
    governing = sources()
    ways = ["ungoverned", POLLER, *governing]
    print(f"{where()}; growth from {START_RATIO:.0%} of max on\n", flush=True)
    loaded(INSTANCE)
    begun = time.monotonic()
    saved = dict.fromkeys(ways, 0)
    rows: list[list[object]] = []
    try:
        for limit_mib in limits:
            for rate_mb in rates:
                row: list[object] = [limit_mib, rate_mb or "full speed"]
                for way in ways:
                    told, kept = growth(way, limit_mib, rate_mb, chance)
                    saved[way] += kept
                    row.append(told)
                    print(f"  {limit_mib} MiB, {rate_mb or 'full speed'}, {way}: {told}", flush=True)
                rows.append(row)
        rows.append(["session saved", "", *(f"{saved[way]} of {len(limits) * len(rates)}" for way in ways)])
        print()
        table(["max, MiB", "MB/s", *ways], rows)
    finally:
        pins.unload(INSTANCE)
    print(f"{time.monotonic() - begun:.0f} s")


def bursts(only_mib: int = 0) -> None:
    """Every way to run out of memory at full speed, from nothing, by each source."""
    from governor import pins

    governing = sources()
    print(f"{where()}; bursts at full speed\n", flush=True)
    loaded(INSTANCE)
    saved = dict.fromkeys(governing, 0)
    rows: list[list[object]] = []
    limits = (only_mib,) if only_mib else BURST_LIMITS_MIB
    try:
        for limit_mib in limits:
            for burst in BURSTS:
                row: list[object] = [limit_mib, burst]
                for way in governing:
                    told, kept = growth(way, limit_mib, 0, random.Random(1), burst, 0.0)
                    saved[way] += kept
                    row.append(told)
                    print(f"  {limit_mib} MiB, {burst}, {way}: {told}", flush=True)
                rows.append(row)
        rows.append(["session saved", "", *(f"{saved[way]} of {len(limits) * len(BURSTS)}" for way in governing)])
    finally:
        pins.unload(INSTANCE)
    print()
    table(["max, MiB", "burst", *governing], rows)


def peaks(only_mib: int = 0) -> None:
    """Peaks that end by themselves half a second later, of the agent itself."""
    from governor import pins

    governing = sources()
    print(f"{where()}; peaks from {START_RATIO:.0%} of max that end by themselves half a second later\n", flush=True)
    loaded(INSTANCE)
    rows: list[list[object]] = []
    try:
        for limit_mib in (only_mib,) if only_mib else LIMITS_MIB:
            for rate_mb in PEAK_RATES_MB:
                for ratio in PEAKS:
                    row: list[object] = [limit_mib, rate_mb or "full speed", f"{ratio:.2f}"]
                    for way in governing:
                        actions, took_s = peak(way, limit_mib, ratio, rate_mb, "peak")
                        needless = [name for name in actions if name != "braked"]
                        told = ", ".join(dict.fromkeys(needless)) or "lives"
                        row.append(f"{told}; {actions.count('braked')} brakes, {took_s:.1f} s")
                        print(f"  {limit_mib} MiB, {row[1]}, {ratio}, {way}: {row[-1]}", flush=True)
                    rows.append(row)
    finally:
        pins.unload(INSTANCE)
    print()
    table(["max, MiB", "MB/s", "of max", *governing], rows)
