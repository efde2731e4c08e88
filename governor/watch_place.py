"""From where `governor watch` looks: the machine itself, or a container that sees all of it, as the DaemonSet's does.

There the tree of memcgs is the machine's, while the kernel tells a process's memcg relative to the container's own
(cgroup_namespaces(7)), the runtimes' files are mounted elsewhere, and there is less memory than the machine has.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

from governor import cgroup, outside
from governor.cgroup import Memcg
from governor.limits import Limits

HOST_ROOT = "GOVERNOR_HOST_ROOT"  # the environment's; the DaemonSet sets it, and `kubectl exec` keeps it
COMPILING_BYTES = 320 << 20  # what the DaemonSet gives the loader, which takes 185 MiB of it beside nobody


def host_root() -> str:
    """Where the host's files are."""
    return os.environ.get(HOST_ROOT) or "/"


def see_machine() -> None:
    """Name memcgs as the machine does, where its whole tree is to be seen; without the right to, nothing changes."""
    root = Path(cgroup.ROOT)
    if (root / "cgroup.controllers").exists() and not (root / "memory.current").exists():
        with suppress(OSError):
            outside.join_host_cgroups()


def no_room() -> str:
    """Why the programs are not to be compiled in the memcg that this runs in; "" where they may be."""
    path = cgroup.memcg_of("self")
    if path is None:
        return ""
    try:
        own = Memcg(path)
    except OSError:  # a root
        return ""
    limits = Limits(own)
    rooms = [one.state.max_bytes - one.state.unreclaimable_bytes for one in limits.look(time.monotonic_ns())]
    limits.close()
    own.close()
    room_bytes = min(rooms, default=COMPILING_BYTES)
    if room_bytes >= COMPILING_BYTES:
        return ""
    return f"compiling wants {COMPILING_BYTES >> 20} MiB, and where watch runs are {room_bytes >> 20} left"
