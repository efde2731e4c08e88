"""The files of scripts/wiring, used as their comments say, where systemd and containerd are: scripts/vm --systemd."""

from __future__ import annotations

import itertools
import json
import os
import shlex
import subprocess
from pathlib import Path

import cri_pods
import pytest
import yaml

from tests import waiting

ROOT = Path(__file__).parent.parent.parent
WIRING = ROOT / "scripts" / "wiring"
CGROUPS = Path("/sys/fs/cgroup")
GOVERNOR = "/opt/governor/bin/governor"
# What people would run: it keeps its session where Claude Code does, and bursts once a file says so.
MY_AGENT = f"""#!/bin/sh
rm -f "$HOME/begin"
mkdir -p "$HOME/.claude/projects/p"
exec python3 {ROOT}/tests/fakes/agent.py "$HOME/.claude/projects/p/s.jsonl" "${{BURST:-touch}}" \\
    --rate-mb 20 --save-s 0.1 --begin "$HOME/begin"
"""
# As kubelets say it to containerd: see containerd's pkg/cri and runtime-spec's config.md.
MASKED = ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list", "/sys/firmware"]
READ_ONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
CAPABILITIES = [
    *("CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FSETID", "CAP_FOWNER", "CAP_MKNOD", "CAP_NET_RAW", "CAP_SETGID"),
    *("CAP_SETUID", "CAP_SETFCAP", "CAP_SETPCAP", "CAP_NET_BIND_SERVICE", "CAP_SYS_CHROOT", "CAP_KILL"),
    "CAP_AUDIT_WRITE",
]


def wait_for(condition, seconds=90.0, what="the condition"):
    return waiting.wait_for(condition, seconds, what)


def sh(*words, **options):
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=120, **options)


def checked(*words, **options):
    done = sh(*words, **options)
    assert done.returncode == 0, f"{shlex.join(map(str, words))}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture(scope="session", autouse=True)
def installed():
    """governor and the agent as an image or a machine has them."""
    assert os.environ.get("GOVERNOR_VM"), "these tests change the machine: use scripts/vm run KERNEL --systemd"
    environment = f"PYTHONPATH={os.environ['PYTHONPATH']}"
    for path in (GOVERNOR, "/usr/local/bin/governor"):
        program(Path(path), f'#!/bin/sh\nexec env {environment} python3 -P -m governor "$@"\n')
    program(Path("/usr/local/bin/my-agent"), MY_AGENT)
    if not Path("/home/agent").exists():
        checked("useradd", "--create-home", "--uid", 1500, "agent")
    (CGROUPS / "kubepods").mkdir(exist_ok=True)


def archived(home):
    """The archives below a home that hold a session."""
    manifests = Path(home, ".local/state/governor/archive").glob("*/manifest.json")
    return [manifest for manifest in manifests if "s.jsonl" in manifest.read_text()]


class Pod:
    """A pod's container as a kubelet and containerd's CRI plug-in make it, from the YAML that they are given."""

    numbers = itertools.count()

    def __init__(self, tmp_path, file, entrypoint=(), environment=None, hook=True, **changes):
        self.spec = yaml.safe_load((WIRING / file).read_text())["spec"] | changes
        [self.container] = self.spec["containers"]
        self.name = f"{self.container['name']}-{next(self.numbers)}"
        self.directory = tmp_path / self.name
        self.home, self.log_path = self.directory / "home", self.directory / "log"
        self.termination_log = self.directory / "termination-log"
        self.cgroup = CGROUPS / "kubepods" / f"pod{self.name}"
        for made in (
            self.home,
            self.directory / "upper",
            self.directory / "work",
            self.directory / "root",
            self.cgroup,
        ):
            made.mkdir(parents=True)
        self.user = self.spec["securityContext"]["runAsUser"]
        os.chown(self.home, 0, self.spec["securityContext"]["fsGroup"])  # as an emptyDir is
        self.home.chmod(0o2777)
        self.termination_log.touch()
        self.termination_log.chmod(0o666)
        layers = f"lowerdir=/,upperdir={self.directory}/upper,workdir={self.directory}/work"
        checked("mount", "-t", "overlay", "overlay", "-o", layers, self.directory / "root")
        self.processes = []
        pids = {"type": "pid"}
        if self.spec.get("shareProcessNamespace"):
            pause = self.start("pause", ["sleep", "infinity"], {}, None, [pids])
            pids["path"] = f"/proc/{pause}/ns/pid"
        given = {one["name"]: one["value"] for one in self.container["env"]} | (environment or {})
        argv = [*self.container.get("command", entrypoint), *self.container.get("args", [])]
        limit = self.container["resources"]["limits"]["memory"]
        assert limit.endswith("Mi")
        self.start("agent", argv, given, int(limit[:-2]) << 20, [pids])
        self.process = self.processes[-1]
        if hook and "lifecycle" in self.container:
            self.hook = self.exec(*self.container["lifecycle"]["postStart"]["exec"]["command"])

    def start(self, what, argv, environment, limit_bytes, namespaces):
        config = self.directory / f"{what}.json"
        config.write_text(json.dumps(self.oci(what, argv, environment, limit_bytes, namespaces)))
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                ["ctr", "run", "--config", str(config), f"{self.name}-{what}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)

        def pid():
            assert process.poll() is None or what == "agent", self.log()
            listed = [line.split() for line in sh("ctr", "task", "list").stdout.splitlines()]
            return next(
                (int(line[1]) for line in listed if line[0] == f"{self.name}-{what}" and line[2] == "RUNNING"), 0
            )

        return wait_for(pid, what=f"{what} of {self.name}")

    def oci(self, what, argv, environment, limit_bytes, namespaces):
        """The part of runtime-spec that matters here, as CRI's containerSpec() has it for an unprivileged pod."""
        usual = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOSTNAME": self.name}
        flags = ["nosuid", "noexec", "nodev"]
        binds = [("/opt/deps", "/opt/deps", "ro"), (str(self.termination_log), "/dev/termination-log", "rw")]
        binds += [(str(self.home), mount["mountPath"], "rw") for mount in self.container["volumeMounts"]]
        mounts = [
            {"destination": "/proc", "type": "proc", "source": "proc", "options": flags},
            {
                "destination": "/dev",
                "type": "tmpfs",
                "source": "tmpfs",
                "options": ["nosuid", "mode=755", "size=65536k"],
            },
            {
                "destination": "/dev/pts",
                "type": "devpts",
                "source": "devpts",
                "options": ["nosuid", "noexec", "newinstance"],
            },
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": flags},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*flags, "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": [*flags, "ro"]},
            *({"destination": to, "type": "bind", "source": of, "options": ["rbind", how]} for of, to, how in binds),
        ]
        bounding = {"bounding": CAPABILITIES}  # a user who is not root has no others
        caps = bounding | {"permitted": CAPABILITIES, "effective": CAPABILITIES} if self.user == 0 else bounding
        kinds = [{"type": kind} for kind in ("ipc", "uts", "mount", "network", "cgroup")]
        return {
            "ociVersion": "1.0.2",
            "process": {
                "args": argv,
                "cwd": "/",
                "env": [f"{name}={value}" for name, value in (usual | environment).items()],
                "user": {"uid": self.user, "gid": self.user},
                "capabilities": caps,
                "oomScoreAdj": 936,
            },
            "root": {"path": str(self.directory / "root")},
            "mounts": mounts,
            "linux": {
                "cgroupsPath": f"/kubepods/pod{self.name}/{what}",
                "namespaces": [*kinds, *namespaces],
                "resources": {"memory": {"limit": limit_bytes}} if limit_bytes else {},
                "maskedPaths": MASKED,
                "readonlyPaths": READ_ONLY,
            },
        }

    def exec(self, *argv):
        """As a kubelet's exec, and `kubectl exec`: returns once the process has ended and let go of its streams."""
        return sh("ctr", "task", "exec", "--exec-id", f"exec-{next(self.numbers)}", f"{self.name}-agent", *argv)

    def kill(self, signal):
        checked("ctr", "task", "kill", "--signal", signal, f"{self.name}-agent")

    def burst(self):
        (self.home / "begin").touch()

    def log(self):
        return self.log_path.read_text()

    def oom_kills(self):
        events = (self.cgroup / "memory.events").read_text().split()
        return int(events[events.index("oom_kill") + 1])

    def close(self):
        for what in ("agent", "pause"):
            sh("ctr", "task", "kill", "--signal", "SIGKILL", f"{self.name}-{what}")
        for process in self.processes:
            process.wait(timeout=60)
        sh("umount", self.directory / "root")
        for path in (*self.cgroup.glob("*/"), self.cgroup):
            path.rmdir()


@pytest.fixture
def pod(tmp_path):
    made = []

    def make(*words, **options):
        made.append(Pod(tmp_path, *words, **options))
        return made[-1]

    yield make
    for one in made:
        print(one.log())
        one.close()


@pytest.fixture(scope="session")
def containerd(installed):
    """With the CRI plug-in on, runc under both cgroup drivers, and an image that sleeps."""
    checked("modprobe", "overlay")
    cri, runc = '[plugins."io.containerd.grpc.v1.cri"', 'runtime_type = "io.containerd.runc.v2"'
    config = f'version = 2\n{cri}]\nsandbox_image = "{cri_pods.IMAGE}"\n'
    config += f"{cri}.containerd.runtimes.runc]\n{runc}\n{cri}.containerd.runtimes.{cri_pods.SYSTEMD}]\n{runc}\n"
    config += f"{cri}.containerd.runtimes.{cri_pods.SYSTEMD}.options]\nSystemdCgroup = true\n"
    Path("/etc/containerd").mkdir(exist_ok=True)
    Path("/etc/containerd/config.toml").write_text(config)
    for name in ("hosts", "resolv.conf"):
        Path("/etc", name).touch()
    checked("systemctl", "restart", "containerd")
    wait_for(lambda: Path(cri_pods.SOCKET).is_socket(), what="containerd's socket")
    checked("ctr", "-n", "k8s.io", "images", "import", cri_pods.image())
