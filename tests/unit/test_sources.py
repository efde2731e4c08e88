"""Limits and polling over fake trees; the subtree brake over real processes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from governor import cgroup, limits, poll_source, record, subtree
from governor.brake import FREEZE, NONE, STOP, KnobFile
from governor.limits import Limits
from governor.poll_source import PollSource
from governor.poller import Poller
from governor.record import HORIZON, Levels

MIB, SECOND = 1 << 20, 1_000_000_000
CALM = Levels(horizon_ns=0)


class Node:
    """A fake memcg of cgroup v2 whose files can be rewritten."""

    def __init__(self, path, usage_mib=0, max_mib=None):
        self.path = path
        path.mkdir()
        self.set(usage_mib, max_mib)

    def set(self, usage_mib, max_mib=None, cached_mib=0):
        (self.path / "memory.stat").write_text(f"inactive_file {int(cached_mib * MIB)}\n")
        (self.path / "memory.current").write_text(f"{int(usage_mib * MIB)}\n")
        (self.path / "memory.max").write_text(f"{int(max_mib * MIB)}\n" if max_mib else "max\n")


@pytest.fixture
def tree(tmp_path):
    pod = Node(tmp_path / "pod", 100, 1000)
    return pod, Node(tmp_path / "pod" / "agent", 50)


def source_of(node):
    found = Limits(cgroup.Memcg(str(node.path)))
    return found, PollSource(found, Poller(), False, 0, print)


def test_the_tightest_limit_counts(tree):
    pod, agent = tree
    found, _ = source_of(agent)
    assert found.memory_state(0).max_bytes == 1000 * MIB
    assert found.tightest.path == str(pod.path)
    agent.set(50, 60)
    assert found.memory_state(0).max_bytes == 60 * MIB
    agent.set(50, 5000)
    assert found.memory_state(0).max_bytes == 1000 * MIB
    found.chosen_bytes = 55 * MIB  # the policy's
    assert found.memory_state(0).max_bytes == 55 * MIB
    assert found.own_share_bytes(7) == found.own_high_bytes(7) == 7


@pytest.mark.parametrize(
    ("before", "after", "ratio"),
    [
        pytest.param((700, 50), (970, 51), 0.051, id="a sibling fills the pod"),
        pytest.param((700, 50), (970, 310), 0.97, id="the agent does"),
        pytest.param((970, 600), (970, 600), 0.97, id="the agent holds most of it, and nobody grows"),
        pytest.param((970, 50), (970, 50), 0.05, id="the sibling does"),
        pytest.param((900, 600), (930, 600), 0.6, id="it holds most of it, and a sibling grows"),
        pytest.param((930, 600), (975, 600), 0.975, id="the same, and little is left"),
    ],
)
def test_an_agent_answers_for_its_part_of_the_pod(tree, before, after, ratio):
    pod, agent = tree
    found = Limits(cgroup.Memcg(str(agent.path)))
    for number, (pod_mib, agent_mib) in enumerate((before, after)):
        pod.set(pod_mib, 1000)
        agent.set(agent_mib)
        part = found.own_part(found.memory_state(number * SECOND))
    assert part.unreclaimable_ratio == pytest.approx(ratio)


def test_its_own_limit_counts_where_a_sibling_fills_the_pod(tree):
    pod, agent = tree
    pod.set(970, 1000)
    agent.set(50, 100)
    found = Limits(cgroup.Memcg(str(agent.path)))
    assert found.own_part(found.memory_state(0)).unreclaimable_ratio == 0.5


def test_a_usage_of_an_ancestor_as_the_same_part_of_what_the_governed_memcg_uses(tree):
    found, _ = source_of(tree[1])
    found.look(0)
    assert found.own_share_bytes(90 * MIB) == 45 * MIB


def test_an_agent_is_not_throttled_for_what_its_siblings_have_cached(tree):
    pod, agent = tree
    found, _ = source_of(agent)
    pod.set(900, 1000, cached_mib=300)
    agent.set(400, 5000, cached_mib=20)
    found.look(0)
    assert found.own_high_bytes(930 * MIB) == (930 - 600 + 380) * MIB
    assert found.own_high_bytes(200 * MIB) == 380 * MIB  # a sibling took the rest


def test_without_any_limit_the_machine_is_one(tree, monkeypatch):
    pod, agent = tree
    pod.set(100)
    left = [400 * MIB]
    monkeypatch.setattr(limits, "_available_bytes", lambda: left[0])
    found, _ = source_of(agent)
    assert found.memory_state(0).max_bytes == 450 * MIB
    assert found.of_machine
    left[0] = 10 * MIB
    assert found.memory_state(SECOND - 1).max_bytes == 450 * MIB
    assert found.memory_state(SECOND).max_bytes == 60 * MIB


@pytest.mark.parametrize(
    ("path", "above"),
    [
        ("/sys/fs/cgroup/a/b", ["/sys/fs/cgroup/a", "/sys/fs/cgroup"]),
        ("/sys/fs/cgroup", []),
        ("/sys/fs/cgroup/kubepods/burstable/pod1/c", ["/sys/fs/cgroup/kubepods/burstable/pod1"]),
        ("/sys/fs/cgroup/kubepods/pod1/c", ["/sys/fs/cgroup/kubepods/pod1"]),
        (
            "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice/x.scope",
            ["/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1.slice"],
        ),
        (  # kind's, or another cgroupRoot's
            "/sys/fs/cgroup/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice"
            "/kubelet-kubepods-burstable-pod1.slice/x.scope",
            [
                "/sys/fs/cgroup/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice"
                "/kubelet-kubepods-burstable-pod1.slice"
            ],
        ),
        (
            "/sys/fs/cgroup/a-kubepods.slice/a-kubepods-pod1.slice/x.scope",
            ["/sys/fs/cgroup/a-kubepods.slice/a-kubepods-pod1.slice"],
        ),
    ],
)
def test_ancestors_end_at_the_pod(path, above):
    assert limits.ancestors(path) == above


def test_meminfo():
    assert limits.parse_meminfo(b"MemTotal:   9 kB\nMemAvailable:     1234 kB\n") == 1234 << 10
    assert limits.parse_meminfo(b"MemAvailable:\n") == 0


def test_polling_reports_a_crossing_and_looks_sooner_the_less_room_there_is(tree):
    _, agent = tree
    agent.set(50, 1000)
    _, source = source_of(agent)
    assert source.look(CALM, 0, watched=False) is None
    far_ns = source.due_ns
    agent.set(910, 1000)
    found = source.look(CALM, SECOND, watched=False)
    assert (found.level, found.rising, found.cgroup_id) == (3, True, os.stat(agent.path).st_ino)
    assert found.fill_rate_bytes == 860 * MIB
    assert found.bound_ratio == pytest.approx(0.91)
    assert source.due_ns - SECOND < far_ns / 5


def test_beside_bpf_it_looks_once_a_second_and_reports_only_what_was_missed(tree):
    _, agent = tree
    agent.set(910, 1000)
    _, source = source_of(agent)
    source.look(CALM, 0, watched=True)
    assert source.due_ns == SECOND
    agent.set(100, 1000)
    assert source.look(CALM, SECOND, watched=True) is None
    agent.set(950, 1000)
    assert source.look(CALM, 2 * SECOND, watched=True).level == 3
    source.hurry(2 * SECOND)
    source.look(CALM, 2 * SECOND, watched=True)
    assert source.due_ns < 3 * SECOND


def test_a_sibling_that_fills_the_pod_does_not_brake_the_agent(tree):
    pod, agent = tree
    _, source = source_of(agent)
    source.look(CALM, 0, watched=False)
    pod.set(920, 1000)  # the agent did not grow
    assert source.look(CALM, SECOND, watched=False) is None
    pod.set(930, 1000)
    agent.set(60)
    assert source.look(CALM, 2 * SECOND, watched=False).level == 3


def test_max_near_in_time_is_flagged(tree):
    _, agent = tree
    agent.set(600, 1000)
    _, source = source_of(agent)
    source.look(Levels(), 0, watched=False)
    agent.set(800, 1000)
    assert source.look(Levels(), SECOND // 50, watched=False).flags & HORIZON


class Registered(Poller):
    """epoll takes no plain files."""

    def __init__(self):
        self.fds = set()

    def register(self, fd, on_ready, events):
        self.fds.add(fd)

    def unregister(self, fd):
        self.fds.remove(fd)


def test_victims_of_the_oom_killer_are_told_and_a_memcg_that_is_gone_is_closed(tree):
    _, agent = tree
    events = agent.path / "memory.events"
    events.write_text("oom 2\noom_kill 1\n")
    poller = Registered()
    source = PollSource(Limits(cgroup.Memcg(str(agent.path))), poller, True, 0, print)
    assert source.name == poll_source.POLL  # memory.pressure is not there
    assert poller.fds == set(source.fds) != set()
    assert source.stirred(1) is None
    events.write_text("oom 2\noom_kill 2\n")
    assert source.stirred(2).kind == record.OOM_KILL
    assert source.stirred(3) is None
    (agent.path / "memory.current").write_text("")
    assert source.look(CALM, 5, watched=False) is None
    assert poller.fds == set(source.fds) == set()
    assert source.due_ns == 5 + SECOND


def test_files_that_cannot_be_waited_for_are_closed_and_it_polls(tree):
    """As on gVisor, and here, where they are plain ones."""
    _, agent = tree
    for name in ("memory.events", "memory.pressure"):
        (agent.path / name).write_text("")
    found, poller = Limits(cgroup.Memcg(str(agent.path))), Poller()
    before = len(os.listdir("/proc/self/fd"))
    source = PollSource(found, poller, True, 0, print)
    assert (source.name, source.fds) == (poll_source.POLL, [])
    assert len(os.listdir("/proc/self/fd")) == before
    source.close()


# cgroup v1


STAT_V1 = b"cache 5\nrss 1\ntotal_rss 70\ntotal_inactive_file 20\ntotal_active_file 10\ninactive_file 1\n"


def test_v1_counts_what_is_hierarchical():
    state = cgroup.memory_state_v1(b"1000\n", b"2000\n", STAT_V1)
    assert (state.anon_bytes, state.file_lru_bytes, state.unreclaimable_bytes) == (70, 30, 970)
    assert cgroup.parse_limit_v1(b"9223372036854771712\n") == cgroup.UNLIMITED
    with pytest.raises(ValueError, match="invalid literal"):
        cgroup.parse_limit_v1(b"max")


def test_a_v1_memcg_is_read_and_never_frozen(tmp_path):
    path = tmp_path / "v1"
    path.mkdir()
    for name, content in {
        "memory.usage_in_bytes": b"1000\n",
        "memory.limit_in_bytes": b"2000\n",
        "memory.stat": STAT_V1,
    }.items():
        (path / name).write_bytes(content)
    memcg = cgroup.Memcg(str(path))
    assert memcg.v1
    assert memcg.memory_state().max_bytes == 2000
    assert memcg.limit_bytes() == 2000
    assert memcg.exists()
    assert knobs_of(tmp_path, path).brake == STOP


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"0::/a/b\n", {"": "/a/b"}),
        (b"4:memory:/x\n3:cpu,cpuacct:/y:z\n0::/\n", {"memory": "/x", "cpu": "/y:z", "cpuacct": "/y:z", "": "/"}),
        (b"garbage\n\xff\n", {}),
    ],
)
def test_memberships(data, found):
    assert cgroup.parse_membership(data) == found


def test_inside_is_not_a_common_beginning():
    assert cgroup.is_inside("/c/ab/x", "/c/ab")
    assert cgroup.is_inside("/c/ab", "/c/ab")
    assert not cgroup.is_inside("/c/abc", "/c/ab")
    assert not cgroup.is_inside(None, "/c")


# The agent's own processes


def knobs_of(tmp_path, memcg_path):
    file = KnobFile(str(tmp_path / "knobs"))
    file.adopt(0, str(memcg_path), os.stat(memcg_path).st_ino)
    return file.knobs(0)


FORKS = "import os, time\nif os.fork(): time.sleep(60)\nelse: print(os.getpid(), flush=True); time.sleep(60)"


class Family:
    """An agent with a child, and a stranger, in a fake memcg."""

    def __init__(self, path):
        self.path = path
        (path / "memory.stat").write_text("")
        (path / "memory.current").write_text("1")
        (path / "memory.max").write_text("2")
        self.agent = subprocess.Popen([sys.executable, "-c", FORKS], stdout=subprocess.PIPE, text=True)
        self.child_pid = int(self.agent.stdout.readline())
        self.stranger = subprocess.Popen(["sleep", "60"])
        self.tell(self.agent.pid, self.child_pid, self.stranger.pid, os.getpid(), 1)

    def tell(self, *pids):
        (self.path / "cgroup.procs").write_text("".join(f"{pid}\n" for pid in pids))

    def are(self, *states):
        """Whether the agent, its child and the stranger come into these states: a stop takes a moment."""
        until = time.monotonic() + 5
        time.sleep(0.05)
        while time.monotonic() < until:
            pids = (self.agent.pid, self.child_pid, self.stranger.pid)
            if [subtree.read_stat(pid).state for pid in pids] == list(states):
                return True
            time.sleep(0.02)
        return False

    def close(self):
        os.kill(self.child_pid, signal.SIGKILL)
        for process in (self.agent, self.stranger):
            process.kill()
            process.wait()
        self.agent.stdout.close()


@pytest.fixture
def family(tmp_path):
    path = tmp_path / "memcg"
    path.mkdir()
    made = Family(path)
    yield made
    made.close()


def test_only_the_agents_own_processes_are_stopped_and_go_on(tmp_path, family):
    knobs = knobs_of(tmp_path, family.path)
    assert not knobs.freeze()  # whose?
    knobs.set_agent(family.agent.pid, os.getpid())
    assert knobs.brake == STOP
    assert knobs.freeze()
    assert family.are("T", "T", "S")
    assert KnobFile(str(tmp_path / "knobs")).restore_all() == [f"{family.path}: 2 processes go on"]
    assert family.are("S", "S", "S")
    assert not knobs.frozen_by_us
    assert not knobs.thaw()


def test_who_was_stopped_by_somebody_else_stays_stopped(tmp_path, family):
    os.kill(family.child_pid, signal.SIGSTOP)
    assert family.are("S", "T", "S")
    knobs = knobs_of(tmp_path, family.path)
    knobs.set_agent(family.agent.pid, os.getpid())
    assert knobs.freeze()
    assert knobs.thaw()
    assert family.are("S", "T", "S")


def test_processes_go_on_though_their_memcg_is_gone(tmp_path, family):
    knobs = knobs_of(tmp_path, family.path)
    knobs.set_agent(family.agent.pid, os.getpid())
    assert knobs.freeze()
    assert family.are("T", "T", "S")
    for name in ("memory.stat", "memory.current", "memory.max"):
        (family.path / name).unlink()
    KnobFile(str(tmp_path / "knobs")).restore_all()
    assert family.are("S", "S", "S")


def test_governor_its_parents_and_its_children_are_never_touched(family):
    assert subtree.members(os.getpid(), str(family.path), os.getpid()) == []
    assert subtree.members(1, str(family.path), os.getpid()) == []
    assert subtree.members(0, str(family.path), os.getpid()) == []
    assert subtree.oldest_other(str(family.path), os.getpid()) is None
    listed = [stat.pid for stat in subtree.members(family.agent.pid, str(family.path), family.stranger.pid)]
    assert listed == [family.agent.pid, family.child_pid]
    assert subtree.oldest_other(str(family.path), family.stranger.pid).pid == family.agent.pid


@pytest.mark.parametrize(
    ("comm", "in_container", "found"),
    [("node", True, 1), ("sh", True, 40), ("governor-run", True, 40), ("systemd", False, 40)],
)
def test_a_containers_process_1_is_its_agent_unless_it_only_started_that(monkeypatch, comm, in_container, found):
    rest = (1, 0, 0, 0, 100)
    processes = {1: subtree.Stat(1, 0, 5, "S", comm, *rest), 40: subtree.Stat(40, 1, 9, "S", "tool", *rest)}
    monkeypatch.setattr(subtree, "memcg_pids", lambda path: list(processes))
    monkeypatch.setattr(subtree, "_read", lambda pids: processes)
    monkeypatch.setattr(subtree, "in_container", lambda: in_container)
    assert subtree.oldest_other("/sys/fs/cgroup", os.getpid()).pid == found


def test_a_signal_is_for_this_very_process(family):
    stat = subtree.read_stat(family.stranger.pid)
    assert not subtree.send(stat.pid, stat.start_ticks + 1, signal.SIGKILL)
    assert family.stranger.poll() is None
    assert subtree.send(stat.pid, stat.start_ticks, signal.SIGKILL)
    assert family.stranger.wait(timeout=10) == -signal.SIGKILL


@pytest.mark.parametrize("data", [b"", b"1 (x) S", b"1 (a) b) S 4 " + b"0 " * 10])
def test_a_line_that_is_none(data):
    assert subtree.parse_stat(1, data) is None


def test_a_name_may_hold_anything():
    stat = subtree.parse_stat(7, b"7 (a) T 1 (b) S 4 5 6 1025 -1 64 " + b"0 " * 12 + b"99 0 3 0\n")
    assert stat == subtree.Stat(7, 4, 99, "S", "a) T 1 (b", 5, 1025, -1, 64, 3)


def test_a_memcg_that_may_be_frozen_is(tmp_path, family):
    (family.path / "cgroup.freeze").write_text("0")
    knobs = knobs_of(tmp_path, family.path)
    assert knobs.brake == FREEZE
    knobs.set_agent(family.agent.pid, os.getpid())
    assert knobs.freeze()
    assert family.are("S", "S", "S")
    assert (family.path / "cgroup.freeze").read_text() == "1"


def test_no_brake_where_the_agent_may_not_be_signalled(tmp_path, family, monkeypatch):
    def refuse(*_):
        raise PermissionError

    knobs = knobs_of(tmp_path, family.path)
    knobs.set_agent(family.agent.pid, os.getpid())
    monkeypatch.setattr(signal, "pidfd_send_signal", refuse)
    assert knobs.brake == NONE
    assert not knobs.freeze()
    assert not knobs.frozen_by_us


def test_a_slot_for_another_memcg_first_lets_go_on_who_was_stopped(tmp_path, family):
    knobs = knobs_of(tmp_path, family.path)
    knobs.set_agent(family.agent.pid, os.getpid())
    assert knobs.freeze()
    assert family.are("T", "T", "S")
    other = tmp_path / "other"
    other.mkdir()
    KnobFile(str(tmp_path / "knobs")).adopt(0, str(other), 7)
    assert family.are("S", "S", "S")


def test_a_knob_file_grows_for_whoever_has_it_open(tmp_path):
    path = str(tmp_path / "node.knobs")
    writer, reader = KnobFile(path), KnobFile(path)
    for number in range(100):
        slot = writer.free_slot()
        writer.adopt(slot, f"/sys/fs/cgroup/pod{number}", number)
        assert reader.slot_path(slot) == f"/sys/fs/cgroup/pod{number}"
    assert sorted(reader.slots()) == list(range(100))
    writer.release(7)
    assert reader.slot_path(7) is None and reader.slot_path(10_000) is None
    assert writer.free_slot() == 7
