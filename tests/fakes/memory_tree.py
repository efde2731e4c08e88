"""A directory that looks like /proc and cgroupfs, for governor.agent's Container."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

from governor.agent import MemoryPressure
from governor.agent.container import Container

CG = "/sys/fs/cgroup"
MIB = 1 << 20
PATIENCE_S = 20
V2 = "30 23 0:26 {root} {place} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1 = "35 31 0:32 {root} {place} rw,nosuid - cgroup cgroup rw,memory"


class Tree:
    """`memcgs` come by write(); the process is in `membership` (a line of /proc/self/cgroup)."""

    def __init__(self, path: Path, membership: str, *mounts: str, ram_mib: int = 4096, available_mib: int = 3072):
        self.root = path
        about = path / "proc" / "self"
        about.mkdir(parents=True)
        (about / "cgroup").write_text(membership + "\n")
        (about / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda1 rw\nodd line\n" + "\n".join(mounts) + "\n")
        lines = {"MemTotal": ram_mib, "MemFree": available_mib // 2, "MemAvailable": available_mib}
        text = "".join(f"{name}: {mib * 1024} kB\n" for name, mib in lines.items())
        (path / "proc" / "meminfo").write_text(text + "HugePages_Total: 0\n")

    def move(self, membership: str) -> None:
        """The process is elsewhere now."""
        (self.root / "proc" / "self" / "cgroup").write_text(membership + "\n")

    def v2(self, place: str, max_mib: int | None, usage_mib: int, file_mib: int = 0, slab_mib: int = 0) -> None:
        stat = {"anon": 1, "file_mapped": 2, "inactive_file": file_mib // 2, "active_file": file_mib - file_mib // 2}
        stat["slab_reclaimable"] = slab_mib
        files = {
            "memory.max": "max" if max_mib is None else max_mib * MIB,
            "memory.current": usage_mib * MIB,
            "memory.stat": "\n".join(f"{key} {mib * MIB}" for key, mib in stat.items()),
            "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0",
        }
        self._write(place, files)

    def v1(self, place: str, max_mib: int | None, usage_mib: int, file_mib: int = 0) -> None:
        stat = {"cache": 1, "total_rss": 1, "total_inactive_file": file_mib, "total_active_file": 0}
        files = {
            "memory.limit_in_bytes": (1 << 63) - 4096 if max_mib is None else max_mib * MIB,
            "memory.usage_in_bytes": usage_mib * MIB,
            "memory.stat": "\n".join(f"{key} {mib * MIB}" for key, mib in stat.items()),
        }
        self._write(place, files)

    def _write(self, place: str, files: dict[str, object]) -> None:
        directory = self.root / place.strip("/")
        directory.mkdir(parents=True, exist_ok=True)
        for name, value in files.items():
            beside = directory / f"{name}.new"
            beside.write_text(f"{value}\n")
            beside.replace(directory / name)  # nobody sees half of one


class Limited(Tree):
    """A process in a memcg of 1000 MiB, of which so many are held."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "0::/a", V2.format(root="/", place=CG))
        self.memcg = path / CG[1:] / "a"
        self.hold(100)

    def hold(self, mib: int) -> None:
        self.v2(f"{CG}/a", 1000, mib)

    def pressure(self, **options: Any) -> MemoryPressure:
        return MemoryPressure(container=Container(root=str(self.root)), **options)


@contextlib.contextmanager
def limited() -> Iterator[Limited]:
    """With a short path, as sockets go below it, whose paths have 107 characters at most."""
    root = Path(tempfile.mkdtemp(prefix="g"))
    try:
        yield Limited(root)
    finally:
        shutil.rmtree(root)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """In an event loop, for so long at most."""

    async def within() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await coroutine

    asyncio.run(within())


async def until(condition: Callable[[], object]) -> None:
    """Of what files, threads and other processes do."""
    while not condition():
        await asyncio.sleep(0.005)
