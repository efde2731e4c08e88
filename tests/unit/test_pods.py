"""From a cgroup's path to whose container it is: both drivers, nested roots, and everything that is no container."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.pods import Place, holds_containers, place_of

UID = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718"
SYSTEMD_UID = UID.replace("-", "_")
STATIC = "4d5e6f708192a3b4c5d6e7f8091a2b3c"
ID = "c0ffee" + "0123456789abcdef" * 3 + "0123456789"
OTHER = "b" * 64
BURSTABLE = f"kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{SYSTEMD_UID}.slice"
KIND = (
    f"system.slice/docker-{OTHER}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/"
    f"kubelet-kubepods-burstable-pod{SYSTEMD_UID}.slice"
)

CONTAINERS = {
    "containerd, systemd": (f"{BURSTABLE}/cri-containerd-{ID}.scope", "burstable", "cri-containerd"),
    "CRI-O, systemd": (f"{BURSTABLE}/crio-{ID}.scope", "burstable", "crio"),
    "Docker, systemd": (f"{BURSTABLE}/docker-{ID}.scope", "burstable", "docker"),
    "besteffort": (
        f"kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SYSTEMD_UID}.slice/crio-{ID}.scope",
        *("besteffort", "crio"),
    ),
    "guaranteed": (
        f"kubepods.slice/kubepods-pod{SYSTEMD_UID}.slice/cri-containerd-{ID}.scope",
        *("guaranteed", "cri-containerd"),
    ),
    "containerd, cgroupfs": (f"kubepods/burstable/pod{UID}/{ID}", "burstable", ""),
    "CRI-O, cgroupfs": (f"kubepods/besteffort/pod{UID}/crio-{ID}", "besteffort", "crio"),
    "guaranteed, cgroupfs": (f"kubepods/pod{UID}/{ID}", "guaranteed", ""),
    "leading slash, as /proc/PID/cgroup says it": (f"/kubepods/burstable/pod{UID}/{ID}", "burstable", ""),
    "kind": (f"{KIND}/cri-containerd-{ID}.scope", "burstable", "cri-containerd"),
    "kind, cgroupfs": (f"docker/{OTHER}/kubelet/kubepods/burstable/pod{UID}/{ID}", "burstable", ""),
    "another cgroupRoot": (
        f"a.slice/a-b.slice/a-b-kubepods.slice/a-b-kubepods-pod{SYSTEMD_UID}.slice/crio-{ID}.scope",
        *("guaranteed", "crio"),
    ),
    "another cgroupRoot, cgroupfs": (f"work/nodes/kubepods/pod{UID}/{ID}", "guaranteed", ""),
}

NOT_CONTAINERS = {
    "nothing": "",
    "the root": "/",
    "a service": "system.slice/ssh.service",
    "init": "init.scope",
    "QoS": "kubepods.slice/kubepods-burstable.slice",
    "a pod": BURSTABLE,
    "a pod, cgroupfs": f"kubepods/burstable/pod{UID}",
    "conmon": f"{BURSTABLE}/crio-conmon-{ID}.scope",
    "conmon, cgroupfs": f"kubepods/burstable/pod{UID}/crio-conmon-{ID}",
    "an unknown helper": f"{BURSTABLE}/helper-{ID}.scope",
    "a scope without a runtime": f"{BURSTABLE}/{ID}.scope",
    "the runtime's child of a container": f"{BURSTABLE}/crio-{ID}.scope/container",
    "systemd in a container": f"{BURSTABLE}/cri-containerd-{ID}.scope/init.scope",
    "a short id": f"kubepods/burstable/pod{UID}/{ID[:12]}",
    "a long id": f"kubepods/burstable/pod{UID}/{ID}0",
    "capitals": f"kubepods/burstable/pod{UID}/{ID.upper()}",
    "not in a pod": f"kubepods/burstable/{ID}",
    "a pod without a UID": f"kubepods/burstable/pod/{ID}",
    "a container of Docker's own": f"system.slice/docker-{ID}.scope",
    "QoS twice": f"kubepods/burstable/besteffort/pod{UID}/{ID}",
    "the other QoS's pod": (
        f"kubepods.slice/kubepods-besteffort.slice/kubepods-burstable-pod{SYSTEMD_UID}.slice/crio-{ID}.scope"
    ),
    "burstable pod one level up": f"kubepods.slice/kubepods-burstable-pod{SYSTEMD_UID}.slice/crio-{ID}.scope",
    "another stem": f"kubepods.slice/kubelet-kubepods-pod{SYSTEMD_UID}.slice/crio-{ID}.scope",
    "drivers mixed": f"kubepods.slice/kubepods-burstable.slice/pod{UID}/{ID}",
    "scope under cgroupfs": f"kubepods/burstable/pod{UID}/crio-{ID}.scope",
    "a name that only ends so": f"mykubepods/burstable/pod{UID}/{ID}",
    "a line feed after the id": f"kubepods/burstable/pod{UID}/{ID}\n",
    "a line feed in the UID": f"kubepods/burstable/pod{UID}\n/{ID}",
    "made by a container below itself": f"kubepods/burstable/pod{UID}/{ID}/kubepods/burstable/pod{STATIC}/{OTHER}",
    "the same, by systemd in it": f"{BURSTABLE}/crio-{ID}.scope/{BURSTABLE}/crio-{OTHER}.scope",
    "beside a container": f"{BURSTABLE}/x/{BURSTABLE}/crio-{OTHER}.scope",
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_a_container_is_known_by_its_path(case):
    path, qos, runtime = CONTAINERS[case]
    assert place_of(path) == Place(UID, qos, ID, runtime)
    assert not holds_containers(path)


@pytest.mark.parametrize("case", NOT_CONTAINERS)
def test_everything_else_is_none(case):
    assert place_of(NOT_CONTAINERS[case]) is None


@pytest.mark.parametrize(
    ("path", "uid"),
    [
        (f"kubepods/burstable/pod{STATIC}/{ID}", STATIC),
        (f"kubepods.slice/kubepods-pod{STATIC}.slice/crio-{ID}.scope", STATIC),
        (f"kubepods/pod{UID.replace('-', '_')}/{ID}", SYSTEMD_UID),  # chosen by the author of a static pod
    ],
)
def test_uids_of_static_pods(path, uid):
    assert place_of(path).pod_uid == uid


@pytest.mark.parametrize(
    ("path", "holds"),
    [
        ("kubepods", True),
        ("kubepods/burstable", True),
        (f"kubepods/burstable/pod{UID}", True),
        (f"kubepods/pod{UID}", True),
        ("kubepods.slice/kubepods-besteffort.slice", True),
        (BURSTABLE, True),
        (KIND, True),
        ("kubepods/other", False),
        ("kubepods/burstable/other", False),
        ("kubepods/burstable/burstable", False),
        (f"kubepods/burstable/pod{UID}/{ID}", False),
        (f"kubepods/burstable/pod{UID}/{ID}/kubepods", False),
        (f"{BURSTABLE}/x/kubepods", False),
        ("system.slice", False),
        ("", False),
    ],
)
def test_where_containers_appear(path, holds):
    assert holds_containers(path) is holds


WORDS = [
    *("kubepods", "kubepods.slice", "kubelet-kubepods.slice", "burstable", "besteffort", f"pod{UID}", f"pod{STATIC}"),
    *("kubepods-burstable.slice", f"kubepods-burstable-pod{SYSTEMD_UID}.slice", f"kubepods-pod{STATIC}.slice"),
    *(ID, OTHER, f"crio-{ID}.scope", f"cri-containerd-{OTHER}.scope", f"crio-conmon-{ID}.scope", f"docker-{ID}"),
    *("container", "init.scope", "system.slice", f"docker-{OTHER}.scope", "", "..", "pod", "pod-", "-", "_"),
]
PATHS = st.lists(st.sampled_from(WORDS) | st.text(max_size=80), max_size=8).map("/".join)


@given(PATHS)
def test_it_never_raises_and_what_holds_containers_is_none(path):
    assert not (place_of(path) and holds_containers(path))


@given(PATHS, PATHS)
def test_two_containers_are_never_taken_for_one_and_none_lies_in_another(path, further):
    one, other = place_of(path), place_of(f"{path}/{further}")
    assert not (one and other) or path.strip("/") == f"{path}/{further}".strip("/")


UIDS = st.uuids().map(str) | st.just(STATIC)
QOS = st.sampled_from(["guaranteed", "burstable", "besteffort"])
IDS = st.text("0123456789abcdef", min_size=64, max_size=64)
RUNTIMES = st.sampled_from(["cri-containerd", "crio", "docker"])


@given(UIDS, QOS, IDS, RUNTIMES, st.sampled_from(["", "kubelet-"]))
def test_what_a_kubelet_and_a_runtime_write_is_read_back(uid, qos, container_id, runtime, prefix):
    stem = f"{prefix}kubepods"
    middle = "" if qos == "guaranteed" else f"-{qos}"
    pod = f"{stem}{middle}-pod{uid.replace('-', '_')}.slice"
    above = f"{stem}.slice/" + (f"{stem}{middle}.slice/" if middle else "")
    assert place_of(f"{above}{pod}/{runtime}-{container_id}.scope") == Place(uid, qos, container_id, runtime)
    inner = "" if qos == "guaranteed" else f"{qos}/"
    assert place_of(f"kubepods/{inner}pod{uid}/{container_id}") == Place(uid, qos, container_id, "")
