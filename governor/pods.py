"""What a cgroup's path says: whose container it is, or whether containers can appear below it. Pure.

    systemd    ...[X-]kubepods.slice/[X-]kubepods-QOS.slice/[X-]kubepods-QOS-podUID.slice/RUNTIME-ID.scope
    cgroupfs   ...kubepods/QOS/podUID/[RUNTIME-]ID

QOS is burstable or besteffort; guaranteed pods are one level up and do not say so. The kubelet makes all but the last
part (its cgroup_manager_linux.go, qos_container_manager_linux.go, pod_container_manager_linux.go), the runtime that.

The outermost kubepods counts: what lies below a container is that container's own, whatever it calls itself, since a
container that may make cgroups chooses their names. kind's kubelet runs in a container of Docker's or Podman's, so
what is above the outermost kubepods may be anything.
"""

from __future__ import annotations

import re
from typing import NamedTuple

GUARANTEED, BURSTABLE, BESTEFFORT = "guaranteed", "burstable", "besteffort"
_QOS = (BURSTABLE, BESTEFFORT)
_ROOT = re.compile(r"(?:(?:[^/]+-)?kubepods\.slice|kubepods)")
# Runtimes' helpers have scopes beside the containers', such as crio-conmon-ID: no other prefix is a container.
_CONTAINER = re.compile(r"(?:(cri-containerd|crio|docker)-)?([0-9a-f]{64})")
# Usually a UUID; of a static pod the kubelet's hash, or what its author wrote.
_UID = re.compile(r"[0-9A-Za-z_.-]{1,128}")
_SCOPE = ".scope"
_SLICE = ".slice"


class Place(NamedTuple):
    """Where a container is, as its path says."""

    pod_uid: str
    qos: str  # guaranteed, burstable or besteffort
    container_id: str
    runtime: str  # cri-containerd, crio or docker; "" under cgroupfs, where Docker and containerd do not say


def place_of(path: str) -> Place | None:
    """The container at a path below the cgroup root ("a/b/c"); None for all that is not exactly a container."""
    root, qos, levels = _below_root(path)
    if len(levels) != 2:
        return None
    by_systemd = root.endswith(_SLICE)
    pod_uid = _pod_uid(root, qos, levels[0])
    name = levels[1]
    if pod_uid is None or name.endswith(_SCOPE) != by_systemd:
        return None
    found = _CONTAINER.fullmatch(name.removesuffix(_SCOPE))
    if found is None or (by_systemd and not found[1]):
        return None
    return Place(pod_uid, qos or GUARANTEED, found[2], found[1] or "")


def is_root(name: str) -> bool:
    """Whether a directory of this name is a kubelet's uppermost one."""
    return bool(_ROOT.fullmatch(name))


def holds_containers(path: str) -> bool:
    """Whether a path is a kubelet's root, a QoS class below it or a pod: where pods and containers appear."""
    root, qos, levels = _below_root(path)
    if not levels:
        return bool(root)
    return len(levels) == 1 and _pod_uid(root, qos, levels[0]) is not None


def _below_root(path: str) -> tuple[str, str, list[str]]:
    """The outermost root on a path, the QoS class, "" for none, and what is below those; ("", "", []) without one."""
    parts = path.strip("/").split("/")
    root = next(filter(is_root, parts), "")
    if not root:
        return "", "", []
    below = parts[parts.index(root) + 1 :]
    qos = _qos_of(root, below)
    return root, qos, below[1:] if qos else below


def _qos_of(root: str, below: list[str]) -> str:
    """Of the first level below a root; "" where that is no QoS class."""
    stem = root.removesuffix(_SLICE)
    for qos in _QOS:
        if below and below[0] == (f"{stem}-{qos}{_SLICE}" if stem != root else qos):
            return qos
    return ""


def _pod_uid(root: str, qos: str, name: str) -> str | None:
    """The UID that the name of a pod's cgroup holds; None if it is none."""
    stem = root.removesuffix(_SLICE)
    by_systemd = stem != root
    if by_systemd:  # a slice's name holds those above it, so "-" separates, and the kubelet writes "_" in the UID
        prefix = f"{stem}-{qos}-pod" if qos else f"{stem}-pod"
        if not (name.startswith(prefix) and name.endswith(_SLICE)):
            return None
        uid = name[len(prefix) : -len(_SLICE)]
        if "-" in uid:
            return None
    elif name.startswith("pod"):
        uid = name.removeprefix("pod")
    else:
        return None
    if not _UID.fullmatch(uid):
        return None
    return uid.replace("_", "-") if by_systemd else uid
