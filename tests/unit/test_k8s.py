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

from governor import cli, cri, policy_directory

K8S = Path(__file__).parent.parent.parent / "scripts" / "k8s"
DAEMON_SET = K8S / "base" / "daemonset.yaml"
LOADER_PATCH = K8S / "overlays" / "kprobe" / "loader.yaml"
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
    """As kustomize: mappings key by key, containers by name, other lists are replaced."""
    if isinstance(base, dict) and isinstance(patch, dict):
        return base | {key: merged(base.get(key), value) for key, value in patch.items()}
    if isinstance(base, list) and patch and isinstance(patch[0], dict):
        by_name = {each["name"]: each for each in patch}
        assert by_name.keys() <= {each["name"] for each in base}
        return [merged(each, by_name.get(each["name"], {})) for each in base]
    return patch


def patched(overlay):
    """The DaemonSet after the JSON patches (RFC 6902) of an overlay."""
    made = read(DAEMON_SET)
    for patch in read(K8S / "overlays" / overlay / "kustomization.yaml")["patches"]:
        assert patch["target"] == {"kind": made["kind"], "name": made["metadata"]["name"]}
        for step in yaml.safe_load(patch["patch"]):
            *above, last = [int(key) if key.isdecimal() else key for key in step["path"].strip("/").split("/")]
            found = functools.reduce(operator.getitem, above, made)
            if step["op"] == "test":
                assert found[last] == step["value"]
            elif step["op"] == "remove":
                del found[last]
            else:
                assert (step["op"], last) == ("add", "-")
                found.append(step["value"])
    return made


RESOURCES = {
    "namespace": read(K8S / "base" / "namespace.yaml"),
    "daemonset": read(DAEMON_SET),
    "daemonset with kprobe": merged(read(DAEMON_SET), read(LOADER_PATCH)),
    "daemonset with labels": patched("labels"),
    "daemonset live": patched("live"),
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
        for name in made["resources"]:
            assert (path.parent / name).exists()
        for patch in made.get("patches", []):
            assert "path" not in patch or (path.parent / patch["path"]).exists()
    base = read(K8S / "base" / "kustomization.yaml")
    [generated] = base["configMapGenerator"]
    assert {"configMap": {"name": generated["name"]}, "name": "policies"} in pod()["volumes"]
    assert sorted(generated["files"]) == [f"policies/{each.name}" for each in (K8S / "base/policies").iterdir()]
    assert {each["image"] for each in containers(pod())} == {image["name"] for image in base["images"]}


def test_the_runtimes_socket_is_where_the_daemon_looks_for_it(tmp_path):
    spec = patched("labels")["spec"]["template"]["spec"]
    [mount] = [each for each in spec["containers"][0]["volumeMounts"] if each["name"] == "runtime"]
    [host_root] = re.findall(r"--host-root=(\S+)", " ".join(spec["containers"][0]["args"]))
    path = tmp_path / mount["mountPath"].removeprefix(f"{host_root}/")
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as runtime:
        runtime.bind(str(path))
        assert cri.sockets(str(tmp_path)) == [str(path)]


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


def test_the_image_is_built_from_what_is_there():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", (K8S / "Containerfile").read_text(), re.MULTILINE)
    assert copied and all((K8S.parent.parent / name).exists() for names in copied for name in names.split())
