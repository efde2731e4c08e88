"""The pod of scripts/k8s as a kubelet and containerd make it: the init container, then the daemon, with those rights.

Their image is the archive that GOVERNOR_IMAGE names (of scripts/image), else the machine's own files, read-only.
State and policies are the test's.
"""

from __future__ import annotations

import os
import subprocess
import uuid
from pathlib import Path

import yaml
from conftest import MASKED, READ_ONLY, ROOT, wait_for
from cri_pods import IMAGE, NODE_NETWORK, NODE_PIDS, Sandbox, block, ended, exec_sync, number

POD = yaml.safe_load((ROOT / "scripts/k8s/base/daemonset.yaml").read_text())["spec"]["template"]["spec"]
[LABELS] = yaml.safe_load((ROOT / "scripts/k8s/components/labels/kustomization.yaml").read_text())["patches"]
ADDED = [step["value"] for step in yaml.safe_load(LABELS["patch"]) if step["path"].startswith("/spec/")]
POD["volumes"] += [one for one in ADDED if "hostPath" in one]
POD["containers"][0]["volumeMounts"] += [one for one in ADDED if "mountPath" in one]
[BUILT] = yaml.safe_load((ROOT / "scripts/k8s/base/kustomization.yaml").read_text())["images"]
ARCHIVE = os.environ.get("GOVERNOR_IMAGE")
MACHINE_FILES = [(path, path, True) for path in ("/usr", "/opt/deps", str(ROOT))]
MACHINE_ENVIRONMENT = {"PYTHONDONTWRITEBYTECODE": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"}


def security_of(container):
    """LinuxContainerSecurityContext of a container: 1 capabilities, 5 user, 7 read-only, 11 no new privileges, ..."""
    said = container["securityContext"]
    capabilities = b"".join(block(1, name) for name in said["capabilities"]["add"])
    capabilities += b"".join(block(2, name) for name in said["capabilities"]["drop"])
    found = block(1, capabilities) + block(5, number(1, POD["securityContext"]["runAsUser"]))
    found += number(7, said["readOnlyRootFilesystem"])
    found += number(11, not said.get("allowPrivilegeEscalation", True))
    found += b"".join(block(13, path) for path in MASKED) + b"".join(block(14, path) for path in READ_ONLY)
    return found + block(15, number(1, 1))  # 15 seccomp: Unconfined


def options_of(mount):
    """Whether it is read-only, and whether what the host mounts and unmounts below is so here, too."""
    return mount.get("readOnly", False), mount.get("mountPropagation") == "HostToContainer"


class DaemonSet:
    """One node's pod of it; acting and asking the runtime, as the components "live" and "labels" have it."""

    def __init__(self, tmp_path, policies, state):
        if ARCHIVE:
            subprocess.run(["ctr", "-n", "k8s.io", "images", "import", ARCHIVE], check=True)  # minutes, if emulated
        (tmp_path / "tmp").mkdir()
        state.mkdir()
        own = {"state": state, "policies": policies, "tmp": tmp_path / "tmp"}
        self.places = {one["name"]: str(own.get(one["name"]) or one["hostPath"]["path"]) for one in POD["volumes"]}
        for place in map(Path, self.places.values()):
            if not place.is_socket():
                place.mkdir(parents=True, exist_ok=True)
        self.pod = Sandbox(str(uuid.uuid4()), "governor", "governor", namespaces=NODE_NETWORK + NODE_PIDS)
        [loader], [self.container] = POD["initContainers"], POD["containers"]
        loading = self.start(loader)
        assert b"Completed" in wait_for(lambda: ended(loading), 200, "the loader's end"), self.log("loader")
        assert "polling" not in self.log("loader"), self.log("loader")
        self.attempt = 0
        self.begin()

    def begin(self):
        """The daemon's container; once it has ended, the one that a kubelet puts in its place: no loader runs."""
        self.id = self.start(self.container, self.attempt)
        self.memcg, self.attempt = self.pod.memcg_of(self.id), self.attempt + 1

    def start(self, container, attempt=0):
        limit = container["resources"]["limits"]["memory"]
        assert limit.endswith("Mi")
        words = [word.replace("$(POD_IP)", "127.0.0.1") for word in container.get("args", []) if word != "--dry-run"]
        given = [(one, self.places[one["name"]]) for one in container["volumeMounts"]]
        environment = {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}
        files, image = MACHINE_FILES, IMAGE
        if ARCHIVE:
            files, image = [], f"{BUILT['name']}:{BUILT['newTag']}"
        else:
            environment |= MACHINE_ENVIRONMENT
        return self.pod.start(
            container["name"],
            int(limit[:-2]),
            argv=[*container["command"], *words],
            mounts=[*files, *((of, one["mountPath"], *options_of(one)) for one, of in given)],
            security=security_of(container),
            environment=environment,
            image=image,
            attempt=attempt,
        )

    def log(self, container="governor"):
        path = self.pod.log_of(container)
        return path.read_text() if path.exists() else ""

    @property
    def pids(self):
        """Of its processes, the daemon's own first."""
        try:
            return sorted(map(int, (self.memcg / "cgroup.procs").read_text().split()))
        except OSError:
            return []

    def signal(self, number):
        os.kill(self.pids[0], number)

    def run_pre_stop(self):
        return exec_sync(self.id, self.container["lifecycle"]["preStop"]["exec"]["command"], 60)

    def close(self):
        self.pod.close()
