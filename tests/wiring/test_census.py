"""A pod that containerd's own CRI plug-in made, as a kubelet asks for it: its path, its bundle, its labels."""

import hashlib
import io
import json
import os
import select
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import grpc
import pytest
from conftest import CGROUPS, checked, wait_for

from governor.census import Census, Known
from governor.container import Container
from governor.discovery import Gone
from tests.fakes.cri import block, number, texts

UID = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718"
SOCKET = "/run/containerd/containerd.sock"
IMAGE = "docker.io/library/sleep:1"
LABELS = {"app": "agent", "io.kubernetes.pod.uid": UID}
ANNOTATIONS = {"governor.dev/policy": "careful"}
NODE_NETWORK = number(1, 2)  # NamespaceOption: network = NODE, so no CNI plug-in is needed


def call(method, request):
    """One call of CRI; the id that its answer holds, if any."""
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{SOCKET}", options=options) as channel:
        answer = channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")(request, timeout=120)
    return answer[2 : 2 + answer[1]].decode() if answer else ""


@pytest.fixture(scope="module")
def containerd():
    """With the CRI plug-in on, and an image that sleeps."""
    checked("modprobe", "overlay")
    config = f'version = 2\n[plugins."io.containerd.grpc.v1.cri"]\nsandbox_image = "{IMAGE}"\n'
    Path("/etc/containerd").mkdir(exist_ok=True)
    Path("/etc/containerd/config.toml").write_text(config)
    for name in ("hosts", "resolv.conf"):
        Path("/etc", name).touch()
    checked("systemctl", "restart", "containerd")
    wait_for(lambda: Path(SOCKET).is_socket(), what="containerd's socket")
    checked("ctr", "-n", "k8s.io", "images", "import", image())
    yield


def image():
    """A Docker archive of one layer, with sleep and the libraries that it needs."""
    words = [shutil.which("sleep")]
    words += [word for word in subprocess.check_output(["ldd", words[0]], text=True).split() if word.startswith("/")]
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for word in words:
            tar.add(os.path.realpath(word), word.lstrip("/"))

    digest = hashlib.sha256(layer.getvalue()).hexdigest()
    settings = json.dumps(
        {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": [words[0], "1000000"], "Env": ["GOVERNOR_POLICY=careful"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    manifest = json.dumps([{"Config": "config.json", "RepoTags": ["sleep:1"], "Layers": ["layer.tar"]}]).encode()
    file = Path("/tmp/image.tar")
    with tarfile.open(file, "w") as tar:
        for name, data in (
            ("config.json", settings),
            ("layer.tar", layer.getvalue()),
            ("manifest.json", manifest),
        ):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def sandbox_config():
    """PodSandboxConfig: metadata 1, log_directory 3, labels 6, annotations 7, linux 8 (parent 1, security 2)."""
    metadata = block(1, "agent-0") + block(2, UID) + block(3, "team-a")
    security = block(1, NODE_NETWORK)
    linux = block(1, f"/kubepods/burstable/pod{UID}") + block(2, security)
    return block(1, metadata) + block(3, "/tmp") + texts(6, LABELS) + texts(7, ANNOTATIONS) + block(8, linux)


def container_config():
    """ContainerConfig: metadata 1, image 2, log_path 11, linux 15 (resources 1: memory_limit_in_bytes 4)."""
    linux = block(1, number(4, 64 << 20)) + block(2, block(3, NODE_NETWORK))
    return block(1, block(1, "agent")) + block(2, block(1, IMAGE)) + block(11, "agent.log") + block(15, linux)


def news(census):
    until = time.monotonic() + 120
    while time.monotonic() < until:
        if found := census.drain(time.monotonic_ns()):
            return found
        select.select(census.fds, [], [], 0.1)
    raise AssertionError("nothing came")


def test_a_real_pod_is_known_with_its_labels_and_its_pause_container_is_not_told_of(containerd):
    notes = []
    census = Census(str(CGROUPS), time.monotonic_ns(), notes.append)
    assert census.drain(time.monotonic_ns()) == []
    sandbox = call("RunPodSandbox", block(1, sandbox_config()))
    container = call("CreateContainer", block(1, sandbox) + block(2, container_config()) + block(3, sandbox_config()))
    call("StartContainer", block(1, container))
    path = f"{CGROUPS}/kubepods/burstable/pod{UID}/{container}"
    texts_known = {"namespace": "team-a", "pod": "agent-0", "name": "agent", "chosen_policy": "careful"}
    expected = Container(path, container, UID, "burstable", **texts_known, labels=LABELS, annotations=ANNOTATIONS)
    assert news(census) == [Known(expected)]
    assert Path(path, "memory.max").read_text().strip() == str(64 << 20)
    assert (CGROUPS / f"kubepods/burstable/pod{UID}" / sandbox).is_dir()
    call("StopPodSandbox", block(1, sandbox))
    assert news(census) == [Gone(path)]
    call("RemovePodSandbox", block(1, sandbox))
    assert notes == []
    census.close()
