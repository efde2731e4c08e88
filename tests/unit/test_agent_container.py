"""What a Python agent's container may hold: fixture trees of every kind, and the machine's own memcgs."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent import container
from governor.agent.container import Container, memcgs_around, memory_mounts
from tests.fakes.memory_tree import MIB, V1, V2, Tree

CG = "/sys/fs/cgroup"
POD = "/kubepods/burstable/pod1/c1"


def v2_mount(root="/", place=CG):
    return V2.format(root=root, place=place)


def v1_mount(root="/", place=CG + "/memory"):
    return V1.format(root=root, place=place)


@pytest.fixture(autouse=True)
def no_chosen_limit(monkeypatch):
    monkeypatch.delenv("MEMORY_LIMIT_MB", raising=False)


@pytest.mark.parametrize(
    ("membership", "mounts", "expected"),
    [
        ("0::/a/b", [v2_mount()], [f"{CG}/a/b", f"{CG}/a", CG]),
        ("0::/", [v2_mount()], [CG]),  # a cgroup namespace's root
        ("0::" + POD, [v2_mount(root=POD)], [CG]),  # no namespace, its own directory mounted
        ("0::" + POD + "/x", [v2_mount(root=POD)], [f"{CG}/x", CG]),
        ("0::/", [v2_mount(root="/..")], [CG]),  # mounted outside its namespace
        ("0::/../other", [v2_mount()], [CG]),  # moved out of its namespace
        ("0::/ab/c", [v2_mount(root="/a")], [CG]),  # "/ab" is not below "/a"
        ("0::/a", [v2_mount(place="/my\\040cgroup")], ["/my cgroup/a", "/my cgroup"]),
        ("4:memory:/a\n0::/", [v1_mount(), v2_mount(place=CG + "/unified")], [f"{CG}/memory/a", f"{CG}/memory"]),
        ("4:cpu,memory:/docker/1\n0::/", [v1_mount(root="/docker/1")], [f"{CG}/memory"]),
        ("4:memory:/a\n0::/b", [v2_mount()], [f"{CG}/b", CG]),  # v1's memory is nowhere mounted
        ("1:cpu:/a", [v1_mount()], []),
        ("", [v2_mount()], []),
        ("0::/a", [], []),
    ],
)
def test_where_the_memcgs_are(membership, mounts, expected):
    found = memcgs_around(membership.encode(), memory_mounts("\n".join(mounts).encode()))
    assert [memcg.path for memcg in found] == expected
    assert [memcg.is_mounted for memcg in found] == [False] * (len(expected) - 1) + [True] * bool(expected)


@given(membership=st.binary(max_size=200), mounts=st.binary(max_size=400))
def test_any_membership_and_mounts_are_read(membership, mounts):
    known = b"30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n" + mounts
    for memcg in memcgs_around(b"0::" + membership, memory_mounts(known)):
        assert ".." not in memcg.path.removeprefix(CG).split("/")


def test_the_tightest_of_the_ancestors_counts(tmp_path):
    tree = Tree(tmp_path, "0::/pod/agent", v2_mount())
    tree.v2(f"{CG}/pod/agent", 1000, 500, file_mib=100, slab_mib=50)
    tree.v2(f"{CG}/pod", 800, 700, file_mib=100)
    tree.v2(CG, None, 3000)
    reading = Container(root=str(tmp_path)).look()
    assert (reading.max_bytes, reading.unreclaimable_bytes) == (800 * MIB, 600 * MIB)
    assert (reading.usage_bytes, reading.bound_by) == (700 * MIB, f"{CG}/pod")
    assert reading.ratio == pytest.approx(0.75)
    assert reading.rss_bytes == 3 * MIB
    assert abs(reading.own_rss_bytes - int(Path("/proc/self/statm").read_text().split()[1]) * 4096) < 50 * MIB


def test_v1_counts_what_is_hierarchical_and_not_the_machines_root(tmp_path):
    tree = Tree(tmp_path, "4:memory:/agent\n0::/", v1_mount())
    tree.v1(f"{CG}/memory/agent", 400, 300, file_mib=100)
    tree.v1(f"{CG}/memory", None, 9999)
    (tmp_path / f"{CG[1:]}/memory/cgroup.sane_behavior").write_text("0\n")
    reading = Container(root=str(tmp_path)).look()
    assert (reading.max_bytes, reading.unreclaimable_bytes) == (400 * MIB, 200 * MIB)
    tree.move("4:memory:/\n0::/")
    assert Container(root=str(tmp_path)).look().bound_by == "RAM"


def test_changes_are_followed(tmp_path):
    tree = Tree(tmp_path, "0::/a", v2_mount())
    tree.v2(f"{CG}/a", 1000, 500)
    tree.v2(f"{CG}/b", 600, 300)
    container = Container(root=str(tmp_path))
    assert container.look().max_bytes == 1000 * MIB
    tree.v2(f"{CG}/a", 700, 500)  # resized in place
    assert container.look().max_bytes == 700 * MIB
    tree.move("0::/b")
    assert container.look().bound_by == f"{CG}/b"
    tree.move("0::/gone")
    assert container.look().bound_by == "RAM"


@pytest.mark.parametrize("max_mib", [None, 5000])
def test_without_a_limit_below_it_the_machines_memory_counts(tmp_path, max_mib):
    tree = Tree(tmp_path, "0::/a", v2_mount(), ram_mib=4096, available_mib=1024)
    tree.v2(f"{CG}/a", max_mib, 500)
    reading = Container(root=str(tmp_path)).look()
    assert (reading.bound_by, reading.max_bytes) == ("RAM", 4096 * MIB)
    assert reading.unreclaimable_bytes == 3072 * MIB


def test_no_cgroups_at_all(tmp_path):
    Tree(tmp_path, "")
    assert Container(root=str(tmp_path)).look().bound_by == "RAM"
    assert Container(root=str(tmp_path)).events_paths() == []


@pytest.mark.parametrize(
    ("membership", "own_max_mib", "held"),
    [
        ("0::/", None, "container"),  # all that is seen is its own memcg
        ("0::/a", 2000, "container"),  # something made a limit for it
        ("0::/a", None, "processes"),  # a login session: others are in there, too
    ],
)
def test_a_chosen_limit_counts_what_is_the_agents(tmp_path, monkeypatch, membership, own_max_mib, held):
    monkeypatch.setenv("MEMORY_LIMIT_MB", "1000")
    tree = Tree(tmp_path, membership, v2_mount())
    if membership == "0::/a":
        tree.v2(f"{CG}/a", own_max_mib, 900, file_mib=100)
    else:
        tree.v2(CG, own_max_mib, 900, file_mib=100)
    reading = Container(root=str(tmp_path)).look()
    assert (reading.bound_by, reading.max_bytes) == ("MEMORY_LIMIT_MB", 1000 * MIB)
    if held == "container":
        assert reading.unreclaimable_bytes == 800 * MIB
    else:
        assert reading.own_rss_bytes * 0.9 <= reading.unreclaimable_bytes < 700 * MIB


@pytest.mark.parametrize("asked", ["the kernel", "each process"])
def test_a_childs_memory_counts_against_a_chosen_limit(tmp_path, monkeypatch, asked):
    """A grandchild's, of a thread that is not the first; without a look at every process where the kernel knows."""
    Tree(tmp_path, "")
    if asked == "each process":
        monkeypatch.setattr("governor.agent.container._children", container._children_of_all)
    else:
        assert Path("/proc/thread-self/children").exists()
        monkeypatch.setattr("psutil.pids", lambda: pytest.fail("looked at every process"))
        monkeypatch.setattr("psutil._ppid_map", lambda: pytest.fail("looked at every process"))
    looked = Container(500 * MIB, root=str(tmp_path))
    before = looked.look().unreclaimable_bytes
    child = "x = bytearray(b'1') * (64 << 20); print(1, flush=True); input()"
    command = ["sh", "-c", '"$@"; true', "sh", sys.executable, "-c", child]
    with (
        ThreadPoolExecutor() as pool,
        pool.submit(subprocess.Popen, command, stdin=-1, stdout=-1).result() as process,
    ):
        process.stdout.readline()
        after = looked.look().unreclaimable_bytes
        process.stdin.close()
    assert after - before > 60 * MIB


@pytest.mark.parametrize("text", ["0", "-5", "many", "1e3", "1 000", "nan"])
def test_a_bad_chosen_limit_is_refused(tmp_path, monkeypatch, text):
    Tree(tmp_path, "")
    monkeypatch.setenv("MEMORY_LIMIT_MB", text)
    with pytest.raises(ValueError, match="MEMORY_LIMIT_MB: found"):
        Container(root=str(tmp_path))
