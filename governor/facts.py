"""What a post-mortem asks of the place, for the journal's line of kind begin: a few hundred bytes."""

from __future__ import annotations

import os
from functools import cache

from governor import __version__
from governor.cgroup import Memcg

_KNOBS = ("memory.max", "memory.high", "memory.swap.max", "memory.oom.group")


def of_the_place(memcg: Memcg) -> dict[str, str]:
    """Kernel, version, and the memcg's knobs as their files say it; without those that cannot be read."""
    knobs = {name: _read(memcg, name) for name in _KNOBS}
    return {
        **_of_the_machine(),
        "cgroup": "v1" if memcg.v1 else "v2",
        **{name: value for name, value in knobs.items() if value},
    }


@cache
def _of_the_machine() -> dict[str, str]:
    kernel = os.uname()
    return {
        "kernel": f"{kernel.sysname} {kernel.release} {kernel.version}",
        "machine": kernel.machine,
        "governor": __version__,
    }


def _read(memcg: Memcg, name: str) -> str:
    """Not by Memcg.read: that would keep a descriptor of each open."""
    try:
        fd = memcg.open(name, os.O_RDONLY)
    except OSError:
        return ""
    try:
        return os.read(fd, 64).decode(errors="replace").strip()
    except OSError:
        return ""
    finally:
        os.close(fd)
