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

from governor.cri_call import UID_LABEL
from governor.pods import GUARANTEED
from tests.fakes.cri import block, number, texts

SOCKET = "/run/containerd/containerd.sock"
IMAGE = "docker.io/library/sleep:1"
NODE_NETWORK = number(1, 2)  # NamespaceOption: network = NODE, so no CNI plug-in is needed
NODE_PIDS = number(2, 2)  # pid = NODE: hostPID
SYSTEMD = "systemd"  # the runtime handler whose runc uses systemd's driver
CGROUPS = Path("/sys/fs/cgroup")


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
    """A Docker archive of one layer, merged as Debian's are: sleep, and the libraries that it needs."""
    words = [shutil.which("sleep")]
    words += [word for word in subprocess.check_output(["ldd", words[0]], text=True).split() if word.startswith("/")]
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for name in ("bin", "lib", "lib64"):
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, f"usr/{name}"
            tar.addfile(link)
        for word in words:
            place = os.path.join(os.path.realpath(os.path.dirname(word)), os.path.basename(word))
            tar.add(os.path.realpath(word), place.lstrip("/"))
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


class Sandbox:
    """A pod: its memcg as the kubelet of a driver names it, and its pause container."""

    def __init__(
        self,
        uid,
        name,
        namespace,
        labels=None,
        annotations=None,
        systemd=False,
        namespaces=NODE_NETWORK,
        qos="burstable",
    ):
        self.name, self.uid, self.namespace, self.namespaces = name, uid, namespace, namespaces
        levels = [] if qos == GUARANTEED else [qos]  # one level up
        parent = "/".join(["/kubepods", *levels, f"pod{uid}"])
        self.cgroup = CGROUPS / parent[1:]
        if systemd:
            classes = ["kubepods.slice", *(f"kubepods-{level}.slice" for level in levels)]
            parent = "-".join(["kubepods", *levels, f"pod{uid.replace('-', '_')}.slice"])
            self.cgroup = CGROUPS.joinpath(*classes, parent)
        self.scope = "cri-containerd-{}.scope" if systemd else "{}"
        # PodSandboxConfig: metadata 1, log_directory 3, labels 6, annotations 7, linux 8 (parent 1, security 2)
        metadata = block(1, name) + block(2, uid) + block(3, namespace)
        linux = block(1, parent) + block(2, block(1, namespaces))
        config = block(1, metadata) + block(3, "/tmp")
        config += texts(6, {UID_LABEL: uid, **(labels or {})}) + texts(7, annotations or {})
        self.config = config + block(8, linux)
        self.sandbox = call("RunPodSandbox", block(1, self.config) + (block(2, SYSTEMD) if systemd else b""))

    def start(self, name, limit_mib, argv=(), mounts=(), security=b"", environment=None, image=IMAGE, attempt=0):
        """Start a container; `mounts`: of the host, where it has them, if to read only, if propagated. Its id.

        One that is started again has the next `attempt`.
        """
        # ContainerConfig: metadata 1, image 2, command 3, envs 6, mounts 7, log_path 11, linux 15 (resources 1, ...)
        linux = block(1, number(4, limit_mib << 20)) + block(2, block(3, self.namespaces) + security)
        metadata = block(1, name) + number(2, attempt)
        config = block(1, metadata) + block(2, block(1, image)) + block(11, self.log_of(name).name)
        config += b"".join(block(3, word) for word in argv) + texts(6, environment or {})
        config += b"".join(
            block(7, block(1, to) + block(2, of) + number(3, is_read_only) + number(5, any(is_propagated)))
            for of, to, is_read_only, *is_propagated in mounts
        )
        request = block(1, self.sandbox) + block(2, config + block(15, linux)) + block(3, self.config)
        made = call("CreateContainer", request)
        call("StartContainer", block(1, made))
        return made

    def log_of(self, name):
        """Where containerd writes what a container says."""
        return Path(f"/tmp/{self.name}-{name}.log")

    def memcg_of(self, container_id):
        """Of one of its containers."""
        return self.cgroup / self.scope.format(container_id)

    def close(self):
        call("StopPodSandbox", block(1, self.sandbox))
        call("RemovePodSandbox", block(1, self.sandbox))


def status_of(container_id):
    """CRI's, as bytes: the reason of its end stands in it as text."""
    return ask("ContainerStatus", block(1, container_id))


def ended(container_id):
    """As status_of, once it has ended."""
    found = status_of(container_id)
    return found if any(reason in found for reason in (b"Completed", b"Error", b"OOMKilled")) else b""


def exec_sync(container_id, argv, timeout_s):
    """As a kubelet's exec probe: the exit code (ExecSyncResponse: 3); raises grpc.RpcError."""
    request = block(1, container_id) + b"".join(block(2, word) for word in argv) + number(3, timeout_s)
    answer = ask("ExecSync", request)
    return answer[-1] if answer[-2:-1] == bytes([3 << 3]) else 0


class CriPod(Sandbox):
    """A pod with one container, `agent`."""

    def __init__(self, uid, name, namespace, limit_mib, user=0, capabilities=(), sandbox=None, **given):
        """`sandbox`: further arguments of Sandbox; `given`: of start()."""
        super().__init__(uid, name, namespace, **(sandbox or {}))
        security = block(1, b"".join(block(1, name) for name in capabilities)) if capabilities else b""
        security += block(5, number(1, user)) if user else b""
        self.id = self.start("agent", limit_mib, security=security, **given)
        self.log, self.container = self.log_of("agent"), self.memcg_of(self.id)

    def status(self):
        """As status_of."""
        return status_of(self.id)

    def resize(self, limit_mib):
        """As a kubelet resizes it in place; LinuxContainerResources: memory_limit_in_bytes 4."""
        ask("UpdateContainerResources", block(1, self.id) + block(2, number(4, limit_mib << 20)))
