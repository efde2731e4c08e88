"""BPF programs of `governor watch`'s own, for one memcg that no governor tells of: a ring has one reader.

They are compiled by the loader in the background (25 s under emulation, 170 MiB meanwhile) and removed at the end;
those of a watch that was killed are removed by the next one. They only report; nothing is braked.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from governor import bpf_source, pins, record
from governor.limits import Seen
from governor.record import Levels

_PREFIX = "watch-"


class Crossings:
    """The crossings, long stalls and OOM kills of a memcg and of the limits above it, as the kernel sees them."""

    def __init__(self, now_ns: int) -> None:
        """Begins to load the programs."""
        sweep()
        self._instance = f"{_PREFIX}{os.getpid()}"
        command = [sys.executable, "-P", "-m", "governor.loader", self._instance]
        self._loader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._source: bpf_source.BpfSource | None = None
        self._epoch = now_ns
        self._heard: list[record.Record] = []
        self.how = ""  # "fentry" or "kprobe", once they are there
        self.failed = ""  # why they will never be

    @property
    def fd(self) -> int:
        """To be polled for reading; -1 until they are loaded."""
        return self._source.fd if self._source else -1

    def opened(self) -> bool:
        """Open them once they are loaded; True when `how` or `failed` has become known by that."""
        if self._source or self.failed or self._loader.poll() is None or not self._loader.stdout:
            return False
        with self._loader.stdout as stdout:
            said = json.loads(stdout.read() or b"{}")
        directory = pins.current(self._instance)
        if directory is None:
            self.failed = said.get("error", "the loader failed")
            return True
        try:
            self._source = bpf_source.BpfSource(str(directory), lambda data: self._heard.append(record.decode(data)))
            self.how = said.get(pins.REQUIRED_MODULE, "")
        except OSError as error:
            self.failed = str(error)
        return True

    def charged_pages(self, cgroup_ids: list[int]) -> dict[int, int]:
        """Of each memcg, before its memory.stat is read."""
        return {each: self._source.charged_pages(each) for each in cgroup_ids} if self._source else {}

    def watch(self, seen: list[Seen], levels: Levels, charged_pages: dict[int, int], now_ns: int) -> None:
        """Say what is to be reported, from what memory.stat says now; and that somebody reads."""
        if not self._source:
            return
        for one in seen:
            with suppress(OSError):
                self._source.watch(one, levels, charged_pages.get(one.memcg.cgroup_id, 0), self._epoch)
        self._source.beat(now_ns)

    def drain(self) -> list[record.Record]:
        """What has come."""
        if self._source:
            self._source.drain()
        heard, self._heard = self._heard, []
        return heard

    def close(self) -> None:
        """Remove the programs."""
        if self._loader.poll() is None:
            self._loader.kill()
        self._loader.wait()
        if self._source:
            self._source.close()
        with suppress(OSError):
            pins.unload(self._instance)


def sweep() -> None:
    """Remove what a watch that was killed has left loaded."""
    for name in pins.instances():
        pid = name.removeprefix(_PREFIX)
        if name.startswith(_PREFIX) and pid.isdecimal() and not Path("/proc", pid).exists():
            with suppress(OSError):
                pins.unload(name)
