"""`governor watch`: a line a second and every crossing of one memcg. Reads only.

Crossings come from BPF programs of its own, since a ring has one reader, loaded in the background and removed at
the end; until they are there, and where they cannot be, the lines come from the memcg's files alone.
"""

from __future__ import annotations

import json as json_lines
import os
import select
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson

from governor import bpflib, pins, record
from governor.cgroup import Memcg, MemoryState
from governor.journal import printable
from governor.record import CONFIG_KEY, Config, Levels, Verified

_INTERVAL_S = 1.0
_IDLE_AFTER_NS = 5_000_000_000


class Crossings:
    """BPF programs of an instance of its own that watch one memcg."""

    def __init__(self, memcg: Memcg) -> None:
        self._memcg = memcg
        self._instance = f"watch-{os.getpid()}"
        command = [sys.executable, "-P", "-m", "governor.loader", self._instance]
        self._loader = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self._rings: bpflib.Rings | None = None
        self._configs: list[bpflib.PinnedMap] = []
        self._heard: list[record.Record] = []
        self.source = "polling, BPF programs are loading"

    def ready(self) -> None:
        """Begin to read once the loader is done; afterwards keep the programs awake."""
        if self._rings is None and self._loader.poll() is not None and self._loader.stdout:
            said = json_lines.loads(self._loader.stdout.read() or b"{}")
            self._loader.stdout.close()
            self._loader.stdout = None
            directory = pins.current(self._instance)
            if directory is None:
                self.source = f"polling; no BPF: {said.get('error', 'the loader failed')}"
                return
            self._open(directory, said)
        value = Config(heartbeat_ns=time.monotonic_ns(), idle_after_ns=_IDLE_AFTER_NS).encode()
        for config in self._configs:
            config.update(CONFIG_KEY, value)

    def _open(self, directory: Path, said: dict[str, str]) -> None:
        lib = bpflib.open_libbpf()
        modules = [directory / name for name in pins.MODULES if (directory / name).is_dir()]
        self._configs = [bpflib.PinnedMap(lib, f"{module}/config") for module in modules]
        key = record.CGROUP_ID.pack(self._memcg.cgroup_id)
        for module in modules:
            if (module / "watch").exists():
                value = record.encode_watch(Levels(), Verified(0, 0, 0), time.monotonic_ns())
                bpflib.PinnedMap(lib, f"{module}/track").update(key, bytes(record.TRACK.size))
                bpflib.PinnedMap(lib, f"{module}/watch").update(key, value)
        self._rings = bpflib.Rings(lib, [bpflib.PinnedMap(lib, f"{m}/ring") for m in modules], self._on_record)
        self.source = f"bpf ({said.get(pins.REQUIRED_MODULE)})"

    def _on_record(self, data: bytes) -> None:
        found = record.decode(data)
        if found.cgroup_id == self._memcg.cgroup_id or found.kind == record.OOM_KILL:
            self._heard.append(found)

    def wait(self, seconds: float) -> list[record.Record]:
        """Crossings until then, as soon as there are any."""
        fds = [self._rings.fd] if self._rings else []
        if select.select(fds, [], [], max(0.0, seconds))[0] and self._rings:
            self._rings.drain()
        heard, self._heard = self._heard, []
        return heard

    def close(self) -> None:
        """Remove the programs."""
        if self._loader.poll() is None:
            self._loader.kill()
        self._loader.wait()
        with suppress(OSError):
            pins.unload(self._instance)


def run(path: Path, as_json: bool, seconds: float | None) -> None:
    """Print until interrupted, until `seconds` are over or the memcg is gone."""
    memcg = Memcg(str(path))
    crossings = Crossings(memcg)
    started = time.monotonic()
    due, before, source = started, None, ""
    try:
        while seconds is None or time.monotonic() - started < seconds:
            crossings.ready()
            if crossings.source != source:
                source = crossings.source
                _print(as_json, {"kind": "source", "source": source}, f"source: {printable(source)}")
            if time.monotonic() >= due:
                state = memcg.memory_state()
                if state is None:
                    _print(as_json, {"kind": "gone"}, "the memcg is gone")
                    return
                _print_sample(as_json, memcg, state, before)
                before, due = state, due + _INTERVAL_S
            for found in crossings.wait(due - time.monotonic()):
                _print_record(as_json, found)
    finally:
        crossings.close()
        memcg.close()


def _print_sample(as_json: bool, memcg: Memcg, state: MemoryState, before: MemoryState | None) -> None:
    grown = state.unreclaimable_bytes - before.unreclaimable_bytes if before else 0
    frozen = b"frozen 1" in (memcg.read_or_none("cgroup.events") or b"")
    fields = {
        "kind": "sample",
        **state._asdict(),
        "unreclaimable_bytes": state.unreclaimable_bytes,
        "unreclaimable_ratio": state.unreclaimable_ratio,
        "fill_rate_bytes": grown,
        "frozen": frozen,
    }
    limit = (
        f"of {_mib(state.max_bytes)} MiB ({100 * state.unreclaimable_ratio:5.1f} %)" if state.max_bytes > 0 else ""
    )
    text = (
        f"unreclaimable {_mib(state.unreclaimable_bytes)} {limit}  anon {_mib(state.anon_bytes)}  "
        f"file {_mib(state.file_lru_bytes)}  {grown / (1 << 20):+8.1f} MiB/s{'  frozen' if frozen else ''}"
    )
    _print(as_json, fields, text)


def _print_record(as_json: bool, found: record.Record) -> None:
    kind = record.KIND_NAMES.get(found.kind, "record")
    if found.kind == record.OOM_KILL:
        text = f"oom_kill: the kernel chose process {found.pid}"
    elif found.kind == record.STALL:
        text = f"stall: {found.stall_ns / 1e6:.0f} ms so far, process {found.pid}"
    else:
        way = "rising" if found.rising else "falling"
        text = (
            f"{kind} {way} to {record.LEVEL_NAMES[found.level]}: {100 * found.bound_ratio:.1f} % of max, "
            f"process {found.pid}"
        )
    _print(as_json, found._asdict() | {"kind": kind}, f"  * {text}")


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / (1 << 20):7.1f}"


def _print(as_json: bool, fields: dict[str, Any], text: str) -> None:
    now = time.strftime("%H:%M:%S")
    line = orjson.dumps({"time": time.time(), **fields}).decode() if as_json else f"{now}  {text}"
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
