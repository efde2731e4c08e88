"""Pods that containerd's own CRI plug-in makes, as a kubelet asks for them."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import grpc

from tests.fakes.cri import block, number, texts

SOCKET = "/run/containerd/containerd.sock"
IMAGE = "docker.io/library/sleep:1"
NODE_NETWORK = number(1, 2)  # NamespaceOption: network = NODE, so no CNI plug-in is needed


def ask(method, request):
    """One call of CRI; the answer's bytes."""
    options = [("grpc.default_authority", "localhost")]
    with grpc.insecure_channel(f"unix:{SOCKET}", options=options) as channel:
        return channel.unary_unary(f"/runtime.v1.RuntimeService/{method}")(request, timeout=120)


def call(method, request):
    """One call of CRI; the id that its answer holds, if any."""
    answer = ask(method, request)
    return answer[2 : 2 + answer[1]].decode() if answer else ""


def image():
    """A Docker archive of one layer, with sleep and the libraries that it needs."""
    words = [shutil.which("sleep")]
    words += [word for word in subprocess.check_output(["ldd", words[0]], text=True).split() if word.startswith("/")]
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for word in words:
            tar.add(os.path.realpath(word), word.lstrip("/"))
        scratch = tarfile.TarInfo("tmp")
        scratch.type, scratch.mode = tarfile.DIRTYPE, 0o1777
        tar.addfile(scratch)

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


class CriPod:
    """A pod with one container, `agent`; `mounts`: directories of the host, where it has them, if to read only."""

    def __init__(self, uid, name, namespace, limit_mib, labels=None, annotations=None, argv=(), mounts=(), user=0):
        self.log = Path(f"/tmp/{name}.log")
        self.uid, self.cgroup = uid, Path(f"/sys/fs/cgroup/kubepods/burstable/pod{uid}")
        # PodSandboxConfig: metadata 1, log_directory 3, labels 6, annotations 7, linux 8 (parent 1, security 2)
        metadata = block(1, name) + block(2, uid) + block(3, namespace)
        linux = block(1, f"/kubepods/burstable/pod{uid}") + block(2, block(1, NODE_NETWORK))
        config = block(1, metadata) + block(3, "/tmp") + texts(6, labels or {}) + texts(7, annotations or {})
        self.config = config + block(8, linux)
        # ContainerConfig: metadata 1, image 2, command 3, mounts 7, log_path 11, linux 15 (resources 1, security 2)
        security = block(3, NODE_NETWORK) + (block(5, number(1, user)) if user else b"")
        linux = block(1, number(4, limit_mib << 20)) + block(2, security)
        of_container = block(1, block(1, "agent")) + block(2, block(1, IMAGE)) + block(11, self.log.name)
        of_container += b"".join(block(3, word) for word in argv)
        of_container += b"".join(
            block(7, block(1, to) + block(2, of) + number(3, is_read_only)) for of, to, is_read_only in mounts
        )
        self.sandbox = call("RunPodSandbox", block(1, self.config))
        request = block(1, self.sandbox) + block(2, of_container + block(15, linux)) + block(3, self.config)
        self.id = call("CreateContainer", request)
        call("StartContainer", block(1, self.id))
        self.container = self.cgroup / self.id

    def status(self):
        """CRI's, as bytes: the reason of its end stands in it as text."""
        return ask("ContainerStatus", block(1, self.id))

    def resize(self, limit_mib):
        """As a kubelet resizes it in place; LinuxContainerResources: memory_limit_in_bytes 4."""
        ask("UpdateContainerResources", block(1, self.id) + block(2, number(4, limit_mib << 20)))

    def close(self):
        call("StopPodSandbox", block(1, self.sandbox))
        call("RemovePodSandbox", block(1, self.sandbox))
