"""What the BPF programs cost: their run time by the kernel's own count, and allocation with and without them.

Throughput is compared in pairs, one right after the other in the same process; which comes first alternates.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benches.common import MIB, Governed, at, loaded, memcg, remove, table, where

INSTANCE = "bench"
LIMIT_MIB, BLOCK_MIB, FILE_MIB = 256, 96, 400
STATS = Path("/proc/sys/kernel/bpf_stats_enabled")
BPF_TRACE_FENTRY = 24
IDLE_S = 30.0


class Programs:
    """The programs of an instance, to be attached and detached at will."""

    def __init__(self, lib: ctypes.CDLL, directory: Path) -> None:
        self._lib = lib
        self.fds: dict[str, int] = {}
        self._links: list[int] = []
        for pin in sorted(directory.glob("*/link-*")):
            link_fd = lib.bpf_obj_get(str(pin).encode())
            program_id = _fdinfo(link_fd)["prog_id"]
            self.fds[f"{pin.parent.name}: {pin.name.rpartition('-')[2]}"] = lib.bpf_prog_get_fd_by_id(program_id)
            pin.unlink()
            os.close(link_fd)  # the last one: detached

    def attach(self) -> None:
        for name, fd in self.fds.items():
            link_fd = self._lib.bpf_raw_tracepoint_open(None, fd)
            if link_fd < 0:
                raise OSError(-link_fd, f"attach {name}: {os.strerror(-link_fd)}")
            self._links.append(link_fd)

    def detach(self) -> None:
        while self._links:
            os.close(self._links.pop())

    def runs(self) -> dict[str, tuple[int, int]]:
        """By program: how often it ran, and for how many nanoseconds, while statistics were on."""
        told = {name: _fdinfo(fd) for name, fd in self.fds.items()}
        return {name: (info["run_cnt"], info["run_time_ns"]) for name, info in told.items()}


def _fdinfo(fd: int) -> dict[str, int]:
    if fd < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    pairs = (line.split(":", 1) for line in Path(f"/proc/self/fdinfo/{fd}").read_text().splitlines())
    return {key: int(value) for key, value in pairs if value.strip().isdigit()}


class Worker:
    """A process in the memcg that does one of the works when told to, and says how long it took."""

    def __init__(self, pod: Path, works: list[Callable[[], None]]) -> None:
        self._commands, commands = os.pipe()[::-1]
        replies, self._replies = os.pipe()[::-1]
        self.pid = os.fork()
        if self.pid == 0:
            (pod / "cgroup.procs").write_text(str(os.getpid()))
            while data := os.read(commands, 1):
                begun_ns = time.perf_counter_ns()
                works[data[0]]()
                os.write(replies, (time.perf_counter_ns() - begun_ns).to_bytes(8, "little"))
            os._exit(0)

    def took_ns(self, work: int) -> int:
        os.write(self._commands, bytes([work]))
        return int.from_bytes(os.read(self._replies, 8), "little")


def works(scratch: Path) -> dict[str, Callable[[], None]]:
    """Touch fresh plain pages far below every level; read more than fits: the kernel reclaims all the time."""
    libc = ctypes.CDLL(None)
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    large = scratch / f"governor-bench-large-{os.getpid()}"
    with large.open("wb") as file:
        file.truncate(FILE_MIB * MIB)

    def touch() -> None:
        with mmap.mmap(-1, BLOCK_MIB * MIB, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as block:
            block.madvise(mmap.MADV_NOHUGEPAGE)
            view = ctypes.c_char.from_buffer(block)
            libc.memset(ctypes.addressof(view), 1, BLOCK_MIB * MIB)
            del view

    def read() -> None:
        with large.open("rb", buffering=0) as file:
            buffer = bytearray(MIB)
            while file.readinto(buffer):
                pass

    return {f"touch {BLOCK_MIB} MiB": touch, f"read a {FILE_MIB} MiB file": read}


def pairs(programs: Programs, worker: Worker, work: int, count: int) -> list[tuple[int, int]]:
    """(nanoseconds with, nanoseconds without) for each pair."""
    found = []
    for number in range(-1, count):
        took = {}
        for attached in (True, False) if number % 2 else (False, True):
            (programs.attach if attached else programs.detach)()
            took[attached] = worker.took_ns(work)
            programs.detach()
        if number >= 0:  # the first one warms up
            found.append((took[True], took[False]))
    return found


@contextmanager
def statistics_on() -> Iterator[None]:
    STATS.write_text("1")
    try:
        yield
    finally:
        STATS.write_text("0")


def watch(directory: Path, pod: Path) -> None:
    """As reflex does it: the memcg is watched, and somebody reads."""
    from governor import bpflib, record

    lib = bpflib.open_libbpf()
    key = record.CGROUP_ID.pack(pod.stat().st_ino)
    verified = record.Verified(0, 0, LIMIT_MIB * MIB // record.PAGE_BYTES)
    config = record.Config(time.monotonic_ns(), 3600 * 10**9).encode()
    for module in ("charge", "stall", "victim"):
        if not (directory / module).is_dir():
            continue
        bpflib.PinnedMap(lib, f"{directory}/{module}/config").update(record.CONFIG_KEY, config)
        if module != "victim":
            bpflib.PinnedMap(lib, f"{directory}/{module}/track").update(key, bytes(record.TRACK.size))
            value = record.encode_watch(record.Levels(), verified, 1)
            bpflib.PinnedMap(lib, f"{directory}/{module}/watch").update(key, value)


def cost(quick: bool) -> None:
    from governor import bpflib, pins

    directory = loaded(INSTANCE)
    print(f"{where()}, {LIMIT_MIB} MiB\n", flush=True)
    scratch = Path("/var/tmp")
    count = 10 if quick else 60
    todo = works(scratch)
    try:
        with memcg("cost", LIMIT_MIB) as pod:
            watch(directory, pod)
            programs = Programs(bpflib.open_libbpf(), directory)
            worker = Worker(pod, list(todo.values()))
            rows: list[list[object]] = []
            for number, name in enumerate(todo):
                found = pairs(programs, worker, number, count if number == 0 else count // 3)
                with_ms, without_ms = (statistics.median(pair[side] for pair in found) / 1e6 for side in (0, 1))
                ratios = sorted(100 * (a / b - 1) for a, b in found)
                spread = f"{at(ratios, 0.25):+.2f} to {at(ratios, 0.75):+.2f}"
                rows.append([name, len(found), f"{without_ms:.1f}", f"{with_ms:.1f}"])
                rows[-1] += [f"{100 * (with_ms / without_ms - 1):+.2f}", f"{statistics.median(ratios):+.2f}", spread]
            head = ["work", "pairs", "ms without", "ms with", "% of medians", "% median of pairs", "middle half, %"]
            table(head, rows)
            counted(programs, worker, list(todo))
            remove(pod)
    finally:
        pins.unload(INSTANCE)
        (scratch / f"governor-bench-large-{os.getpid()}").unlink(missing_ok=True)
    idle(5 if quick else IDLE_S)


def counted(programs: Programs, worker: Worker, names: list[str]) -> None:
    """The kernel's own count of what the programs ran, per work; counting makes each run slower by itself."""
    rows: list[list[object]] = []
    programs.attach()
    with statistics_on():
        for number, name in enumerate(names):
            before = programs.runs()
            took_ns = worker.took_ns(number)
            for program, (runs, run_ns) in programs.runs().items():
                ran, spent_ns = runs - before[program][0], run_ns - before[program][1]
                each = f"{spent_ns / ran:.0f}" if ran else ""
                rows.append([name, program, ran, each, f"{100 * spent_ns / took_ns:.3f}"])
    programs.detach()
    table(["work", "program", "runs", "ns a run", "% of the time"], rows)


def idle(seconds: float) -> None:
    """CPU time of the two processes while nothing happens."""

    def cpu_s(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with memcg("idle", LIMIT_MIB) as pod:
        governed = Governed(pod)
        try:
            pids = {"reflex": governed.reflex_pid(), "governor": governed.process.pid}
            time.sleep(3)
            before = {name: cpu_s(pid) for name, pid in pids.items()}
            time.sleep(seconds)
            spent = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
        finally:
            governed.stop()
    told = ", ".join(f"{name} {s:.2f} s ({100 * s / seconds:.2f} % of a CPU)" for name, s in spent.items())
    print(f"idle for {seconds:g} s, CPU time: {told}")
