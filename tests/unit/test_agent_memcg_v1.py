"""governor.agent in this machine's own memcgs, where they are cgroup v1's; v2's are tests/kernel's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MIB = 1 << 20
V1_PARENT = Path("/sys/fs/cgroup/memory")
LEAKY = Path(__file__).parent.parent / "fakes" / "leaky_agent.py"
ROOT = Path(__file__).parent.parent.parent
LOOKS = """
import sys
from governor.agent import Container
first = Container().look()
held = bytearray(b"1") * (40 << 20)
with open(sys.argv[1], "wb") as file:
    for _ in range(40): file.write(bytes(1 << 20))
second = Container().look()
print(first.max_bytes, second.max_bytes, first.unreclaimable_bytes, second.unreclaimable_bytes, second.usage_bytes)
print(second.bound_by)
"""


@pytest.fixture
def memcg():
    path = V1_PARENT / f"governor-test-{os.getpid()}"
    try:
        path.mkdir()
        (path / "memory.limit_in_bytes").write_text(str(80 * MIB))
    except OSError as error:
        pytest.skip(f"no cgroup v1 memcg can be made here: {error}")
    yield path
    path.rmdir()


def run_in(memcg, *argv):
    def enter():
        (memcg / "cgroup.procs").write_text(str(os.getpid()))

    command = [sys.executable, *(str(word) for word in argv)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, preexec_fn=enter, capture_output=True, text=True, timeout=120, env=environment)


def test_a_memcg_is_read(memcg, tmp_path):
    (memcg / "memory.limit_in_bytes").write_text(str(200 * MIB))
    numbers, bound_by = run_in(memcg, "-c", LOOKS, tmp_path / "file").stdout.splitlines()
    first_max, second_max, before, after, usage = (int(word) for word in numbers.split())
    assert first_max == second_max == 200 * MIB
    assert 38 * MIB <= after - before <= 60 * MIB  # the file's cache is not in it
    assert usage > after
    assert bound_by == str(memcg)


def test_a_leaky_agent_sheds_load_and_lives(memcg):
    ended = run_in(memcg, LEAKY, 1000, "--protected")
    assert ended.returncode == 0, ended.stderr
    said = json.loads(ended.stdout)
    assert said["served"] == 1000
    assert said["refused"] > 0
    assert said["recovered"] >= 2
    assert 0.85 <= said["highest"] < 1
    assert said["bound_by"] == str(memcg)


def test_without_protection_the_kernel_ends_it(memcg):
    assert run_in(memcg, LEAKY, 1000).returncode == -9
