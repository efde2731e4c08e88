"""Where reflex lives when governor is in a pod: in a memcg of its own, outside of it.

Whoever ends a pod (the kubelet, its OOM killer with memory.oom.group, cgroup.kill) ends all that is in its memcgs at
once, and nobody would be left to thaw what is frozen. Out there reflex sees governor die, undoes every turn and goes.
That wants the host's PID namespace: one of its own takes all its processes with it.

The memcg is below the root, which alone may have processes beside children that have controllers (the "no internal
processes" rule of Documentation/admin-guide/cgroup-v2.rst). Its name is the instance's, so whoever follows a killed
governor takes it over; who stops removes it. reflex enters before its program begins, so what it touches is charged
there and not to the pod.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

from governor import cgroup
from governor.pods import is_root
from governor.run_memcg import try_to_enter

MIN_BYTES = 32 << 20  # never reclaimed: reflex has 13 MiB, and some KiB more for each memcg
MAX_BYTES = 128 << 20  # many times what it ever needs: what goes wrong in it ends in it
_PREFIX = "governor-reflex-"
_CLONE_NEWCGROUP = 0x02000000  # linux/sched.h
_FIRST_NAMESPACE = 0xEFFFFFFB  # PROC_CGROUP_INIT_INO of linux/proc_ns.h: the one that the machine began with


def join_host_cgroups(host_pid: int = 1) -> None:
    """See the cgroups of the whole machine, as its first process does.

    Runtimes give a container that is not privileged a cgroup namespace of its own (containerd's containerSpecOpts):
    /proc/PID/cgroup is relative to that, and where cgroup2 is mounted with nsdelegate nobody is moved out of it
    (cgroup_procs_write_permission in kernel/cgroup/cgroup.c). Raises OSError.
    """
    if Path("/proc/self/ns/cgroup").stat().st_ino == _FIRST_NAMESPACE:
        return
    fd = os.open(f"/proc/{host_pid}/ns/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(fd, _CLONE_NEWCGROUP) < 0:
            code = ctypes.get_errno()
            raise OSError(code, f"enter the host's cgroup namespace: {os.strerror(code)}")
    finally:
        os.close(fd)


def is_in_pod(memcg_path: str | None) -> bool:
    """Whether a memcg is one of a kubelet's, or below one."""
    return any(is_root(name) for name in (memcg_path or "").split("/"))


def make(instance: str) -> tuple[str, str]:
    """The memcg for reflex, or "" and why there is none; both "" where governor is in no pod."""
    try:
        join_host_cgroups()
    except OSError as error:
        return "", f"{error.filename or ''} {error.strerror}".strip()
    if not is_in_pod(cgroup.memcg_of("self")):
        return "", ""
    path = f"{cgroup.ROOT}/{_PREFIX}{instance}"
    try:
        Path(path).mkdir(exist_ok=True)
        for name, value in (("memory.min", MIN_BYTES), ("memory.max", MAX_BYTES)):
            _write(f"{path}/{name}", str(value))
        try_to_enter(path)
    except OSError as error:
        remove(path)
        return "", f"{error.filename or path}: {error.strerror}"
    return path, ""


def enter(path: str) -> None:
    """For a child that will be reflex; says why where it has to stay."""
    try:
        _write(f"{path}/cgroup.procs", "0")
    except OSError as error:
        os.write(2, f"governor: reflex stays in the pod: {path}: {error.strerror}\n".encode())


def remove(path: str) -> None:
    """Remove it, unless a reflex is in it."""
    with suppress(OSError):
        Path(path).rmdir()


def sweep(instance: str = "*") -> list[str]:
    """Remove all that no reflex is in, or the one of an instance; their paths."""
    found = [str(path) for path in Path(cgroup.ROOT).glob(f"{_PREFIX}{instance}")]
    for path in found:
        remove(path)
    return [path for path in found if not Path(path).exists()]


def _write(path: str, value: str) -> None:
    """Write to a file that is there; raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)
