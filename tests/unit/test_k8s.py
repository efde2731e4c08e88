"""scripts/k8s: manifests that Kubernetes takes, each right with its reason, and commands that governor knows."""

import functools
import json
import operator
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import kubernetes_validate
import pytest
import typer
import yaml

from governor import bundle, cli, cri, pods, policy_directory

K8S = Path(__file__).parent.parent.parent / "scripts" / "k8s"
DAEMON_SET = K8S / "base" / "daemonset.yaml"
LOADER_PATCH = K8S / "components" / "kprobe" / "loader.yaml"
UNIT = K8S / "governor.service"
FIRST_VERSION = "1.30"  # that knows appArmorProfile


def read(path):
    return yaml.safe_load(path.read_text())


def pod(path=DAEMON_SET):
    return read(path)["spec"]["template"]["spec"]


def containers(of):
    return [*of.get("initContainers", []), *of.get("containers", [])]


def added(of):
    return {name for each in containers(of) for name in each["securityContext"]["capabilities"]["add"]}


def merged(base, patch):
    """As kustomize: mappings key by key; containers, volumes and mounts by their names; other lists are replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merged(base.get(key), value) for key, value in patch.items()}
    if isinstance(base, list) and patch and isinstance(patch[0], dict):
        key = "mountPath" if "mountPath" in patch[0] else "name"
        by_name = {each[key]: each for each in patch}
        there = {each[key] for each in base}
        new = [each for each in patch if each[key] not in there]
        return [merged(each, by_name.get(each[key], {})) for each in base] + new
    return patch


def patched(*components):
    """The DaemonSet after the patches of components: JSON patches (RFC 6902) and strategic merges."""
    made = read(DAEMON_SET)
    for component in components:
        for patch in read(K8S / "components" / component / "kustomization.yaml")["patches"]:
            made = with_patch(made, patch, K8S / "components" / component)
    return made


def with_patch(made, patch, directory):
    target = patch.get("target", {"kind": made["kind"], "name": made["metadata"]["name"]})
    assert (target["kind"], target["name"]) == (made["kind"], made["metadata"]["name"])
    name, _, value = target.get("labelSelector", "").partition("=")
    if name and made["metadata"]["labels"].get(name) != value:
        return made
    steps = read(directory / patch["path"]) if "path" in patch else yaml.safe_load(patch["patch"])
    if isinstance(steps, dict):
        return merged(made, steps)
    for step in steps:
        *above, last = [part.replace("~1", "/") for part in step["path"].strip("/").split("/")]
        above = [int(part) if part.isdecimal() else part for part in above]
        found = functools.reduce(operator.getitem, above, made)
        key = int(last) if last.isdecimal() else last
        if step["op"] == "test":
            assert found[key] == step["value"]
        elif step["op"] == "remove":
            del found[key]
        elif last == "-":
            found.append(step["value"])
        else:
            assert step["op"] == "add" and isinstance(found, dict)
            found[key] = step["value"]
    return made


COMPONENTS = sorted(path.name for path in (K8S / "components").iterdir())
COMBINED = [*([name] for name in COMPONENTS), ["live", "labels", "k3s"], ["live", "kprobe", "labels", "docker"]]
RESOURCES = {
    "namespace": read(K8S / "base" / "namespace.yaml"),
    "daemonset": read(DAEMON_SET),
    **{f"daemonset with {' '.join(names)}": patched(*names) for names in COMBINED},
}
VERSIONS = [FIRST_VERSION, kubernetes_validate.latest_version().rpartition(".")[0]]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("resource", RESOURCES.values(), ids=RESOURCES)
def test_kubernetes_takes_it(resource, version):
    assert kubernetes_validate.validate(resource, version, strict=True) == version


def test_a_misspelt_key_would_be_seen():
    wrong = json.loads(json.dumps(RESOURCES["daemonset"]))
    wrong["spec"]["template"]["spec"]["containers"][0]["resource"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="resource"):
        kubernetes_validate.validate(wrong, FIRST_VERSION, strict=True)


@pytest.mark.parametrize("path", [DAEMON_SET, LOADER_PATCH], ids=lambda path: path.name)
def test_every_right_has_its_reason(path):
    lines = [line.strip() for line in path.read_text().splitlines()]
    for name in added(pod(path)):
        found = [line for line in lines if re.match(rf"- {name}\b", line)]
        assert found and all(re.search(r"# \w", line) for line in found), name
    for mount in (mount for each in containers(pod(path)) for mount in each.get("volumeMounts", [])):
        found = [line for line in lines if f"mountPath: {mount['mountPath']}" in line]
        assert found and all(re.search(r"}\s+# \w", line) for line in found), mount


def test_nothing_is_privileged_and_everything_else_is_dropped():
    for each in containers(merged(pod(), pod(LOADER_PATCH))):
        rights = each["securityContext"]
        assert rights["readOnlyRootFilesystem"] and rights["capabilities"]["drop"] == ["ALL"]
        assert not rights.get("privileged")
        # What the API server demands (ValidateSecurityContext).
        assert rights.get("allowPrivilegeEscalation", True) or "SYS_ADMIN" not in rights["capabilities"]["add"]


def test_every_volume_is_there_and_used():
    mounted = [mount["name"] for each in containers(pod()) for mount in each["volumeMounts"]]
    assert set(mounted) == {volume["name"] for volume in pod()["volumes"]}


def test_what_outlives_the_pod_is_the_hosts():
    paths = {volume["hostPath"]["path"] for volume in pod()["volumes"] if "hostPath" in volume}
    written = {"/run/governor", "/var/lib/governor", "/sys/fs/cgroup", "/sys/fs/bpf"}
    assert written <= paths
    for each in containers(pod()):
        hosts = {mount["mountPath"]: mount for mount in each["volumeMounts"] if mount["mountPath"] in paths}
        assert not [path for path, mount in hosts.items() if mount.get("readOnly") == (path in written)]


def commands():
    for each in containers(pod()):
        yield [*each["command"], *each.get("args", [])]
        if hook := each.get("lifecycle", {}).get("preStop"):
            yield hook["exec"]["command"]
    for line in UNIT.read_text().splitlines():
        if line.startswith("Exec") and "/governor " in line:
            yield ["governor", *line.partition("/governor ")[2].split()]


def test_governor_knows_what_it_is_told():
    known = typer.main.get_command(cli.app).commands
    spoken = [
        re.split(r" (?:&&|\|\||>) ", words[2]) if words[0] == "sh" else [" ".join(words)] for words in commands()
    ]
    lines = [line.split() for parts in spoken for line in parts if line.startswith("governor ")]
    assert {words[1] for words in lines} == {"load", "daemon", "unload", "off", "status"}
    for _, name, *options in lines:
        flags = {flag for parameter in known[name].params for flag in parameter.opts}
        assert {word.partition("=")[0] for word in options if word.startswith("--")} <= flags


def test_all_speak_of_one_instance():
    text = DAEMON_SET.read_text() + UNIT.read_text()
    assert len(set(re.findall(r"--instance[ =](\w+)", text))) == 1


def test_the_probes_ask_where_it_listens():
    [each] = pod()["containers"]
    [listen] = [word for word in each["args"] if word.startswith("--listen")]
    [port] = each["ports"]
    assert listen.endswith(f":{port['containerPort']}")
    asked = {probe: each[probe]["httpGet"]["path"] for probe in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert asked == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    assert {each[probe]["httpGet"]["port"] for probe in asked} == {port["name"]}


def test_what_kustomize_puts_together_is_there():
    for path in K8S.rglob("kustomization.yaml"):
        made = read(path)
        for name in [*made.get("resources", []), *made.get("components", [])]:
            assert (path.parent / name).exists()
        for patch in made.get("patches", []):
            assert "path" not in patch or (path.parent / patch["path"]).exists()
    base = read(K8S / "base" / "kustomization.yaml")
    [generated] = base["configMapGenerator"]
    assert {"configMap": {"name": generated["name"]}, "name": "policies"} in pod()["volumes"]
    assert sorted(generated["files"]) == [f"policies/{each.name}" for each in (K8S / "base/policies").iterdir()]
    assert {each["image"] for each in containers(pod())} == {image["name"] for image in base["images"]}


@pytest.mark.skipif(not shutil.which("kubectl"), reason="there is no kubectl here")
@pytest.mark.parametrize("names", COMBINED, ids=" ".join)
def test_kustomize_puts_it_together_as_these_tests_do(names, tmp_path):
    shutil.copytree(K8S, tmp_path / "k8s")
    wanted = {"resources": ["../k8s/base"], "components": [f"../k8s/components/{name}" for name in names]}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "kustomization.yaml").write_text(yaml.safe_dump(wanted))
    done = subprocess.run(["kubectl", "kustomize", tmp_path / "own"], capture_output=True, text=True, check=True)
    [made] = [each for each in yaml.safe_load_all(done.stdout) if each["kind"] == "DaemonSet"]
    assert in_any_order(made["spec"]["template"]["spec"]) == in_any_order(generated(patched(*names)))
    overlay = K8S / "overlays" / names[0] / "kustomization.yaml"
    assert read(overlay)["components"] == [f"../../components/{names[0]}"]


def generated(daemon_set):
    """With what kustomize fills in: the image's tag, and the name of the ConfigMap by what is in it."""
    text = json.dumps(daemon_set["spec"]["template"]["spec"])
    return json.loads(text.replace("registry.example/governor", "registry.example/governor:1"))


def in_any_order(spec):
    """The volumes and mounts of a pod by name: their order means nothing, and kustomize puts new ones first."""
    spec = json.loads(json.dumps(spec))
    spec["volumes"] = {each["name"]: each for each in spec["volumes"]}
    assert spec["volumes"]["policies"]["configMap"].pop("name").startswith("policies")
    for each in containers(spec):
        each["volumeMounts"] = {mount["mountPath"]: mount for mount in each["volumeMounts"]}
        each["securityContext"]["capabilities"]["add"].sort()
    return spec


ID = "c0ffee" + "0" * 58
TASKS = "io.containerd.runtime.v2.task/k8s.io"
# As containerd, k3s, CRI-O and dockerd lay it out: the directory of each container, and the file in it.
NODES = {
    "containerd": ([], "cri-containerd", f"/run/containerd/{TASKS}", "config.json"),
    "k3s": (["k3s"], "cri-containerd", f"/run/k3s/containerd/{TASKS}", "config.json"),
    "CRI-O": ([], "crio", "/run/containers/storage/overlay-containers", "userdata/config.json"),
    "Docker": (["docker"], "docker", "/var/lib/docker/containers", "config.v2.json"),
}
SAID = {
    "config.json": ("io.kubernetes.cri.container-type", "io.kubernetes.cri.sandbox-name"),
    "userdata/config.json": ("io.kubernetes.cri-o.ContainerType", "io.kubernetes.pod.name"),
    "config.v2.json": ("io.kubernetes.docker.type", "io.kubernetes.pod.name"),
}


def mounted_at(tmp_path, host, spec):
    """A host's tree as the daemon's container sees it below --host-root: what is mounted is moved there."""
    [daemon] = spec["containers"]
    [host_root] = re.findall(r"--host-root=(\S+)", " ".join(daemon["args"]))
    paths = {each["name"]: each["hostPath"]["path"] for each in spec["volumes"] if "hostPath" in each}
    seen = tmp_path / "seen"
    for mount in daemon["volumeMounts"]:
        if mount["mountPath"].startswith(f"{host_root}/") and (host / paths[mount["name"]].lstrip("/")).exists():
            place = seen / mount["mountPath"].removeprefix(f"{host_root}/")
            place.parent.mkdir(parents=True, exist_ok=True)
            (host / paths[mount["name"]].lstrip("/")).rename(place)
    return seen


@pytest.mark.parametrize("node", NODES)
def test_whose_a_container_is_can_be_read_in_the_pod(node, tmp_path):
    components, runtime, directory, file = NODES[node]
    path = tmp_path / "host" / directory.lstrip("/") / ID / file
    path.parent.mkdir(parents=True)
    kind, pod_name = SAID[file]
    said = {kind: "container", pod_name: "agent-0"}
    path.write_text(json.dumps({"Config": {"Labels": said}} if node == "Docker" else {"annotations": said}))
    place = pods.Place("", "burstable", ID, runtime)
    seen = mounted_at(tmp_path, tmp_path / "host", patched(*components)["spec"]["template"]["spec"])
    known = bundle.read_bundle(place, str(seen))
    assert known and known.pod == "agent-0"


@pytest.mark.parametrize("node", NODES)
def test_what_it_sees_of_the_hosts_containers_goes_with_them(node):
    """Else the roots and /dev/shm of containers that were there when its pod was made stay mounted in it."""
    spec = patched(*NODES[node][0])["spec"]["template"]["spec"]
    [volume] = [each["name"] for each in spec["volumes"] if each.get("hostPath", {}).get("path") == NODES[node][2]]
    [mount] = [each for each in spec["containers"][0]["volumeMounts"] if each["name"] == volume]
    assert mount["readOnly"] and mount["mountPropagation"] == "HostToContainer"


SOCKETS = {
    "/run/containerd/containerd.sock": ["labels"],
    "/run/k3s/containerd/containerd.sock": ["labels", "k3s"],
    "/run/cri-dockerd.sock": ["labels", "docker"],
}


@pytest.mark.parametrize("path", SOCKETS)
def test_the_runtimes_socket_is_where_the_daemon_looks_for_it(path, tmp_path):
    spec = patched(*SOCKETS[path])["spec"]["template"]["spec"]
    host = tmp_path / path.lstrip("/")
    host.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as runtime:
        runtime.bind(str(host))
        seen = mounted_at(tmp_path, tmp_path, spec)
        [found] = cri.sockets(str(seen))
    assert found
    assert "runtime" not in [volume["name"] for volume in pod()["volumes"]]


def test_the_policies_are_right():
    assert policy_directory.load(K8S / "base" / "policies")


def test_it_begins_as_a_dry_run_and_the_overlay_ends_that():
    base, live = (
        made["spec"]["template"]["spec"]["containers"][0]["args"] for made in (read(DAEMON_SET), patched("live"))
    )
    assert [word for word in base if word not in live] == ["--dry-run"]
    assert "--dry-run" in UNIT.read_text().partition("ExecStart=")[2].splitlines()[0]


def test_the_service_may_what_the_pod_may():
    granted = re.findall(r"^CapabilityBoundingSet=(.*)", UNIT.read_text(), re.MULTILINE)
    assert set(" ".join(granted).split()) == {f"CAP_{name}" for name in added(pod()) | added(pod(LOADER_PATCH))}


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_systemd_finds_nothing_wrong_with_the_service(tmp_path):
    unit = tmp_path / UNIT.name
    unit.write_text(UNIT.read_text().replace("/opt/governor/bin/governor", sys.executable))
    done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd here")
def test_the_service_is_no_more_exposed_than_the_readme_says():
    [said] = re.findall(
        r"`systemd-analyze security` gives it ([\d.]+) of 10", (K8S.parent.parent / "README.md").read_text()
    )
    command = ["systemd-analyze", "security", "--offline=true", "--no-pager", "--json=short"]
    judged = subprocess.run(
        [*command, f"--threshold={float(said) * 10 + 1:.0f}", UNIT], capture_output=True, text=True
    )
    assert judged.returncode == 0, judged.stderr
    better = subprocess.run(
        [*command, f"--threshold={float(said) * 10 - 10:.0f}", UNIT], capture_output=True, text=True
    )
    assert better.returncode == 1, "the threshold is heeded"


def test_what_the_service_may_not_call_is_nothing_that_it_needs():
    """An order of systemd's: the first line says that the others forbid; a later one without ~ allows again."""
    first, *others = re.findall(r"^SystemCallFilter=(.*)", UNIT.read_text(), re.MULTILINE)
    assert first.startswith("~")
    forbidden = {name for line in (first, *others) if line[0] == "~" for name in line[1:].split()}
    allowed = {name for line in others if line[0] != "~" for name in line.split()}
    needed = {"bpf", "perf_event_open", "setns", "chroot", "pidfd_getfd", "sched_setscheduler", "mlock2", "kill"}
    sets = {name for name in forbidden if name[0] == "@"}
    assert sets == {*["@clock", "@cpu-emulation", "@module", "@mount", "@obsolete", "@raw-io", "@reboot", "@swap"]}
    assert not (forbidden - sets) & needed and allowed == {"chroot"}  # the only one of @mount


def test_the_image_is_built_from_what_is_there():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (K8S / "Containerfile").read_text(), re.MULTILINE)
    assert copied and all((K8S.parent.parent / name).exists() for names in copied for name in names.split())


def test_the_image_that_is_built_is_the_one_that_is_named():
    [built] = re.findall(r"^name=(.*)", (K8S.parent / "image").read_text(), re.MULTILINE)
    [image] = read(K8S / "base" / "kustomization.yaml")["images"]
    assert built == f"{image['name']}:{image['newTag']}"
    assert built in (K8S / "Containerfile").read_text()
