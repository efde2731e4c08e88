"""Where the agent's memcg is made, by what the hierarchy allows: directories that look like it."""

import os

import pytest

from governor import cgroup, run_memcg


@pytest.fixture
def hierarchy(tmp_path, monkeypatch):
    """A v2 hierarchy: paths below its root, with what each hands down; governor is in the last one."""

    def make(**handed_down):
        for name, controllers in handed_down.items():
            directory = tmp_path / name.replace("__", "/").removeprefix("root").lstrip("/")
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "cgroup.subtree_control").write_text(controllers)
        monkeypatch.setattr(cgroup, "ROOT", str(tmp_path))
        monkeypatch.setattr(cgroup, "ROOT_V1", str(tmp_path / "none"))
        monkeypatch.setattr(cgroup, "memcg_of", lambda pid, v1=False: None if v1 else str(directory))
        return tmp_path

    return make


NAME = f"governor-run-{os.getpid()}"


@pytest.mark.parametrize(
    ("handed_down", "where"),
    [
        ({"root": "cpu memory"}, ""),  # the root may have processes and hand controllers down
        ({"root": "memory", "root__pod": ""}, ""),  # processes live in pod: beside it
        ({"root": "memory", "root__user": "memory pids", "root__user__scope": ""}, "user"),
        ({"root": "memory", "root__pod": "memory"}, "pod"),
    ],
)
def test_it_is_made_below_where_memory_is_handed_down_or_beside(hierarchy, handed_down, where):
    root = hierarchy(**handed_down)
    made = run_memcg.make(64 << 20)
    assert made == str(root / where / NAME)
    assert (root / where / NAME / "memory.max").read_text() == str(64 << 20)
    assert (root / where / NAME / "cgroup.procs").read_text() == "0"  # a child could enter it


@pytest.mark.parametrize("handed_down", [{"root": ""}, {"root": "cpu pids", "root__pod": "cpu"}])
def test_where_memory_is_not_handed_down_none_is_made(hierarchy, handed_down):
    root = hierarchy(**handed_down)
    with pytest.raises(run_memcg.NoMemcg, match="systemd-run"):
        run_memcg.make(64 << 20)
    assert not list(root.rglob("governor-run-*"))


def test_what_killed_runs_left_is_removed_unless_somebody_is_in_it(hierarchy):
    root = hierarchy(root="memory")
    for name in ("governor-run-4194305", "governor-run-4194306", f"governor-run-{os.getppid()}", "governor-run-x"):
        (root / name).mkdir()
    (root / "governor-run-4194306" / "cgroup.procs").write_text("7")  # as rmdir refuses one with processes
    run_memcg.make(0)
    left = {path.name for path in root.glob("governor-run-*")}
    assert left == {"governor-run-4194306", f"governor-run-{os.getppid()}", "governor-run-x", NAME}


def test_there_is_no_memcg_around_us_in_the_root(hierarchy):
    hierarchy(root="memory")
    with pytest.raises(run_memcg.NoMemcg, match="governor doctor"):
        run_memcg.own()
