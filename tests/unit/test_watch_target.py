"""What TARGET means."""

import os
import subprocess

import pytest

from governor import cgroup, watch_cli
from governor.watch_all import leaves
from governor.watch_target import Target, Unknown, resolve
from tests.unit.watch_fixture import make_memcg, standing

POD = "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice"
CONTAINER = f"{POD}/cri-containerd-{'3f' * 32}.scope"
SECOND = f"{POD}/cri-containerd-{'4a' * 32}.scope"
UNITS = [
    "system.slice/agent.service",
    "system.slice/cron.service",
    "user.slice/user-1000.slice/user@1000.service/app.slice/mine.service",
    "user.slice/user-1000.slice/user@1000.service/app.slice/cron.service",
    "user.slice/user-1001.slice/user@1001.service/app.slice/two.service",
    "user.slice/user-1000.slice/user@1000.service/app.slice/two.service",
    "user.slice/user-1000.slice/session-1.scope",
    f"{CONTAINER}/system.slice/fake.service",
    "system.slice/docker.service/agent-inner.service",
]


@pytest.fixture
def root(tmp_path, monkeypatch):
    root = tmp_path / "sys" / "fs" / "cgroup"
    monkeypatch.setattr(cgroup, "ROOT", str(root))
    monkeypatch.setattr(cgroup, "ROOT_V1", "/nowhere")
    for unit in (*UNITS, CONTAINER, SECOND):
        for path in (root / unit, *(root / unit).parents):
            if path == root:
                break
            make_memcg(path)
    make_memcg(root)
    return root


def here():
    yield standing(cgroup=f"{cgroup.ROOT}/{CONTAINER}")
    yield standing(cgroup=f"{cgroup.ROOT}/{SECOND}", container="sidecar")
    yield standing(namespace="", pod="", container="agent.service", cgroup="/elsewhere")


MEANT = [
    ("agents/claude-0", [CONTAINER, SECOND]),
    ("agents/claude-0/sidecar", [SECOND]),
    ("agent.service", ["system.slice/agent.service"]),
    ("agent", ["system.slice/agent.service"]),
    ("cron", ["system.slice/cron.service"]),  # the system's before a user's
    ("mine", ["user.slice/user-1000.slice/user@1000.service/app.slice/mine.service"]),
    ("session-1.scope", ["user.slice/user-1000.slice/session-1.scope"]),
    ("system.slice", ["system.slice"]),
    ("system.slice/agent.service", ["system.slice/agent.service"]),
    ("3f3f3f", [CONTAINER]),
]


@pytest.mark.parametrize(("text", "paths"), MEANT, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_meant(root, text, paths):
    assert [target.path for target in resolve(text, here)] == [f"{root}/{path}" for path in paths]


def test_names(root):
    assert [target.name for target in resolve("agents/claude-0", here)] == [
        "agents/claude-0/agent",
        "agents/claude-0/sidecar",
    ]
    assert resolve("agent", here)[0].name == "agent.service"


UNKNOWN = [
    ("nobody/nothing", "found nothing called 'nobody/nothing' here, expected a pod"),
    ("two", "found 2 units two.service"),
    ("fake", "found nothing called"),  # a container may call a cgroup of its own anything
    ("agent-inner", "found nothing called"),
    ("/nope", "found no memcg at /nope, expected a directory below"),
    ("/proc", "found no memcg at /proc"),
    ("4194305", "found no process 4194305"),
    ("3f3f3", "found nothing called"),
]


@pytest.mark.parametrize(("text", "said"), UNKNOWN)
def test_what_is_not_there(root, text, said):
    with pytest.raises(Unknown, match=said):
        resolve(text, here)


def test_a_container_is_its_own_root(root):
    """With a cgroup namespace of its own; the root of a machine has no memory.current."""
    assert resolve(str(root), here)[0].name == "this container"
    assert leaves(str(root))[0] == str(root)
    (root / "memory.current").unlink()
    assert str(root) not in leaves(str(root))
    with pytest.raises(Unknown, match="found no memcg at"):
        resolve(str(root), here)


def test_a_pid_and_self(root, monkeypatch):
    inside = {"self": "/system.slice/agent.service", str(os.getpid()): "/system.slice/cron.service"}
    monkeypatch.setattr(cgroup, "memcg_of", lambda pid, v1: cgroup.ROOT + inside[str(pid)])
    assert resolve("self", here) == [Target(f"{root}/system.slice/agent.service")]
    assert resolve(str(os.getpid()), here) == [Target(f"{root}/system.slice/cron.service")]


def test_what_is_listed_is_what_was_made_for_something(root):
    found = {path[len(str(root)) + 1 :] for path in leaves(str(root))}
    assert {"system.slice/agent.service", "system.slice/docker.service", CONTAINER, SECOND} <= found
    assert not any("fake" in path or "inner" in path for path in found)
    assert "system.slice" not in found


def test_completion(root, monkeypatch):
    monkeypatch.setattr(watch_cli, "standings", here)
    assert watch_cli.complete_target("agents/") == ["agents/claude-0/agent", "agents/claude-0/sidecar"]
    assert watch_cli.complete_target("agent.") == ["agent.service"]
    (root / "system.slice" / "x$(reboot).service").mkdir()
    assert watch_cli.complete_target("x") == []
    assert watch_cli.complete_target(f"{root}/system.slice/x") == []
    assert watch_cli.complete_target(f"{root}/system.slice/a") == [f"{root}/system.slice/agent.service"]


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("wat", "watch"),
        ("hold 10m DIR/sys", "DIR/system"),
        ("why DIR/sys", "DIR/system"),
        ("off DIR/sys", "DIR/system"),
    ],
)
def test_a_shell_is_offered_what_there_is(tmp_path, words, offered):
    """The function that a user installs, asked as bash asks it."""
    (tmp_path / "system").mkdir()
    environment = {
        **os.environ,
        "_GOVERNOR_COMPLETE": "complete_bash",
        "COMP_WORDS": f"governor {words}".replace("DIR", str(tmp_path)),
        "COMP_CWORD": str(len(words.split())),
    }
    program = "import sys; sys.argv[0] = 'governor'; from governor.cli import main; main()"
    done = subprocess.run(
        [os.sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.stdout.split() == [offered.replace("DIR", str(tmp_path))], done.stderr
