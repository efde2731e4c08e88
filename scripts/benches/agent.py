"""governor.agent: what its import and its looks cost, and what each of the runtime's settings brings."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys

from benches.common import ROOT, table, where

HEAD = """
import gc, json, os, sys, threading, time
PAGE = os.sysconf("SC_PAGE_SIZE")
def rss(): return int(open("/proc/self/statm").read().split()[1]) * PAGE / 2**20
def vm(): return int(open("/proc/self/statm").read().split()[0]) * PAGE / 2**20
"""
SET = "from governor.agent import configure_runtime\nconfigure_runtime(**{{**dict({none}), **dict({wanted})}})\n"
NONE = "gc_thresholds=None, gc_freeze=False, arenas=None, trim_threshold_bytes=None, stack_bytes=None"

IMPORT = """
{first}
before, begun = rss(), time.perf_counter()
{what}
print(json.dumps([(time.perf_counter() - begun) * 1e3, rss() - before]))
"""
LOOK = """
from governor.agent import MemoryPressure
pressure = MemoryPressure()
def each(call, count):
    begun = time.perf_counter()
    for _ in range(count): call()
    return (time.perf_counter() - begun) / count * 1e6
print(json.dumps([each(pressure.look, 500), each(pressure.accepting, 100_000)]))
"""
CYCLES = """
class Node: pass
peak = before = rss()
for i in range(60_000):
    node = Node(); node.itself = node; node.payload = bytearray(4000)
    if i % 100 == 0: peak = max(peak, rss())
begun = time.perf_counter()
documents = [{"a": [i], "b": {"c": i}} for i in range(600_000)]
print(json.dumps([peak - before, time.perf_counter() - begun]))
"""
FREEZE = """
documents = [{"a": [i]} for i in range(500_000)]
SETTING
def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024
begun = time.perf_counter(); gc.collect(); took = time.perf_counter() - begun
read, write = os.pipe()
if os.fork() == 0:
    before = private(); gc.collect(); os.write(write, str(private() - before).encode()); os._exit(0)
print(json.dumps([took * 1e3, float(os.read(read, 100))]))
"""
ARENAS = """
kept, barrier = [], threading.Barrier(16)
def work():
    barrier.wait()
    for _ in range(5):
        live = [bytes(1000 + i % 3000) for i in range(2000)]
        kept.append(live[::100]); time.sleep(0.01)
    del live
    barrier.wait()
before, begun = rss(), time.perf_counter()
threads = [threading.Thread(target=work) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps([rss() - before, time.perf_counter() - begun]))
"""
TRIM = """
before = rss()
block = bytearray(30 << 20); del block
small, begun = [], time.perf_counter()
for _ in range(5):
    large = []
    for _ in range(40): large.append(b"1" * (4 << 20)); small.append(bytes(2000))
    del large
print(json.dumps([rss() - before, time.perf_counter() - begun]))
"""
STACK = """
before, reserved, done = rss(), vm(), threading.Event()
threads = [threading.Thread(target=done.wait) for _ in range(100)]
for thread in threads: thread.start()
time.sleep(0.3)
print(json.dumps([rss() - before, vm() - reserved])); done.set()
"""


def run(code: str, wanted: str = "", times: int = 5) -> list[float]:
    """The medians of what it prints, each time in a process of its own."""
    setting = SET.format(none=NONE, wanted=wanted)
    whole = HEAD + (code.replace("SETTING", setting) if "SETTING" in code else setting + code)
    return _medians(whole, times)


def _medians(code: str, times: int) -> list[float]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = [
        json.loads(subprocess.run([sys.executable, "-c", code], env=environment, stdout=-1, check=True).stdout)
        for _ in range(times)
    ]
    return [statistics.median(values) for values in zip(*said, strict=True)]


def agent() -> None:
    print(f"{where()}, Python {platform.python_version()}, {' '.join(platform.libc_ver())}; medians of 5 processes\n")
    rows: list[list[object]] = []
    cases = [
        ("governor.agent", "", "import governor.agent"),
        ("MemoryPressure", "", "from governor.agent import MemoryPressure"),
        ("MemoryPressure, asyncio there already", "import asyncio", "from governor.agent import MemoryPressure"),
        ("every name", "", "from governor.agent import *"),
    ]
    for name, first, what in cases:
        took_ms, grown_mib = _medians(HEAD + IMPORT.format(first=first, what=what), 5)
        rows.append([name, f"{took_ms:.1f}", f"{grown_mib:.1f}"])
    table(["import", "ms", "RSS, MiB"], rows)
    look_us, ask_us = _medians(HEAD + LOOK, 5)
    print(f"\na look: {look_us:.0f} us; accepting() between two looks: {ask_us:.2f} us\n", flush=True)
    rows = []
    for thresholds in ("(700, 10, 10)", "(5000, 10, 10)", "(50000, 10, 10)"):
        peak_mib, took_s = run(CYCLES, f"gc_thresholds={thresholds}")
        rows.append(
            [f"gc thresholds {thresholds}", f"{peak_mib:.0f} MiB of cyclic garbage", f"{took_s:.2f} s to build"]
        )
    for frozen in (False, True):
        took_ms, copied_mib = run(FREEZE, f"gc_freeze={frozen}")
        rows.append(
            [f"gc freeze {frozen}", f"{copied_mib:.1f} MiB copied by a fork", f"{took_ms:.2f} ms a collection"]
        )
    for count in (None, 1, 2, 4):
        kept_mib, took_s = run(ARENAS, f"arenas={count}")
        rows.append([f"arenas {count}", f"{kept_mib:.0f} MiB kept", f"{took_s:.2f} s"])
    for size in (None, 128 << 10):
        kept_mib, took_s = run(TRIM, f"trim_threshold_bytes={size}")
        rows.append([f"trim threshold {size}", f"{kept_mib:.0f} MiB kept", f"{took_s:.2f} s"])
    for size in (None, 256 << 10):
        grown_mib, reserved_mib = run(STACK, f"stack_bytes={size}")
        rows.append([f"stack {size}", f"{grown_mib:.1f} MiB RSS", f"{reserved_mib:.0f} MiB reserved"])
    table(["setting", "memory", "cost"], rows)
