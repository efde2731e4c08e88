"""configure_runtime(): what it says was done has its effect, in a process of its own for each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from governor.agent import configure_runtime, environment

ROOT = Path(__file__).parent.parent.parent
COUNT_ARENAS = """
import ctypes, json, re, tempfile, threading
libc = ctypes.CDLL(None)
libc.fopen.restype = ctypes.c_void_p
def arenas():
    with tempfile.NamedTemporaryFile() as file:
        stream = ctypes.c_void_p(libc.fopen(file.name.encode(), b"w"))
        libc.malloc_info(0, stream)
        libc.fclose(stream)
        return len(re.findall(r"<heap nr=", open(file.name).read()))
def in_threads(count=8):
    barrier = threading.Barrier(count)
    def work():
        kept = [bytes(2000) for _ in range(100)]
        barrier.wait()
    threads = [threading.Thread(target=work) for _ in range(count)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
"""
ARENAS = "in_threads(); print(json.dumps(arenas()))"
KEPT = """
import json
from governor.agent.container import own_rss_bytes as rss_bytes
block = bytearray(30 << 20); del block
small, before = [], rss_bytes()
for _ in range(5):
    large = []
    for _ in range(20):
        large.append(bytearray(b"1") * (4 << 20)); small.append(bytes(2000))
    del large
print(json.dumps(rss_bytes() - before))
"""
RESERVED = """
import json, threading
def reserved(): return int(open("/proc/self/statm").read().split()[0]) * 4096
held, before = threading.Event(), reserved()
threads = [threading.Thread(target=held.wait) for _ in range(20)]
for thread in threads: thread.start()
print(json.dumps(reserved() - before))
held.set()
"""
NONE = "gc_thresholds=None, gc_freeze=False, arenas=None, trim_threshold_bytes=None, stack_bytes=None"


def figure(code, settings, env=None):
    """What the code prints in a fresh process with these settings, and the settings it reported."""
    call = f"configure_runtime(**{{**dict({NONE}), **dict({settings})}})"
    begin = f"import dataclasses, json\nfrom governor.agent import configure_runtime\nsaid = {call}\n"
    end = "print(json.dumps([dataclasses.asdict(one) for one in said]))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
    ran = subprocess.run(
        [sys.executable, "-c", begin + code + "\n" + end], capture_output=True, text=True, env=environment, timeout=60
    )
    assert ran.returncode == 0, ran.stderr
    found, said = (json.loads(line) for line in ran.stdout.splitlines())
    return found, {one["name"]: one for one in said}


def test_arenas_are_no_more_than_was_said():
    many, _ = figure(COUNT_ARENAS + ARENAS, "")
    few, said = figure(COUNT_ARENAS + ARENAS, "arenas=2")
    from_start, _ = figure(COUNT_ARENAS + ARENAS, "", environment(arenas=1))
    assert many > few
    assert few <= 2
    assert from_start == 1
    assert said["glibc arenas"]["effective"]
    assert said["glibc arenas"]["note"] == ""


def test_what_threads_have_already_is_said():
    code = """
import threading
done = threading.Event()
thread = threading.Thread(target=done.wait)
thread.start()
said = configure_runtime(arenas=2, stack_bytes=1 << 20)
print(1)
done.set()
"""
    _, said = figure(code, "")
    assert said["glibc arenas"]["note"].endswith("before the start: MALLOC_ARENA_MAX=2")
    assert said["thread stack"]["note"] == "was the system default; 1 threads run with what they have"


def test_large_blocks_go_back_to_the_kernel():
    kept, _ = figure(KEPT, "")
    given_back, said = figure(KEPT, "trim_threshold_bytes=128 << 10")
    assert given_back < 5 << 20 < kept
    assert said["glibc trim"]["effective"]


def test_stacks_reserve_less():
    usual, _ = figure(RESERVED, "")
    small, said = figure(RESERVED, "stack_bytes=256 << 10")
    assert usual - small > 20 * (6 << 20)
    assert said["thread stack"]["effective"]


def test_thresholds_of_the_collector():
    found, said = figure("import gc; print(json.dumps(gc.get_threshold()))", "gc_thresholds=(500, 9, 8)")
    assert found == [500, 9, 8]
    assert said["gc thresholds"]["effective"]
    found, said = figure("print(0)", "gc_thresholds=__import__('gc').get_threshold()")
    assert said["gc thresholds"]["note"] == "was so already"
    assert not said["gc thresholds"]["effective"]


def test_what_is_frozen_is_not_collected():
    found, said = figure("import gc; print(json.dumps(gc.get_freeze_count()))", "gc_freeze=True")
    assert found > 1000
    assert said["gc freeze"]["effective"]


def test_every_setting_says_why_how_much_and_what_it_costs():
    _, said = figure("print(0)", "")
    assert set(said) == {"gc thresholds", "gc freeze", "glibc arenas", "glibc trim", "thread stack"}
    for one in said.values():
        assert not one["effective"]
        assert one["note"] == "not asked for"
        assert one["reason"]
        assert one["measured"]
        assert one["cost"]


def test_another_allocator_is_not_pretended_to_obey(tmp_path):
    library = tmp_path / "libjemalloc.so"  # one by that name: no allocator, but what is looked for
    source = tmp_path / "empty.c"
    source.write_text("int nothing_of_an_allocator;\n")
    subprocess.run(["cc", "-shared", "-o", library, source], check=True)
    _, said = figure("print(0)", "arenas=2, trim_threshold_bytes=1 << 17", {"LD_PRELOAD": str(library)})
    for name in ("glibc arenas", "glibc trim"):
        assert not said[name]["effective"]
        assert said[name]["note"] == "libjemalloc allocates in glibc's place"


@pytest.mark.parametrize(
    "wrong", [{"arenas": 0}, {"trim_threshold_bytes": -1}, {"trim_threshold_bytes": 1 << 26}, {"stack_bytes": 1}]
)
def test_values_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ValueError, match=f"found {next(iter(wrong))}="):
        configure_runtime(**({"gc_thresholds": None, "arenas": None, "trim_threshold_bytes": None} | wrong))
