"""OOM kills that got through: counted, and told apart by whose limit it was."""

import pytest

from governor.oom_kills import OomKills
from governor.policy import SECOND


class Memcgs:
    """A pod and its container, as their files show them."""

    def __init__(self, root):
        self.pod, self.container = root / "pod", root / "pod" / "container"
        self.container.mkdir(parents=True)
        self.set(self.pod)
        self.set(self.container)

    def set(self, path, oom=0, oom_kill=0):
        (path / "memory.events").write_text(f"low 0\nmax 7\noom {oom}\noom_kill {oom_kill}\n")


@pytest.fixture
def memcgs(tmp_path):
    return Memcgs(tmp_path)


def test_a_kill_at_its_own_limit_at_the_pods_and_for_want_of_memory_on_the_machine(memcgs):
    memcgs.set(memcgs.container, oom_kill=4)
    kills = OomKills(str(memcgs.container))
    assert (kills.look(1), kills.what_killed(1)) == ("", "")
    memcgs.set(memcgs.container, oom=1, oom_kill=4)  # the request is counted before the victim
    memcgs.set(memcgs.pod, oom=1)
    assert kills.look(1 * SECOND) == ""
    memcgs.set(memcgs.container, oom=1, oom_kill=5)
    text = kills.look(2 * SECOND)
    assert "at the limit of its memcg: 1 process here (1 since governor guards this memcg, 5 since" in text
    assert kills.what_killed(4 * SECOND) == "the kernel's OOM killer, at the limit of its memcg"
    assert kills.what_killed(9 * SECOND) == ""
    memcgs.set(memcgs.pod, oom=2)
    memcgs.set(memcgs.container, oom=1, oom_kill=7)
    assert f"at the limit of {memcgs.pod}: 2 processes here (3 since" in kills.look(20 * SECOND)
    memcgs.set(memcgs.container, oom=1, oom_kill=8)
    assert "for want of memory on the machine: 1 process here (4 since" in kills.look(21 * SECOND)
    assert kills.look(22 * SECOND) == ""


def test_where_nothing_can_be_read_nothing_was_killed(tmp_path):
    kills = OomKills(str(tmp_path / "gone"))
    assert (kills.look(1), kills.what_killed(1)) == ("", "")


AT_LIMIT = "the kernel's OOM killer, at the limit of its memcg"
OF_MACHINE = "the kernel's OOM killer, for want of memory on the machine"
OF_POD = "the kernel's OOM killer, at the limit of {pod}"


@pytest.mark.parametrize(
    ("own", "parent", "said"),
    [
        ((2, 5), (2, 5), ""),
        ((3, 5), (3, 5), ""),  # its limit was reached, and nobody chosen
        ((3, 6), (3, 6), AT_LIMIT),
        ((2, 6), (3, 6), OF_POD),
        ((2, 6), (2, 6), OF_MACHINE),
        ((2, 5), (3, 6), ""),  # a neighbour in the pod
    ],
)
def test_which_kind_it_was(memcgs, own, parent, said):
    for path in (memcgs.pod, memcgs.container):
        memcgs.set(path, 2, 5)
    kills = OomKills(str(memcgs.container))
    memcgs.set(memcgs.container, *own)
    memcgs.set(memcgs.pod, *parent)
    assert bool(kills.look(SECOND)) is bool(said)
    assert kills.what_killed(SECOND) == said.format(pod=memcgs.pod)


@pytest.mark.parametrize(("failcnt", "killed", "said"), [(3, 1, AT_LIMIT), (2, 1, OF_MACHINE), (3, 0, "")])
def test_which_kind_it_was_in_v1(tmp_path, failcnt, killed, said):
    def write(failcnt, killed):
        (tmp_path / "memory.failcnt").write_text(f"{failcnt}\n")
        (tmp_path / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {killed}\n")

    write(2, 0)
    kills = OomKills(str(tmp_path))
    write(failcnt, killed)
    kills.look(SECOND)
    assert kills.what_killed(SECOND) == said
