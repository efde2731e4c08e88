"""Whose container it is, as its runtime wrote it down: the config.json of its OCI bundle. No API server is asked.

containerd (NewBundle in its core/runtime/v2/bundle.go) and CRI-O (SaveToFile in its container_create.go) write the
file before the OCI runtime makes the cgroup, so it is there once the cgroup is seen, unless a disk is slow. Docker's
has no names of Kubernetes': its own config.v2.json has, as labels.

The runtime writes these files, but pods' authors choose many of the texts: the size is bounded, no link is followed
below the host's root, and what is not of the type or the length expected is unknown.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import orjson

from governor.pods import Place
from governor.session_files import open_directory, open_regular

SIZE_MAX_BYTES = 4 << 20  # an environment, say, is a few KiB; a whole exec is limited to a quarter of the stack
_READ_BYTES = 64 << 10
TEXT_MAX_CHARACTERS = 253  # Kubernetes' names are no longer (RFC 1123 subdomain)
CHOICE = "GOVERNOR_POLICY"
_SANDBOXES = ("sandbox", "podsandbox")
_CONTAINERD = "io.containerd.runtime.v2.task/k8s.io/{id}/config.json"
_FILES = {
    "cri-containerd": (f"run/containerd/{_CONTAINERD}", f"run/k3s/containerd/{_CONTAINERD}"),
    "crio": (
        "run/containers/storage/overlay-containers/{id}/userdata/config.json",
        "var/lib/containers/storage/overlay-containers/{id}/userdata/config.json",
    ),
    "docker": ("var/lib/docker/containers/{id}/config.v2.json",),
}
# What each runtime calls the kind of a container, the pod's namespace, its name, its UID, the container's name. No
# other's keys count: CRI-O copies the pod's own annotations beside its own (SpecAddAnnotations in its container.go),
# Docker the image's labels. Of its own keys CRI-O and cri-dockerd write the kubelet's values last, and containerd
# writes its own after whatever annotations its configuration lets through.
_KEYS = {
    "cri-containerd": (
        *(
            "io.kubernetes.cri.container-type",
            "io.kubernetes.cri.sandbox-namespace",
            "io.kubernetes.cri.sandbox-name",
        ),
        *("io.kubernetes.cri.sandbox-uid", "io.kubernetes.cri.container-name"),
    ),
    "crio": (
        *("io.kubernetes.cri-o.ContainerType", "io.kubernetes.pod.namespace", "io.kubernetes.pod.name"),
        *("io.kubernetes.pod.uid", "io.kubernetes.container.name"),
    ),
    "docker": (
        *("io.kubernetes.docker.type", "io.kubernetes.pod.namespace", "io.kubernetes.pod.name"),
        *("io.kubernetes.pod.uid", "io.kubernetes.container.name"),
    ),
}


@dataclass(frozen=True, slots=True)
class Bundle:
    """What the runtime wrote of a container; "" is unknown."""

    is_sandbox: bool = False  # the pause container, which is never governed
    namespace: str = ""
    pod: str = ""
    pod_uid: str = ""
    name: str = ""
    chosen_policy: str = ""
    has_own_mounts: bool = True  # False: the runtime was told to leave it among the machine's (OCI: linux.namespaces)


def read_bundle(place: Place, host_root: str = "/") -> Bundle | None:
    """What is written of a container on the host whose files are at `host_root`; None where there is no such file."""
    for runtime in (place.runtime,) if place.runtime else _FILES:  # cgroupfs: whose file it is, says who wrote it
        for file in _FILES[runtime]:
            data = _read(os.path.realpath(host_root), file.format(id=place.container_id))
            if data is not None:
                return parse_bundle(data, runtime)
    return None


def parse_bundle(data: bytes, runtime: str) -> Bundle:
    """Of the contents of config.json, or of config.v2.json where `runtime`, as Place has it, is docker.

    What is not as expected is unknown.
    """
    try:
        config = _mapping(orjson.loads(data))
    except orjson.JSONDecodeError:
        return Bundle()
    if runtime == "docker":
        docker = _mapping(config.get("Config"))
        said, environment = _mapping(docker.get("Labels")), docker.get("Env")
    else:
        said, environment = _mapping(config.get("annotations")), _mapping(config.get("process")).get("env")
    namespaces = _mapping(config.get("linux")).get("namespaces")
    own_mounts = not isinstance(namespaces, list) or any(_mapping(each).get("type") == "mount" for each in namespaces)
    kind, namespace, pod, pod_uid, name = (_text(said.get(key)) for key in _KEYS[runtime])
    return Bundle(kind in _SANDBOXES, namespace, pod, pod_uid, name, _choice(environment), own_mounts)


def _choice(environment: Any) -> str:
    """The last one, as runc 1.2 and later take it where a variable comes twice."""
    prefix = f"{CHOICE}="
    entries = environment if isinstance(environment, list) else []
    chosen = [entry for entry in entries if isinstance(entry, str) and entry.startswith(prefix)]
    return _text(chosen[-1].removeprefix(prefix)) if chosen else ""


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= TEXT_MAX_CHARACTERS else ""


def _read(root: str, path: str) -> bytes | None:
    """None where there is no such file; empty when it is one that nobody should read."""
    directory, _, name = f"{root.rstrip('/')}/{path}".rpartition("/")
    try:
        inside = open_directory(directory)
    except OSError:
        return None
    try:
        fd = open_regular(name, os.O_RDONLY, inside)
    except FileNotFoundError:
        return None
    except OSError:
        return b""
    finally:
        os.close(inside)
    data = b""
    try:
        while len(data) <= SIZE_MAX_BYTES and (part := os.read(fd, _READ_BYTES)):
            data += part
    finally:
        os.close(fd)
    return data if len(data) <= SIZE_MAX_BYTES else b""
