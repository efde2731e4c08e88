"""oom_kills: which kind of OOM kill it was, by what the kernel counts."""

import pytest

from governor.oom_kills import OomKills

V2 = "low 0\nhigh 3\nmax 7\noom {oom}\noom_kill {kill}\noom_group_kill 0\n"
AT_LIMIT = "the kernel's OOM killer, at the limit of its memcg"
OF_MACHINE = "the kernel's OOM killer, for want of memory on the machine"


def write_v2(directory, oom, kill):
    (directory / "memory.events").write_text(V2.format(oom=oom, kill=kill))


@pytest.mark.parametrize(
    ("own", "parent", "said"),
    [
        ((2, 5), (2, 5), ""),
        ((3, 5), (3, 5), ""),  # its limit was reached, and nobody chosen
        ((3, 6), (3, 6), AT_LIMIT),
        ((2, 6), (3, 6), AT_LIMIT),  # the pod's
        ((2, 6), (2, 6), OF_MACHINE),
        ((2, 5), (3, 6), ""),  # a neighbour in the pod
    ],
)
def test_which_kind_it_was(tmp_path, own, parent, said):
    memcg = tmp_path / "pod" / "container"
    memcg.mkdir(parents=True)
    for directory in (memcg, memcg.parent):
        write_v2(directory, 2, 5)
    kills = OomKills(str(memcg))
    write_v2(memcg, *own)
    write_v2(memcg.parent, *parent)
    assert kills.what_killed() == said
    kills.look()
    assert kills.what_killed() == ""


@pytest.mark.parametrize(("failcnt", "killed", "said"), [(3, 1, AT_LIMIT), (2, 1, OF_MACHINE), (3, 0, "")])
def test_which_kind_it_was_in_v1(tmp_path, failcnt, killed, said):
    def write(failcnt, killed):
        (tmp_path / "memory.failcnt").write_text(f"{failcnt}\n")
        (tmp_path / "memory.oom_control").write_text(f"oom_kill_disable 0\nunder_oom 0\noom_kill {killed}\n")

    write(2, 0)
    kills = OomKills(str(tmp_path))
    write(failcnt, killed)
    assert kills.what_killed() == said


def test_a_memcg_that_is_gone_has_no_kills(tmp_path):
    assert OomKills(str(tmp_path / "gone")).what_killed() == ""
