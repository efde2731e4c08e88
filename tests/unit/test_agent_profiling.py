"""The verdict on samples of all shapes; what a profile names; `python -m governor.agent profile`."""

import gc
import math
import random
import signal
import subprocess
import sys
from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent.leak import Verdict, judge
from governor.agent.profiling import Profiler

MIB = 1 << 20
CHANCE = random.Random(5)
SHAPES = {  # bytes after i of n samples, a second apart
    "a straight line": (lambda i, n: 1000 * i * 1000, Verdict.LEAK),
    "a line with noise": (lambda i, n: 100_000 * i + CHANCE.randint(0, 2 * MIB), Verdict.LEAK),
    "a line with collections": (lambda i, n: 100_000 * i + (i % 7) * 300_000, Verdict.LEAK),
    "steps": (lambda i, n: i // 5 * MIB, Verdict.LEAK),
    "single peaks on a line": (lambda i, n: 200_000 * i + (i % 11 == 3) * 500 * MIB, Verdict.LEAK),
    "ever faster": (lambda i, n: 1000 * i * i, Verdict.LEAK),
    "nothing": (lambda i, n: 50 * MIB, Verdict.NO_LEAK),
    "noise": (lambda i, n: 50 * MIB + CHANCE.randint(-MIB, MIB), Verdict.NO_LEAK),
    "a saw": (lambda i, n: 50 * MIB + (i % 10) * MIB, Verdict.NO_LEAK),
    "a single peak": (lambda i, n: 50 * MIB + (i == n // 2) * 900 * MIB, Verdict.NO_LEAK),
    "falling": (lambda i, n: 50 * MIB - i * 1000, Verdict.NO_LEAK),
    "a cache that fills": (lambda i, n: min(i, n // 3) * MIB, Verdict.NO_LEAK),
    "a heap that warms up": (lambda i, n: int(100 * MIB * (1 - math.exp(-12 * i / n))) // MIB * MIB, Verdict.NO_LEAK),
    "growth of a few bytes": (lambda i, n: 50 * MIB + i * 10, Verdict.NO_LEAK),
}


@pytest.mark.parametrize("count", [60, 700])
@pytest.mark.parametrize("shape", SHAPES)
def test_verdict(shape, count):
    of, expected = SHAPES[shape]
    found = judge([(float(i), of(i, count)) for i in range(count)])
    assert (found.verdict, found.samples) == (expected, count), found
    if expected is Verdict.LEAK:
        assert found.confidence >= 0.99


def test_how_fast():
    found = judge([(i / 2, 10 * MIB + 3000 * i + CHANCE.randint(0, 900)) for i in range(100)])
    assert found.bytes_per_s == pytest.approx(6000, rel=0.02)
    assert "bytes a second" in found.why


@pytest.mark.parametrize("count", [0, 1, 9])
def test_too_few_samples_say_nothing(count):
    found = judge([(float(i), i * MIB) for i in range(count)])
    assert (found.verdict, found.why) == (Verdict.UNKNOWN, f"{count} samples, at least 10 are needed")


@given(st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 1 << 40)), max_size=40))
def test_any_samples_have_a_verdict(samples):
    found = judge(sorted(samples))
    assert 0 <= found.confidence <= 1 and math.isfinite(found.bytes_per_s)


def test_noise_is_seldom_called_a_leak():
    chance = random.Random(11)

    def walk():
        return judge([(float(i), 50 * MIB + chance.randint(0, 10 * MIB)) for i in range(60)]).verdict

    assert [walk() for _ in range(200)].count(Verdict.LEAK) <= 2


def test_names_where_it_comes_from():
    def grow():
        return [bytearray(10_000) for _ in range(300)]

    warm = [bytearray(10_000) for _ in range(100)]
    with Profiler(frames=5) as profiler:
        first = grow()
        profiler.baseline()
        second = grow()
        line = f"{__file__}:{grow.__code__.co_firstlineno + 1}"
        top, growth = profiler.top(3), profiler.growth(3)
        by_traceback = profiler.growth(1, by="traceback")[0]
    assert top[0].frames == (line,) and growth[0].frames == (line,)
    assert top[0].size_bytes == pytest.approx(600 * 10_057, rel=0.02)
    assert growth[0].growth_bytes == pytest.approx(300 * 10_057, rel=0.02)
    assert top[0].count == pytest.approx(1200, rel=0.01)  # a bytearray, and its buffer
    assert line in by_traceback.frames and len(by_traceback.frames) > 1
    assert len(warm) + len(first) + len(second) == 700


def test_a_leak_while_it_runs():
    kept = []
    with Profiler() as profiler:
        for _ in range(30):
            kept.append(bytearray(100_000))
            profiler.sample()
        gc.collect()
        assert profiler.leak().verdict is Verdict.LEAK
        report = profiler.report(3)
    assert "Python's memory: leak (" in report and "test_agent_profiling.py" in report


SCRIPT = """
import sys, time, signal, os
kept = []

def leak():
    kept.append(bytearray(50_000))

assert __name__ == "__main__" and __file__ == sys.argv[0]
import beside
for i in range(60):
    leak()
    time.sleep(0.02)
print(sys.argv[1:])
{end}
"""
ENDS = {
    "at its end": ("", 0, ""),
    "with a status": ("sys.exit(7)", 7, ""),
    "with words": ("sys.exit('words')", 1, "words"),
    "with an exception": ("1 / 0", 1, "ZeroDivisionError"),
    "by SIGTERM": ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)", 143, ""),
    "by SIGINT": ("os.kill(os.getpid(), signal.SIGINT); time.sleep(9)", 130, ""),
}


@pytest.mark.parametrize("end", ENDS)
def test_profile_a_script(tmp_path, end):
    code, status, said = ENDS[end]
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(end=code))
    (tmp_path / "beside.py").write_text("")
    command = [
        sys.executable,
        "-m",
        "governor.agent",
        "profile",
        "--interval",
        "0.05",
        "--top",
        "2",
        "--by",
        "traceback",
    ]
    usual = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    ended = subprocess.run([*command, script, "a", "--top", "b"], capture_output=True, text=True, preexec_fn=usual)
    assert (ended.returncode, ended.stdout) == (status, "['a', '--top', 'b']\n"), ended.stderr
    assert "Python's memory: leak (" in ended.stderr
    assert f"{script}:6\n            from {script}:11\n" in ended.stderr
    assert "__main__.py" not in ended.stderr
    assert said in ended.stderr


def test_to_a_file_after_warming_up(tmp_path):
    script, report = tmp_path / "script.py", tmp_path / "report"
    script.write_text("import time\nwarm = bytearray(5_000_000)\ntime.sleep(0.6)\nlate = bytearray(2_000_000)\n")
    command = [
        sys.executable,
        "-m",
        "governor.agent",
        "profile",
        "--baseline-after",
        "0.3",
        "--output",
        report,
        script,
    ]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    grown, most = report.read_text().split("most in use:")
    assert f"{script}:4" in grown and f"{script}:2" not in grown and f"{script}:2" in most


@pytest.mark.parametrize("what", ["missing", "no Python"])
def test_what_is_no_script(tmp_path, what):
    script = tmp_path / "script.py"
    if what == "no Python":
        script.write_text("this is no script")
    ended = subprocess.run(
        [sys.executable, "-m", "governor.agent", "profile", script], capture_output=True, text=True
    )
    assert ended.returncode == 2
    assert "expected a Python script" in ended.stderr


def profile(*words):
    command = [sys.executable, "-m", "governor.agent", "profile", *words]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--frames", "0"),
        ("--frames", "65536"),
        ("--interval", "nan"),
        ("--interval", "inf"),
        ("--baseline-after", "1e300"),
        ("--interval", "-1"),
        ("--output", "/nowhere/report"),
    ],
)
def test_options_that_mean_nothing(tmp_path, option, value):
    """Said before the script runs, not hours later."""
    (tmp_path / "script.py").write_text("print('ran')")
    ended = profile(option, value, tmp_path / "script.py")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert f"{option}" in ended.stderr and "expected" in ended.stderr


def test_a_report_that_cannot_be_written_is_shown(tmp_path):
    (tmp_path / "script.py").write_text("")
    ended = profile("--output", "/dev/full", tmp_path / "script.py")
    assert ended.returncode == 0
    assert "/dev/full: No space left" in ended.stderr and "Python's memory" in ended.stderr


def test_a_script_has_its_own_future(tmp_path):
    """Annotations of Python before 3.14 are evaluated, unless the script says otherwise."""
    (tmp_path / "script.py").write_text("import sys\nx: sys.maxsize = 1\nprint(__annotations__['x'] == sys.maxsize)")
    if sys.version_info < (3, 14):
        assert profile(tmp_path / "script.py").stdout == "True\n"


def test_the_memory_of_a_thread_that_goes_on_is_in_the_report(tmp_path):
    code = (
        "import threading, time\nkept = []\ndef work():\n    time.sleep(0.5)\n    kept.append(bytearray(5_000_000))\n"
    )
    (tmp_path / "script.py").write_text(code + "threading.Thread(target=work).start()\n")
    assert f"{tmp_path / 'script.py'}:5" in profile(tmp_path / "script.py").stderr


def test_a_second_sigterm_does_not_cost_the_report(tmp_path):
    code = "import os, signal, threading, time\n"
    code += "def again():\n    time.sleep(0.2)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
    code += "kept = [str(i) for i in range(5_000)]\n"  # a report takes a while
    code += "threading.Thread(target=again, daemon=True).start()\nos.kill(os.getpid(), signal.SIGTERM)\n"
    (tmp_path / "script.py").write_text(code)
    ended = profile("--by", "traceback", tmp_path / "script.py")
    assert ended.returncode == 143 and "Python's memory" in ended.stderr, ended.stderr
