"""What the BPF programs cost: their run time by the kernel's own count, and allocation with and without them.

Compared in pairs, one right after the other in the same process; which comes first alternates. CPU time of that
process, so that others on the machine disturb less.
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

from benches.common import MIB, Governed, at, loaded, memcg, table, where

INSTANCE = "bench"
LIMIT_MIB, BLOCK_MIB, FILE_MIB = 64, 16, 96
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
            program_fd = lib.bpf_prog_get_fd_by_id(_fdinfo(link_fd)["prog_id"])
            self.fds[f"{pin.parent.name}: {pin.name.rpartition('-')[2]}"] = program_fd
            pin.unlink()
            os.close(link_fd)  # the last one: detached
            lib.bpf_obj_pin(program_fd, str(pin).encode())  # in its place, so that reflex sees nothing missing

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
    """A process in the memcg that does its work when told to, and says how long it took."""

    def __init__(self, pod: Path, work: Callable[[], None]) -> None:
        self._commands, commands = os.pipe()[::-1]
        replies, self._replies = os.pipe()[::-1]
        self.pid = os.fork()
        if self.pid == 0:
            (pod / "cgroup.procs").write_text(str(os.getpid()))
            while os.read(commands, 1):
                begun_ns = time.process_time_ns()
                work()
                os.write(replies, (time.process_time_ns() - begun_ns).to_bytes(8, "little"))
            os._exit(0)

    def took_ns(self) -> int:
        os.write(self._commands, b".")
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


def pairs(programs: Programs, worker: Worker, count: int) -> list[tuple[int, int]]:
    """(nanoseconds with, nanoseconds without) for each pair."""
    found = []
    for number in range(-1, count):
        took = {}
        for attached in (True, False) if number % 2 else (False, True):
            (programs.attach if attached else programs.detach)()
            took[attached] = worker.took_ns()
            programs.detach()
        if number >= 0:  # the first one warms up
            found.append((took[True], took[False]))
    return found


@contextmanager
def guarded(pod: Path) -> Iterator[Governed]:
    """Watched and read as in use: reflex answers when the programs ask for memory.stat."""
    governed = Governed(pod, "--instance", INSTANCE)
    try:
        yield governed
    finally:
        governed.stop()


@contextmanager
def statistics_on() -> Iterator[None]:
    STATS.write_text("1")
    try:
        yield
    finally:
        STATS.write_text("0")


def cost(quick: bool) -> None:
    from governor import bpflib, pins

    directory = loaded(INSTANCE)
    print(f"{where()}, {LIMIT_MIB} MiB\n", flush=True)
    scratch = Path("/var/tmp")
    compared: list[list[object]] = []
    counts: list[list[object]] = []
    try:
        programs = Programs(bpflib.open_libbpf(), directory)
        for (name, work), count in zip(works(scratch).items(), (40, 5) if quick else (150, 15), strict=True):
            with memcg("cost", LIMIT_MIB) as pod, guarded(pod):
                worker = Worker(pod, work)
                found = pairs(programs, worker, count)
                with_ms, without_ms = (statistics.median(pair[side] for pair in found) / 1e6 for side in (0, 1))
                ratios = sorted(100 * (a / b - 1) for a, b in found)
                spread = f"{at(ratios, 0.25):+.2f} to {at(ratios, 0.75):+.2f}"
                compared.append([name, len(found), f"{without_ms:.1f}", f"{with_ms:.1f}"])
                compared[-1] += [
                    f"{100 * (with_ms / without_ms - 1):+.2f}",
                    f"{statistics.median(ratios):+.2f}",
                    spread,
                ]
                counts += counted(programs, worker, name)
        programs.attach()
        idle(5 if quick else IDLE_S)
    finally:
        pins.unload(INSTANCE)
        (scratch / f"governor-bench-large-{os.getpid()}").unlink(missing_ok=True)
    head = ["work", "pairs", "ms without", "ms with", "% of medians", "% median of pairs", "middle half, %"]
    table(head, compared)
    table(["work", "program", "runs", "ns a run", "% of the time"], counts)


def counted(programs: Programs, worker: Worker, name: str) -> list[list[object]]:
    """The kernel's own count of what the programs ran; counting makes each run slower by itself."""
    rows: list[list[object]] = []
    programs.attach()
    before = programs.runs()
    with statistics_on():
        took_ns = worker.took_ns()
    for program, (runs, run_ns) in programs.runs().items():
        ran, spent_ns = runs - before[program][0], run_ns - before[program][1]
        each = f"{spent_ns / ran:.0f}" if ran else ""
        rows.append([name, program, ran, each, f"{100 * spent_ns / took_ns:.3f}"])
    programs.detach()
    return rows


def idle(seconds: float) -> None:
    """CPU time of the two processes while nothing happens."""

    def cpu_s(pid: int) -> float:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    with memcg("idle", LIMIT_MIB) as pod, guarded(pod) as governed:
        pids = {"reflex": governed.reflex_pid(), "governor": governed.process.pid}
        time.sleep(3)
        before = {name: cpu_s(pid) for name, pid in pids.items()}
        time.sleep(seconds)
        spent = {name: cpu_s(pid) - before[name] for name, pid in pids.items()}
    told = ", ".join(f"{name} {s:.2f} s ({100 * s / seconds:.2f} % of a CPU)" for name, s in spent.items())
    print(f"idle for {seconds:g} s, CPU time: {told}\n")
