"""A node without a kubelet: memcgs and bundles where a kubelet and a runtime make them, and `governor daemon`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from benches.common import MIB

INSTANCE = "bench"
POLICY = '[select]\nnamespace = ["agents"]\n\n[archive]\nglobs = ["{scratch}/*.jsonl"]\n'
BUNDLE = "run/containerd/io.containerd.runtime.v2.task/k8s.io/{id}/config.json"
PATIENCE_S = 900.0
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Pod:
    """One container; its pod is the memcg above. `made_ns` is right before its mkdir, on the monotonic clock."""

    container_id: str
    memcg: Path
    bundle: Path
    made_ns: int


class Kubepods:
    """What is below kubepods, and `host`, whose files the daemon sees as the host's."""

    def __init__(self, scratch: Path) -> None:
        from governor import cgroup

        self.v1 = not Path(cgroup.ROOT, "cgroup.controllers").exists()
        self.host = scratch / "host"
        self._root = Path(cgroup.ROOT_V1 if self.v1 else cgroup.ROOT, "kubepods")
        self._above = self._root / "burstable"
        self._numbers = itertools.count()
        self.pods: list[Pod] = []
        for level in (self._root, self._above):
            self._make(level)

    def _make(self, level: Path) -> None:
        level.mkdir()
        if not self.v1:
            (level / "cgroup.subtree_control").write_text("+memory +pids")

    def make(self, limit_mib: int) -> Pod:
        number = next(self._numbers)
        container_id = f"{number:064x}"
        bundle = self.host / BUNDLE.format(id=container_id)
        bundle.parent.mkdir(parents=True)
        said = {"container-type": "container", "sandbox-namespace": "agents", "container-name": "agent"}
        said |= {"sandbox-name": f"pod-{number}"}
        annotations = {f"io.kubernetes.cri.{key}": value for key, value in said.items()}
        config = {"annotations": annotations, "process": {"env": []}, "linux": {"namespaces": []}}
        bundle.write_text(json.dumps(config))  # its processes have the machine's mounts
        above = self._above / f"pod{uuid.UUID(int=number)}"
        self._make(above)
        pod = Pod(container_id, above / container_id, bundle, time.monotonic_ns())
        pod.memcg.mkdir()
        (pod.memcg / ("memory.limit_in_bytes" if self.v1 else "memory.max")).write_text(str(limit_mib * MIB))
        self.pods.append(pod)
        return pod

    def remove(self, pod: Pod) -> None:
        """Whatever is in it is killed first."""
        self.pods.remove(pod)
        for name in ("cgroup.freeze", "cgroup.kill"):
            if (pod.memcg / name).exists():
                (pod.memcg / name).write_text(str(int(name == "cgroup.kill")))
        for level in (pod.memcg, pod.memcg.parent):
            _rmdir(level)
        pod.bundle.unlink()
        pod.bundle.parent.rmdir()

    def close(self) -> None:
        for pod in list(self.pods):
            self.remove(pod)
        for level in (self._above, self._root):
            _rmdir(level)


def _rmdir(memcg: Path) -> None:
    """What was in it ends, and what was below it goes offline, in their own time."""
    for _ in range(200):
        with suppress(OSError):
            memcg.rmdir()
            return
        time.sleep(0.05)
    memcg.rmdir()


class Daemon:
    """A running `governor daemon`, its journals and its two processes."""

    def __init__(self, scratch: Path, host: Path) -> None:
        """Returns once reflex runs."""
        policies, self.state = scratch / "policies", scratch / "state"
        policies.mkdir()
        (policies / "10-agents.toml").write_text(POLICY.format(scratch=scratch))
        self._log = scratch / "daemon.log"
        command = [sys.executable, "-m", "governor", "daemon", "--instance", INSTANCE, "--policies", policies]
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            self._address = "{}:{}".format(*unused.getsockname())
        command += ["--state", self.state, "--host-root", host, "--listen", self._address]
        environment = {**os.environ, "XDG_STATE_HOME": str(scratch)}
        with self._log.open("wb") as log:
            self.process = subprocess.Popen([str(word) for word in command], stderr=log, env=environment)
        started = self.wait_for(lambda: self.node_lines("reflex_started"), "started reflex")
        self.pids = {"governor": self.process.pid, "reflex": int(started[-1]["pid"])}

    def wait_for(self, look: Callable[[], Found], what: str) -> Found:
        until = time.monotonic() + PATIENCE_S
        while not (found := look()):
            if self.process.poll() is not None or time.monotonic() > until:
                sys.exit(f"scripts/bench: governor daemon has not {what}; its log ends:\n{self.log()[-4000:]}")
            time.sleep(0.05)
        return found

    def counted(self, metric: str) -> int:
        """A counter of /metrics."""
        with urllib.request.urlopen(f"http://{self._address}/metrics", timeout=PATIENCE_S) as answer:
            told = [line.split() for line in answer.read().decode().splitlines()]
        return int(next(float(words[1]) for words in told if words[:1] == [metric]))

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def journal(self, pod: Pod) -> Path:
        return self.state / "containers" / f"{pod.container_id}.ndjson"

    def node_lines(self, *kinds: str) -> list[dict]:
        return lines(self.state / "journal-node.ndjson", kinds)

    def protected(self, pods: Collection[Pod]) -> dict[str, float]:
        """Milliseconds from each one's mkdir to its protection, once all of them have it."""
        found: dict[str, float] = {}
        missing = deque(pods)

        def all_of_them() -> bool:
            while missing:  # no further than the first that is not: to look for a thousand would be load by itself
                if not (told := lines(self.journal(missing[0]), ("protecting",))):
                    return False
                pod = missing.popleft()
                found[pod.container_id] = (told[0]["monotonic_ns"] - pod.made_ns) / 1e6
            return True

        self.wait_for(all_of_them, f"protected {len(pods)} containers")
        return found

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait()


def lines(journal: Path, kinds: Collection[str]) -> list[dict]:
    """The journal's lines of these kinds; only they are parsed."""
    try:
        whole = journal.read_bytes().rpartition(b"\n")[0]
    except FileNotFoundError:
        return []
    wanted = [f'"kind":"{kind}"'.encode() for kind in kinds]
    return [json.loads(line) for line in whole.splitlines() if any(kind in line for kind in wanted)]
