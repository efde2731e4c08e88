"""What `governor watch` costs a machine with 500 memcgs: the time to the first picture, resident memory, CPU.

At a terminal of its own, 120 by 40. On cgroup v2 the memcgs are real ones, made here, each with shared memory that is
charged to it; elsewhere a tree of plain files stands in. Some change every second, and the first holds processes.

Emulation multiplies CPU time, so a loop of nothing but Python is timed in the same run: on the machine that emulates
(which passes on what it took), and where the memcgs are. The last column is the CPU divided by how much slower it is.
"""

from __future__ import annotations

import fcntl
import mmap
import multiprocessing
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from multiprocessing.connection import Connection
from pathlib import Path

from benches.common import remove, table, where
from benches.footprint import resident_kib

COUNT, CHANGING = 500, 20
COLUMNS, LINES = 120, 40
PROCESSES = 5
HELD, STEP = (
    512 << 10,
    128 << 10,
)  # bytes of a real one, and by how many it changes: a charge of the kernel's is 256 KiB
LOOPS = 3_000_000
CURRENT = 64 << 20
STAT = "anon {anon}\nfile 1048576\nkernel_stack 65536\nslab_reclaimable 0\nslab_unreclaimable 4096\nshmem 0\n"
STAT += "inactive_file 524288\nactive_file 524288\n" + "".join(f"counter_{n} {n}\n" for n in range(50))


def loop_s() -> float:
    """CPU seconds of a loop of nothing but Python, the best of five."""
    best_s = float("inf")
    for _ in range(5):
        began_s = time.process_time()
        number = 0
        for each in range(LOOPS):
            number = number + each & 0xFFFF
        best_s = min(best_s, time.process_time() - began_s)
    return best_s


def watch(quick: bool, elsewhere_s: float) -> None:
    """`elsewhere_s`: what loop_s() was on the machine that emulates this one; 0: none does."""
    seconds = 10 if quick else 30
    real = Path("/sys/fs/cgroup/cgroup.controllers").exists() and os.geteuid() == 0
    here_s = loop_s()
    slower = here_s / elsewhere_s if elsewhere_s else 1.0
    what = "memcgs" if real else "directories of plain files: no cgroup v2 here"
    print(f"{where()}; {COUNT} {what}, of which {CHANGING} change")
    print(f"{LOOPS:,} turns of a loop in Python: {here_s:.2f} s of CPU; slowdown: {slower:.1f}\n", flush=True)
    head = ["", "first picture, s", "RSS, MiB", "CPU, % of one at 1 Hz", "the same / slowdown"]
    with tempfile.TemporaryDirectory(prefix="governor-bench-") as scratch:
        root = Path("/sys/fs/cgroup/governor-bench-watch") if real else Path(scratch, "a", "b", "cgroup")
        made = make(root, real)
        ours, theirs = multiprocessing.Pipe()
        changing = multiprocessing.get_context("fork").Process(target=change, args=(made, real, theirs, ours))
        changing.start()
        theirs.close()
        ours.recv()  # all hold what they hold
        rows: list[list[object]] = []
        try:
            for name, arguments in (
                ("all, at a terminal", []),
                ("one, at a terminal", [str(made[0])]),
                ("one, --plain", [str(made[0]), "--plain"]),
                ("all, --json", ["--json"]),
            ):
                first, resident, share = cost(arguments, root, real, seconds)
                rows.append([name, first, resident, f"{share:.2f}", f"{share / slower:.2f}"])
        finally:
            ours.close()
            changing.join()
            if real:
                for path in (*made, root):
                    remove(path)
    table(head, rows)


def make(root: Path, real: bool) -> list[Path]:
    made = []
    root.mkdir(parents=True, exist_ok=True)
    if real:
        (root / "cgroup.subtree_control").write_text("+memory")
    for number in range(COUNT):
        one = root / f"unit-{number}.service"
        one.mkdir()
        if not real:
            fill(one, number)
        else:
            (one / "memory.max").write_text(str(CURRENT * 4))
        made.append(one)
    return made


def fill(one: Path, number: int) -> None:
    files = {
        "memory.current": f"{CURRENT + number * 4096}\n",
        "memory.max": f"{CURRENT * 4}\n",
        "memory.high": "max\n",
        "memory.stat": STAT.format(anon=CURRENT - (2 << 20)),
        "memory.events": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\n",
        "memory.pressure": "".join(
            f"{kind} avg10=0.00 avg60=0.00 avg300=0.00 total=0\n" for kind in ("some", "full")
        ),
        "cgroup.procs": "",
        "cgroup.events": "populated 1\nfrozen 0\n",
    }
    for name, text in files.items():
        (one / name).write_text(text)


def change(made: list[Path], real: bool, told: Connection, theirs: Connection) -> None:
    """Says when all is there; changes some every second, until nobody listens any more."""
    theirs.close()
    held = [hold(one) for one in made] if real else []
    processes = []
    for _ in range(PROCESSES if real else 0):
        enter(made[0])
        processes.append(subprocess.Popen(["sleep", "infinity"]))
    told.send("ready")
    turn = 0
    while not told.poll(1):
        turn += 1
        for number, one in enumerate(made[:CHANGING]):
            if real:
                enter(one)
                size = HELD + (turn + number) % 16 * 2 * STEP
                held[number].resize(size)
                held[number][:] = bytes(size)
            else:
                current = CURRENT + (turn * 37 % 100 + number) * (1 << 18)
                (one / "memory.current").write_text(f"{current}\n")
                (one / "memory.stat").write_text(STAT.format(anon=current - (2 << 20)))
    for process in processes:
        process.kill()
        process.wait()
    if real:
        enter(made[0].parent.parent)


def enter(memcg: Path) -> None:
    (memcg / "cgroup.procs").write_text(str(os.getpid()))


def hold(memcg: Path) -> mmap.mmap:
    """Shared memory that is charged to it: it stays when the process has moved on."""
    enter(memcg)
    fd = os.memfd_create("held")
    os.ftruncate(fd, HELD)
    held = mmap.mmap(fd, HELD)
    os.close(fd)
    held[:] = bytes(HELD)
    return held


def cost(arguments: list[str], root: Path, real: bool, seconds: int) -> tuple[str, str, float]:
    """Until the first picture, resident memory, CPU (per cent of one)."""
    code = "from governor import cgroup; import sys; from governor.cli import main; "
    code += "" if real else f"cgroup.ROOT, cgroup.ROOT_V1 = {str(root)!r}, '/nowhere'; "
    begun_s = time.monotonic()
    pid, terminal = pty.fork()
    if pid == 0:
        os.environ["TERM"] = "xterm-256color"
        argv = [sys.executable, "-c", f"{code}main()", "watch", *arguments]
        argv += ["--source", "poll"] if arguments and arguments[0].startswith("/") else []
        os.execv(argv[0], argv)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    first_s = None
    seen = b""
    began_s = begin_s = 0.0
    spent_ns = 0
    until_s = time.monotonic() + 180
    while time.monotonic() < until_s:
        if select.select([terminal], [], [], 0.05)[0]:
            seen = (seen + os.read(terminal, 1 << 16))[-65536:]
        if first_s is None and any(mark in seen for mark in (b"unit-", b"unreclaimable")):
            first_s = time.monotonic() - begun_s
            begin_s, until_s = time.monotonic() + 3, time.monotonic() + 3 + seconds
        if first_s is not None and not began_s and time.monotonic() >= begin_s:
            began_s, spent_ns = time.monotonic(), cpu_ns(pid)
    share = (cpu_ns(pid) - spent_ns) / 1e7 / (time.monotonic() - began_s)
    resident, _ = resident_kib(pid)
    os.kill(pid, signal.SIGTERM)
    while True:  # what it says at the end
        try:
            if not os.read(terminal, 1 << 16):
                break
        except OSError:
            break
    os.waitpid(pid, 0)
    os.close(terminal)
    return f"{first_s:.2f}" if first_s else "none", f"{resident / 1024:.1f}", share


def cpu_ns(pid: int) -> int:
    fields = Path(f"/proc/{pid}/schedstat").read_text().split()
    return int(fields[0])
