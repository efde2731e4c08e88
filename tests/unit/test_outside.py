"""Where reflex is to live, by where governor is; directories that look like a cgroup tree."""

from pathlib import Path

import pytest

from governor import cgroup, outside
from governor.reflex_process import ReflexProcess

POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0.slice/cri-containerd-0.scope"


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A tree with governor at a path of it, in the machine's own cgroup namespace."""

    def make(own):
        monkeypatch.setattr(cgroup, "ROOT", str(tmp_path))
        monkeypatch.setattr(cgroup, "memcg_of", lambda pid, v1=False: own and f"{tmp_path}/{own}")
        monkeypatch.setattr(outside, "join_host_cgroups", lambda: None)
        monkeypatch.setattr(Path, "mkdir", as_the_kernel_does(Path.mkdir))
        monkeypatch.setattr(Path, "rmdir", lambda path: (Path(path, "gone").touch(), path.rename(f"{path}.gone")))
        return tmp_path

    return make


def as_the_kernel_does(mkdir):
    def made(path, **options):
        mkdir(path, **options)
        for name in ("memory.min", "memory.max", "cgroup.procs"):
            (path / name).touch()

    return made


@pytest.mark.parametrize(
    ("own", "is_outside"),
    [
        (POD, True),
        ("kubepods/burstable/pod0/0", True),
        ("kubepods/pod0/0/nested", True),
        ("docker/0/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod0.slice/crio-0.scope", True),  # kind
        ("system.slice/governor.service", False),
        ("user.slice/kubepods-of-mine.scope", False),
        ("", False),  # the root
        (None, False),  # cgroup v1 alone
    ],
)
def test_reflex_lives_outside_where_governor_is_in_a_pod(tree, own, is_outside):
    root = tree(own)
    path, why_not = outside.make("node")
    assert (path, why_not) == (f"{root}/governor-reflex-node" if is_outside else "", "")
    if is_outside:
        limits = [int(Path(path, name).read_text()) for name in ("memory.min", "memory.max")]
        assert limits == [outside.MIN_BYTES, outside.MAX_BYTES]
        assert outside.make("node") == (path, "")  # who follows a killed governor takes it over


def test_where_it_may_not_be_entered_reflex_stays_and_nothing_is_left(tree, monkeypatch):
    def refused(path):
        raise PermissionError(1, "Operation not permitted", f"{path}/cgroup.procs")

    root = tree(POD)
    monkeypatch.setattr(outside, "try_to_enter", refused)
    assert outside.make("node") == ("", f"{root}/governor-reflex-node/cgroup.procs: Operation not permitted")
    assert not (root / "governor-reflex-node").exists()


def test_without_a_way_to_the_hosts_namespace_it_is_said(tree, monkeypatch):
    def refused():
        raise PermissionError(13, "Permission denied", "/proc/1/ns/cgroup")

    tree("")
    monkeypatch.setattr(outside, "join_host_cgroups", refused)
    assert outside.make("node") == ("", "/proc/1/ns/cgroup Permission denied")


def test_without_the_hosts_processes_there_is_no_namespace_of_theirs(monkeypatch):
    monkeypatch.setattr(outside, "_FIRST_NAMESPACE", 0)  # as in a container
    with pytest.raises(FileNotFoundError, match="ns/cgroup"):
        outside.join_host_cgroups(1 << 30)  # a process that there cannot be


def test_what_no_reflex_is_in_is_swept(tree):
    tree(POD)
    path, _ = outside.make("node")
    assert outside.sweep() == [path]
    assert not Path(path).exists()


def test_reflex_enters_before_its_program_begins(tree, tmp_path, capfd):
    tree(POD)
    path, _ = outside.make("node")
    Path(path, "cgroup.procs").write_text("")
    for memcg in (path, f"{path}-gone"):
        process = ReflexProcess(None, tmp_path / "knobs", memcg=memcg)
        assert process.start(0)
        process.stop()
    assert Path(path, "cgroup.procs").read_text() == "0"
    assert "reflex stays in the pod" in capfd.readouterr().err
