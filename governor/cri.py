"""Labels and annotations of pods, which no bundle has: from CRI, by a child process with a deadline.

The child (`cri_call.py`) holds gRPC; the resident process never imports it. Its answer comes in a memory file, so
that there is no pipe to keep empty. A sandbox keeps the labels and annotations that its pod had when it was made:
each pod is asked for once.
"""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import orjson

DEADLINE_NS = 15_000_000_000
PODS_MAX = 128  # of one question
_ANSWER_MAX_BYTES = PODS_MAX * (64 << 10)  # what cri_call keeps of a pod, as UTF-8
_SOCKETS = (
    "run/containerd/containerd.sock",
    "run/k3s/containerd/containerd.sock",
    "run/crio/crio.sock",
    "run/cri-dockerd.sock",
)


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod's labels and annotations. Their author chose them."""

    labels: Mapping[str, str]
    annotations: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Answer:
    """Sandboxes by pod UID, of those asked for that a runtime has; `failed` is for people, "" if nothing did."""

    sandboxes: Mapping[str, Sandbox] = field(default_factory=dict)
    failed: str = ""


def sockets(host_root: str = "/") -> list[str]:
    """The runtimes' sockets that are mounted."""
    paths = [f"{host_root.rstrip('/')}/{socket}" for socket in _SOCKETS]
    return [path for path in paths if _is_socket(path)]


def _is_socket(path: str) -> bool:
    try:
        return stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116  for each pod that is new
    except OSError:
        return False


class Question:
    """A running child that asks for some pods. `fd` is ready for reading when it has ended."""

    def __init__(self, paths: list[str], uids: Iterable[str], now_ns: int) -> None:
        """Raises OSError when no process can be started."""
        self.uids = frozenset(uids)
        self.deadline_ns = now_ns + DEADLINE_NS
        self._output = os.memfd_create("cri", os.MFD_CLOEXEC)
        options = [f"--socket={path}" for path in paths]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", "governor.cri_call", *options, "--", *sorted(self.uids)],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "GRPC_VERBOSITY": "NONE"},
            )
        except OSError:
            os.close(self._output)
            raise
        self.fd = os.pidfd_open(self._process.pid)

    def answer(self, now_ns: int) -> Answer | None:
        """What came of it, once; None while it runs and its deadline is not over."""
        status = self._process.poll()
        if status is None:
            if now_ns < self.deadline_ns:
                return None
            self.close()
            return Answer(failed="no answer within its deadline")
        data = os.pread(self._output, _ANSWER_MAX_BYTES, 0)
        self.close()
        if status:
            return Answer(failed=f"status {status}: {data.decode(errors='replace').strip()[-300:]}")
        return parse_answer(data, self.uids)

    def close(self) -> None:
        """Ask no longer."""
        if self.fd >= 0:
            self._process.kill()
            with suppress(subprocess.TimeoutExpired):  # held in the kernel: a zombie later
                self._process.wait(0.5)
            os.close(self._output)
            os.close(self.fd)
            self.fd = -1


def parse_answer(data: bytes, uids: frozenset[str]) -> Answer:
    """What the child printed, in its last line: libraries may have said something before."""
    try:
        said = orjson.loads(data.rpartition(b"\n")[2])
        sandboxes = {
            uid: Sandbox(_texts(one["labels"]), _texts(one["annotations"]))
            for uid, one in said["sandboxes"].items()
            if uid in uids
        }
        return Answer(sandboxes, str(said["failed"]))
    except (orjson.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        return Answer(failed=f"its answer is not as expected: {error!r}")


def _texts(value: Any) -> dict[str, str]:
    return {str(key): str(text) for key, text in value.items()}
