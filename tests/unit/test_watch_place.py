"""From where `governor watch` looks: whose names for memcgs it takes, and what it does not compile."""

import pytest

from governor import cgroup, outside, watch_place
from governor.watch_target import resolve
from tests.unit.test_bundle import CONTAINERD, ID, UID, containerd, write
from tests.unit.watch_fixture import MIB, make_memcg


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = tmp_path / "sys" / "fs" / "cgroup"
    monkeypatch.setattr(cgroup, "ROOT", str(root))
    monkeypatch.setattr(cgroup, "ROOT_V1", "/nowhere")
    make_memcg(root / "pod" / "daemon", usage_mib=60)
    (root / "cgroup.controllers").write_text("memory\n")
    return root


@pytest.mark.parametrize("is_true_root", [True, False])
def test_only_where_the_machines_tree_is_seen_are_its_names_taken(root, monkeypatch, is_true_root):
    joined = []
    monkeypatch.setattr(outside, "join_host_cgroups", lambda: joined.append(1))
    if not is_true_root:  # a container's own, by its cgroup namespace
        make_memcg(root)
    watch_place.see_machine()
    assert len(joined) == is_true_root


def test_without_the_right_to_it_goes_on_as_it_is(root, monkeypatch):
    def refuse():
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(outside, "join_host_cgroups", refuse)
    watch_place.see_machine()


ROOMS = [(128, "compiling wants 320 MiB, and where watch runs are 78 left"), (512, "")]


@pytest.mark.parametrize(("max_mib", "said"), ROOMS)
def test_nothing_is_compiled_where_that_does_not_fit(root, monkeypatch, max_mib, said):
    own = root / "pod" / "daemon"
    (own / "memory.max").write_text(f"{max_mib * MIB}\n")
    monkeypatch.setattr(cgroup, "memcg_of", lambda pid, v1=False: str(own))
    assert watch_place.no_room() == said
    monkeypatch.setattr(cgroup, "memcg_of", lambda pid, v1=False: str(root))  # the true root, without a limit
    assert watch_place.no_room() == ""


def test_a_pod_that_nobody_governs_is_known_by_the_hosts_files_wherever_they_are(root, tmp_path, monkeypatch):
    container = make_memcg(root / f"kubepods/burstable/pod{UID}/{ID}")
    write(tmp_path / "host", CONTAINERD.format(ID), containerd())
    monkeypatch.setenv(watch_place.HOST_ROOT, str(tmp_path / "host"))
    [found] = resolve("team-a/agent-0", list)
    assert (found.path, found.name) == (str(container), "team-a/agent-0/agent")
