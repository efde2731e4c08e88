"""governor policy explain POD: a tree of cgroups, bundles and a runtime's socket, and what is found there."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from governor import cgroup, node_containers
from governor.cli import app
from governor.selection import ANNOTATION
from tests.fakes.cri import Runtime, sandbox

UID, OTHER = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718", "1f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718"
AGENT, SIDECAR, PAUSE, WEB = ("a1" * 32, "5c" * 32, "ff" * 32, "eb" * 32)
POLICIES = {
    "10-agents": '[select]\nnamespace = ["agents"]\ncontainer = ["agent"]\n',
    "20-labelled": '[select]\nlabel = ["app=web"]\n',
    "30-gentle": 'name = "gentle"\n[select]\nselectable = true\n',
}


class Node:
    """A kubelet's cgroups, containerd's bundles, policies; all below one directory."""

    def __init__(self, top: Path) -> None:
        self.cgroups, self.host_root, self.policies = top / "cgroup", top / "host", top / "policies"
        for directory in (self.cgroups, self.host_root, self.policies):
            directory.mkdir()
        for name, text in POLICIES.items():
            (self.policies / f"{name}.toml").write_text(text)

    def add(self, uid: str, container_id: str, pod: str, name: str, kind: str = "container", env: str = "") -> Path:
        slices = (
            "kubepods.slice",
            "kubepods-burstable.slice",
            f"kubepods-burstable-pod{uid.replace('-', '_')}.slice",
        )
        path = self.cgroups.joinpath(*slices, f"cri-containerd-{container_id}.scope")
        path.mkdir(parents=True)
        bundle = self.host_root / "run/containerd/io.containerd.runtime.v2.task/k8s.io" / container_id
        bundle.mkdir(parents=True)
        keys = {"container-type": kind, "sandbox-namespace": pod.split("/")[0], "sandbox-name": pod.split("/")[1]}
        keys |= {"sandbox-uid": uid, "container-name": name}
        annotations = {f"io.kubernetes.cri.{key}": value for key, value in keys.items()}
        config = {"annotations": annotations, "process": {"env": [f"GOVERNOR_POLICY={env}"] if env else []}}
        (bundle / "config.json").write_text(json.dumps(config))
        return path

    def explain(self, *words: str) -> tuple[int, list[str], str]:
        options = ["--policies", str(self.policies), "--host-root", str(self.host_root)]
        done = CliRunner().invoke(app, ["policy", "explain", *options, *words])
        return done.exit_code, done.stdout.splitlines(), done.stderr


@pytest.fixture
def node(tmp_path, monkeypatch):
    made = Node(tmp_path)
    made.add(UID, AGENT, "agents/claude-0", "agent")
    made.add(UID, SIDECAR, "agents/claude-0", "proxy", env="gentle")
    made.add(UID, PAUSE, "agents/claude-0", "", kind="sandbox")
    made.add(OTHER, WEB, "web/front", "nginx")
    monkeypatch.setattr(node_containers, "root", lambda: str(made.cgroups))
    return made


def path_of(node: Node, container_id: str) -> str:
    [path] = node.cgroups.rglob(f"*{container_id}*")
    return str(path)


MEANT = [
    (
        "a pod",
        "agents/claude-0",
        0,
        ["agents/claude-0/agent: policy 10-agents", "agents/claude-0/proxy: policy gentle"],
    ),
    ("a container", "agents/claude-0/agent", 0, ["agents/claude-0/agent: policy 10-agents"]),
    ("an id", AGENT, 0, ["agents/claude-0/agent: policy"]),
    ("the begin of an id", SIDECAR[:6], 0, ["agents/claude-0/proxy: policy gentle"]),
    ("a path", "PATH", 3, ["web/front/nginx: not governed: no policy matches"]),
    ("none governed", "web/front", 3, ["web/front/nginx: not governed: no policy matches"]),
]


@pytest.mark.parametrize("case", MEANT, ids=[case[0] for case in MEANT])
def test_what_is_meant(node, case):
    _, meant, expected_status, begins = case
    status, lines, _ = node.explain(path_of(node, WEB) if meant == "PATH" else meant)
    answers = [line for line in lines if not line.startswith(" ")]
    assert status == expected_status
    assert sorted(answer[: len(begin)] for answer, begin in zip(sorted(answers), begins, strict=True)) == begins


@pytest.mark.parametrize(
    "text", ["agents", "agents/", "claude-0", AGENT[:5], PAUSE, "agents/claude-1", "/", "\x1b[2J"]
)
def test_what_is_nobody(node, text):
    status, lines, error = node.explain(text)
    assert (status, lines) == (2, [])
    assert error.startswith("governor: found no container ")
    assert "among 3 below" in error
    assert error.replace("\n", "").isprintable()


def test_labels_and_annotations_come_from_the_socket(node):
    runtime = Runtime(
        node.host_root / "run/containerd/containerd.sock",
        [(UID, sandbox(UID, {}, {ANNOTATION: "gentle"})), (OTHER, sandbox(OTHER, {"app": "web"}))],
    )
    try:
        status, lines, error = node.explain("web/front", "--json")
        assert (status, error, json.loads(lines[0])["policy"]) == (0, "", "20-labelled")
        _, lines, _ = node.explain("agents/claude-0", "--json")
        assert [json.loads(line)["policy"] for line in lines] == ["gentle", "gentle"]
    finally:
        runtime.stop()


def test_without_a_socket_that_is_said_and_the_rest_explained(node):
    status, _, error = node.explain("web/front")
    assert status == 3
    assert error.startswith("governor: labels and annotations are not known: found no socket of a")


def test_a_container_without_a_bundle_is_known_by_its_path(node):
    for file in node.host_root.rglob("config.json"):
        file.unlink()
    status, lines, _ = node.explain(AGENT)
    assert status == 3
    assert lines[0] == f"{AGENT}: not governed: no policy matches"
    assert lines[1] == f"  cgroup {path_of(node, AGENT)}"


def test_either_a_pod_or_a_description(node):
    for words in ([], ["a/b", "--as", "x.json"]):
        assert node.explain(*words) == (2, [], "governor: expected either a POD or --as FILE\n")


def test_the_tree_is_that_of_the_memory_controller(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroup, "ROOT_V1", str(tmp_path))
    assert node_containers.root() == cgroup.ROOT
    (tmp_path / "memory.usage_in_bytes").write_text("1")
    assert node_containers.root() == str(tmp_path)
