"""Whose container it is, from the files of containerd, CRI-O and Docker; and from files that no runtime wrote."""

import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import bundle
from governor.bundle import Bundle, parse_bundle, read_bundle
from governor.pods import Place

ID = "c0ffee" + "0" * 58
UID = "0f9a8b7c-1d2e-4f30-a1b2-c3d4e5f60718"
KNOWN = Bundle(False, "team-a", "agent-0", UID, "agent", "careful")
ENV = ["PATH=/usr/bin", "GOVERNOR_POLICY=careful", "A", "GOVERNOR_POLICY_X=other"]
CONTAINERD = "run/containerd/io.containerd.runtime.v2.task/k8s.io/{}/config.json"
CRIO = "run/containers/storage/overlay-containers/{}/userdata/config.json"
DOCKER = "var/lib/docker/containers/{}/config.v2.json"


def containerd(kind="container"):
    annotations = {
        "io.kubernetes.cri.container-type": kind,
        "io.kubernetes.cri.container-name": "agent",
        "io.kubernetes.cri.sandbox-id": "f" * 64,
        "io.kubernetes.cri.sandbox-name": "agent-0",
        "io.kubernetes.cri.sandbox-namespace": "team-a",
        "io.kubernetes.cri.sandbox-uid": UID,
    }
    return {"ociVersion": "1.1.0", "process": {"env": ENV}, "annotations": annotations}


def crio(kind="container"):
    annotations = {
        "io.kubernetes.cri-o.ContainerType": kind,
        "io.kubernetes.cri-o.ContainerName": "k8s_agent_agent-0_team-a_0",
        "io.kubernetes.container.name": "agent",
        "io.kubernetes.pod.name": "agent-0",
        "io.kubernetes.pod.namespace": "team-a",
        "io.kubernetes.pod.uid": UID,
    }
    return {"ociVersion": "1.1.0", "process": {"env": ENV}, "annotations": annotations}


def docker(kind="container"):
    labels = {
        "io.kubernetes.docker.type": kind,
        "io.kubernetes.container.name": "agent",
        "io.kubernetes.pod.name": "agent-0",
        "io.kubernetes.pod.namespace": "team-a",
        "io.kubernetes.pod.uid": UID,
    }
    return {"ID": ID, "Config": {"Env": ENV, "Labels": labels}}


RUNTIMES = {
    "containerd": ("cri-containerd", CONTAINERD, containerd, "sandbox"),
    "k3s": ("cri-containerd", CONTAINERD.replace("run/", "run/k3s/", 1), containerd, "sandbox"),
    "CRI-O": ("crio", CRIO, crio, "sandbox"),
    "CRI-O, kept": ("crio", "var/lib" + CRIO.removeprefix("run"), crio, "sandbox"),
    "Docker": ("docker", DOCKER, docker, "podsandbox"),
    "containerd, cgroupfs": ("", CONTAINERD, containerd, "sandbox"),
    "CRI-O, cgroupfs": ("crio", CRIO, crio, "sandbox"),
    "Docker, cgroupfs": ("", DOCKER, docker, "podsandbox"),
}


def place(runtime):
    return Place(UID, "burstable", ID, runtime)


def write(root, path, content):
    file = Path(root, path.format(ID))
    file.parent.mkdir(parents=True)
    file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return file


@pytest.mark.parametrize("case", RUNTIMES)
def test_a_container_is_known(tmp_path, case):
    runtime, path, config, _ = RUNTIMES[case]
    write(tmp_path, path, config())
    assert read_bundle(place(runtime), str(tmp_path)) == KNOWN


@pytest.mark.parametrize("case", RUNTIMES)
def test_a_sandbox_is_known_as_one(tmp_path, case):
    runtime, path, config, kind = RUNTIMES[case]
    write(tmp_path, path, config(kind))
    assert read_bundle(place(runtime), str(tmp_path)).is_sandbox


def test_no_file_is_no_bundle(tmp_path):
    assert read_bundle(place("cri-containerd"), str(tmp_path)) is None
    write(tmp_path, CONTAINERD, containerd())
    assert read_bundle(place("crio"), str(tmp_path)) is None
    assert read_bundle(place("cri-containerd"), str(tmp_path / "none")) is None


NOTHING_KNOWN = {
    "empty": b"",
    "torn": json.dumps(containerd()).encode()[:-30],
    "no object": [1, 2],
    "no annotations": {},
    "null": None,
    "annotations of another type": {"annotations": ["io.kubernetes.cri.container-type"]},
    "texts of other types": {
        "annotations": {
            "io.kubernetes.cri.container-type": 1,
            "io.kubernetes.cri.sandbox-name": {"a": 1},
            "io.kubernetes.cri.sandbox-namespace": None,
            "io.kubernetes.cri.sandbox-uid": ["x"],
            "io.kubernetes.cri.container-name": "n" * 254,
        },
        "process": {"env": "GOVERNOR_POLICY=careful"},
    },
    "an environment of other types": {"process": {"env": [1, None, ["GOVERNOR_POLICY=x"], {}]}},
    "a choice that is too long": {"process": {"env": ["GOVERNOR_POLICY=" + "x" * 254]}},
    "a process of another type": {"process": 7, "Config": 8},
    "half a character": b'{"process":{"env":["GOVERNOR_POLICY=\\ud800"]}}',
    "no text": b'{"process":{"env":["GOVERNOR_POLICY=\xff"]}}',
    "very deep": b"[" * 100_000,
}


@pytest.mark.parametrize("case", NOTHING_KNOWN)
def test_what_is_not_as_expected_is_unknown(tmp_path, case):
    write(tmp_path, CONTAINERD, NOTHING_KNOWN[case])
    assert read_bundle(place("cri-containerd"), str(tmp_path)) == Bundle()


def test_one_text_that_is_not_as_expected_leaves_the_others():
    config = containerd()
    config["annotations"]["io.kubernetes.cri.sandbox-name"] = 5
    config["process"]["env"] = None
    assert parse_bundle(json.dumps(config).encode(), "cri-containerd") == Bundle(
        False, "team-a", "", UID, "agent", ""
    )


NAMESPACES = {
    "as runtimes are told": ([{"type": "pid"}, {"type": "mount"}], True),
    "among the machine's mounts": ([{"type": "pid"}], False),
    "of another type": ({"type": "mount"}, True),
    "of other types": ([None, "mount", {"type": ["mount"]}], False),
    "not told of": (None, True),
}


@pytest.mark.parametrize("case", NAMESPACES)
def test_only_who_is_said_to_be_among_the_machines_mounts_is(case):
    namespaces, expected = NAMESPACES[case]
    config = containerd() | {"linux": {"namespaces": namespaces}}
    assert parse_bundle(json.dumps(config).encode(), "cri-containerd").has_own_mounts is expected


def test_of_a_variable_that_comes_twice_the_last_counts():
    config = {"process": {"env": ["GOVERNOR_POLICY=a", "GOVERNOR_POLICY=b"]}}
    assert parse_bundle(json.dumps(config).encode(), "cri-containerd").chosen_policy == "b"


def test_a_file_without_end_is_not_read(tmp_path):
    file = write(tmp_path, CONTAINERD, containerd())
    os.truncate(file, 1 << 40)
    assert read_bundle(place("cri-containerd"), str(tmp_path)) == Bundle()
    file.write_text(json.dumps(containerd()).ljust(bundle.SIZE_MAX_BYTES + 1))
    assert read_bundle(place("cri-containerd"), str(tmp_path)) == Bundle()


@pytest.mark.parametrize("kind", ["link", "fifo", "directory", "device"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    file = write(tmp_path, CONTAINERD, containerd())
    elsewhere = file.rename(tmp_path / "elsewhere")
    if kind == "link":
        file.symlink_to(elsewhere)
    elif kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif os.geteuid() == 0:
        os.mknod(file, 0o20644, os.makedev(1, 5))  # /dev/zero
    assert read_bundle(place("cri-containerd"), str(tmp_path)) in (Bundle(), None)


def test_no_directory_on_the_way_may_be_a_link_but_the_hosts_root_may(tmp_path):
    write(tmp_path / "real", CONTAINERD, containerd())
    (tmp_path / "host").symlink_to(tmp_path / "real")
    assert read_bundle(place("cri-containerd"), str(tmp_path / "host")) == KNOWN
    tasks = tmp_path / "real/run/containerd"
    tasks.rename(tmp_path / "real/run/moved")
    tasks.symlink_to("moved")
    assert read_bundle(place("cri-containerd"), str(tmp_path / "host")) is None


SAYS = {"cri-containerd": containerd, "crio": crio, "docker": docker}


@pytest.mark.parametrize("kind", ["sandbox", "container"])
@pytest.mark.parametrize("runtime", SAYS)
def test_keys_of_another_runtime_name_nobody(runtime, kind):
    """CRI-O has a pod's own annotations among its own, Docker an image's labels."""
    config = SAYS[runtime]()
    said = texts(config)
    own = dict.fromkeys(said, "evil") | {key: "container" for key in said if key.lower().endswith("type")}
    others = {
        key: value for name, says in SAYS.items() if name != runtime for key, value in texts(says(kind)).items()
    }
    said |= others | own
    expected = Bundle(False, "evil", "evil", "evil", "evil", "careful")
    assert parse_bundle(json.dumps(config).encode(), runtime) == expected


def texts(config):
    return config.get("annotations") or config["Config"]["Labels"]


KEYS = [*containerd(), *containerd()["annotations"], "Config", "Labels", "Env", "env"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 9) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=20,
)


@given(JSON | st.binary(max_size=200), st.sampled_from(list(SAYS)))
def test_it_never_raises(content, runtime):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    found = parse_bundle(data, runtime)
    assert all(isinstance(getattr(found, name), (str, bool)) for name in bundle.Bundle.__slots__)
