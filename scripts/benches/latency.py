"""From the kernel's time stamp of a crossing to the callback in user space and to the frozen memcg.

By reflex as `governor guard` starts it; beside it, in the same run, how long a PSI trigger and memory.events (with
memory.high at the same level) take to tell of the same crossing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benches.common import MIB, at, loaded, make_memcg, remove, where

LIMIT_MIB = 64
STEP_BYTES = 128 << 10
CROSSING_SETTLE_S = 1.0
PATIENCE_S = 30.0
TOP_RATIO, LEVEL_PPM = 0.95, 900_000


class Burster:
    """A process in a memcg that fills it to TOP_RATIO and lets go, once for every byte written to it."""

    def __init__(self, memcg: Path) -> None:
        self.stop = mmap.mmap(-1, 4096)
        self.commands, self._commands = os.pipe()
        self._replies, self.replies = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            (memcg / "cgroup.procs").write_text(str(os.getpid()))
            self._child(memcg)
            os._exit(0)

    def _child(self, memcg: Path) -> None:
        top_bytes = int(LIMIT_MIB * MIB * TOP_RATIO)
        libc = ctypes.CDLL(None)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
        libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        while os.read(self.commands, 1):
            wanted = top_bytes - int((memcg / "memory.current").read_text())
            address = libc.mmap(None, wanted, 3, 0x22, -1, 0)  # read and write, private and anonymous
            for offset in range(0, wanted - STEP_BYTES, STEP_BYTES):
                if self.stop[0]:
                    break
                libc.memset(address + offset, 1, STEP_BYTES)
            libc.munmap(address, wanted)
            os.write(self.replies, b".")

    def begin(self) -> None:
        self.stop[0] = 0
        os.write(self._commands, b".")

    def finish(self) -> None:
        self.stop[0] = 1
        os.read(self._replies, 1)

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def quantiles(name: str, values: list[float]) -> None:
    """Median, 90th and 99th centile and maximum, in milliseconds."""
    if not values:
        print(f"{name:34} told of none")
        return
    ordered = sorted(values)
    line = f"{statistics.median(ordered):9.3f} {at(ordered, 0.9):9.3f} {at(ordered, 0.99):9.3f} {ordered[-1]:9.3f}"
    print(f"{name:34} {line}   {len(ordered)}")


class Peer:
    """The governor's end of the link to a reflex, as the loop has it."""

    def __init__(self, directory: Path, knob_path: Path) -> None:
        from governor.reflex_process import ReflexProcess

        self.process = ReflexProcess(directory, knob_path)
        self.process.start(time.monotonic_ns())

    def wait(self, seconds: float = PATIENCE_S) -> object:
        """The next thing that reflex says."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if said := self.process.receive():
                return said
            select.select([self.process.fd], [], [], 1)
        sys.exit(f"scripts/bench: reflex said nothing for {seconds} s")

    def settle(self) -> None:
        """Let what was asked take effect, and forget what was said meanwhile."""
        time.sleep(0.05)
        while self.process.receive():
            pass


def latency(count: int, others: int) -> None:
    from governor import link, pins, record
    from governor.brake import KnobFile

    memcg = make_memcg("latency", LIMIT_MIB)
    directory = loaded("bench")
    print(f"{where()}, {pins.attached(directory)['charge']}, {LIMIT_MIB} MiB; milliseconds")
    print(f"{'':34} {'p50':>9} {'p90':>9} {'p99':>9} {'max':>9}   crossings", flush=True)

    scratch = tempfile.TemporaryDirectory(prefix="governor-bench-")
    knob_path = Path(scratch.name) / "knobs"
    knob_file = KnobFile(str(knob_path))
    knob_file.adopt(0, str(memcg), memcg.stat().st_ino)
    peer = Peer(directory, knob_path)
    burster = Burster(memcg)
    called_back, frozen = [], []
    try:
        peer.process.send(link.encode_levels(link.ADOPT, 0, record.Levels(horizon_ns=0)))
        while not isinstance(peer.wait(), link.Adopted):
            pass
        for _ in range(count):
            peer.process.send(link.Thaw(0, LEVEL_PPM, -1, False, False).encode())
            peer.settle()
            burster.begin()
            heard = braked = None
            until = time.monotonic() + PATIENCE_S
            while not (heard and braked):
                if time.monotonic() > until:
                    sys.exit(f"scripts/bench: crossing {len(frozen) + 1} was not braked within {PATIENCE_S} s")
                said = peer.wait()
                if isinstance(said, link.Heard) and said.record.level >= record.LEVEL_BRAKE:
                    heard = heard or said
                elif isinstance(said, link.Braked):
                    braked = said
            called_back.append((heard.called_back_ns - heard.record.ktime_ns) / 1e6)
            frozen.append((braked.frozen_ns - braked.crossed_ns) / 1e6)
            peer.process.send(link.Thaw(0, 990_000, -1, False, False).encode())
            burster.finish()
        quantiles("crossing to callback, BPF", called_back)
        quantiles("crossing to frozen, BPF", frozen)
        compare(memcg, peer, burster, others)
    finally:
        burster.end()
        peer.process.stop()
        remove(memcg)
        pins.unload("bench")
        scratch.cleanup()


def compare(memcg: Path, peer: Peer, burster: Burster, count: int) -> None:
    """The same crossing, not braked: who tells when? memory.high stands at the level, so that all can tell."""
    from governor import link, record

    levels = record.Levels(engage_ppm=(LEVEL_PPM, 980_000, 990_000, 999_000), horizon_ns=0)
    by: dict[str, list[float]] = {"BPF": [], "PSI trigger": [], "memory.events": []}
    (memcg / "memory.high").write_text(str(LIMIT_MIB * MIB * LEVEL_PPM // record.PPM))
    reflex_fd = peer.process.fd
    with (
        (memcg / "memory.pressure").open("r+b", buffering=0) as psi,
        (memcg / "memory.events").open("rb", buffering=0) as events,
    ):
        psi.write(b"some 50000 1000000\0")
        poller = select.poll()
        poller.register(reflex_fd, select.POLLIN)
        poller.register(psi, select.POLLPRI)
        poller.register(events, select.POLLPRI)
        for _ in range(count):
            peer.process.send(link.encode_levels(link.SET_LEVELS, 0, levels))
            time.sleep(CROSSING_SETTLE_S)  # a PSI trigger tells once a window
            poller.poll(0)
            os.pread(events.fileno(), 4096, 0)
            peer.settle()
            burster.begin()
            told: dict[str, int] = {}
            crossed_ns = 0
            until = time.monotonic() + 3
            while len(told) < len(by) and time.monotonic() < until:
                for fd, _ in poller.poll(200):
                    now_ns = time.monotonic_ns()
                    if fd == psi.fileno():
                        told.setdefault("PSI trigger", now_ns)
                    elif fd == events.fileno():
                        os.pread(fd, 4096, 0)
                        told.setdefault("memory.events", now_ns)
                    else:
                        said = peer.process.receive()
                        if isinstance(said, link.Heard) and said.record.rising and said.record.level == 1:
                            crossed_ns = crossed_ns or said.record.ktime_ns
                            told.setdefault("BPF", said.called_back_ns)
            burster.finish()
            for name, at_ns in told.items():
                if crossed_ns:
                    by[name].append((at_ns - crossed_ns) / 1e6)
    for name, values in by.items():
        quantiles(f"  not braked: {name}", values)
