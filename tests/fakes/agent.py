"""An agent-like process: keeps a session file, saves it on SIGTERM, and bursts when told to.

    agent.py SESSION_FILE BURST [--save-s 0.3] [--rate-mb N] [--start-mb N] [--total-mb N] [--begin FILE]
             [--subscribe HOW]

BURST is one of the names in BURSTS, or "none". It fills --start-mb, says "ready" on standard output, waits for
--begin to exist (a number in it replaces --total-mb), or for nothing, and bursts as fast as it can, or at --rate-mb.
A thread's burst leaves the main thread free to
handle SIGTERM. With --subscribe it does what governor's socket asks it for, one of the ways in ANSWERS, and prints
what it was asked. Standard library only; the same program serves the tests, the demo and the benches.
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable

CHUNK = 1 << 20
MADV_HUGEPAGE, MADV_NOHUGEPAGE = 14, 15
MAP_POPULATE = 0x8000
PR_SET_THP_DISABLE = 41
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_long,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def anonymous(size: int, flags: int = 0) -> int:
    address = libc.mmap(None, size, 3, 0x22 | flags, -1, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise MemoryError(os.strerror(ctypes.get_errno()))
    return address


def touch(total: int, rate: float = 0) -> int:
    """Plain pages, by C: as fast as the machine, or at a rate, and what a freeze cost is not made up for."""
    address = anonymous(total)
    libc.madvise(address, total, MADV_NOHUGEPAGE)
    due = time.monotonic()
    for offset in range(0, total, CHUNK):
        libc.memset(address + offset, 1, min(CHUNK, total - offset))
        if rate:
            due = max(due, time.monotonic() - 0.05) + CHUNK / rate
            time.sleep(max(0.0, due - time.monotonic()))
    return address


def peak(total: int, rate: float = 0) -> None:
    """As touch, and lets go half a second later."""
    address = touch(total, rate)
    time.sleep(0.5)
    libc.munmap(address, total)


def waves(total: int, rate: float = 0) -> None:
    """Peaks of half the total to all of it, over and over."""
    while True:
        peak(int(total * random.uniform(0.5, 1.0)), rate)
        time.sleep(random.uniform(0.0, 0.5))


def huge(total: int, rate: float = 0) -> None:
    address = anonymous(total)
    libc.madvise(address, total, MADV_HUGEPAGE)
    libc.memset(address, 1, total)


def read(total: int, rate: float = 0) -> None:
    """Large reads into fresh memory."""
    kept = []
    with open("/dev/zero", "rb", buffering=0) as zeros:
        for _ in range(total // CHUNK):
            kept.append(zeros.read(CHUNK))


def tmpfs(total: int, rate: float = 0) -> None:
    block = b"x" * CHUNK
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        for _ in range(total // CHUNK):
            file.write(block)
            file.flush()


def threads(total: int, rate: float = 0) -> None:
    running = [threading.Thread(target=touch, args=(total // 4,)) for _ in range(4)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()


def processes(total: int, rate: float = 0) -> None:
    children = []
    for _ in range(8):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            touch(total // 8)
            time.sleep(600)
            os._exit(0)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)


def tool(total: int, rate: float = 0) -> None:
    """One child that bursts, as a build or a test run of an agent does."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        touch(total, rate)
        time.sleep(600)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print(f"tool ended with {os.waitstatus_to_exitcode(status)}", flush=True)


def populate(total: int, rate: float = 0) -> None:
    anonymous(total, MAP_POPULATE)


# To a request: what it acknowledges, whether it frees what it started with, and how much later
ANSWERS = {
    "frees": ("delivered", True, 0.0),
    "late": ("delivered", True, 0.5),
    "nothing": ("delivered", False, 0.0),
    "defers": ("deferred", False, 0.0),
    "ignores": (None, False, 0.0),
    "crashes": (None, False, 0.0),
}


def subscribe(how: str, free: Callable[[], None]) -> None:
    """Answer requests for ever; a deferred one is done when it comes again."""
    with open("/proc/self/cgroup") as cgroups:
        memcg = "/sys/fs/cgroup" + next(line for line in cgroups if line.startswith("0::"))[3:].strip()
    path = f"/run/governor/memcg-{os.stat(memcg).st_ino}.sock"
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
            connection.sendall(b'{"type": "subscribe", "can": ["compact", "clear"]}\n')
            print("subscribed", flush=True)
            for line in connection.makefile("rb"):
                asked = json.loads(line)
                if asked["type"] != "request":
                    continue
                print(f"asked to {asked['what']}", flush=True)
                if how == "crashes":
                    os._exit(1)
                status, frees, after_s = ANSWERS[how]
                if status:
                    answer = {"type": "ack", "id": asked["id"], "status": status, "reason": f"it {how}"}
                    connection.sendall(json.dumps(answer).encode() + b"\n")
                time.sleep(after_s)
                if frees:
                    free()
                how = "frees" if how == "defers" else how
        except OSError:
            pass
        connection.close()
        time.sleep(0.1)


BURSTS = {f.__name__: f for f in (touch, peak, waves, huge, read, tmpfs, threads, processes, tool, populate)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("session")
    parser.add_argument("burst", choices=[*BURSTS, "none"])
    parser.add_argument("--save-s", type=float, default=0.0)
    parser.add_argument("--rate-mb", type=float, default=0.0)
    parser.add_argument("--start-mb", type=int, default=0)
    parser.add_argument("--total-mb", type=int, default=1024)
    parser.add_argument("--begin", default="")
    parser.add_argument("--turns", type=int, default=200)
    parser.add_argument("--picture-mb", type=int, default=0, help="incompressible bytes in the session")
    parser.add_argument("--subscribe", choices=ANSWERS)
    options = parser.parse_args()

    if options.burst == "peak":  # to the megabyte: a thread's stack and khugepaged charge 2 MiB at once
        libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)
    with open(options.session, "w", encoding="latin-1") as session:
        for _ in range(options.picture_mb):
            session.write(os.urandom(CHUNK).decode("latin-1"))
        for turn in range(options.turns):
            session.write(json.dumps({"turn": turn, "text": f"what was said in turn {turn} " * 8}) + "\n")

    def save(*_: object) -> None:
        time.sleep(options.save_s)
        with open(options.session + ".saved", "a") as saved:
            saved.write("saved on SIGTERM\n")
        os._exit(143)

    signal.signal(signal.SIGTERM, save)
    start = touch(options.start_mb << 20) if options.start_mb else 0
    print("ready", flush=True)
    if options.subscribe:
        free = functools.partial(libc.munmap, start, options.start_mb << 20)
        threading.Thread(target=subscribe, args=(options.subscribe, free), daemon=True).start()
    while options.begin and not os.path.exists(options.begin):
        time.sleep(0.02)
    if options.begin:
        with open(options.begin) as begin:
            options.total_mb = int(begin.read() or options.total_mb)
    if options.burst != "none":
        burst = BURSTS[options.burst]
        # Not in the main thread: Python handles signals there, between two of its instructions.
        thread = threading.Thread(target=burst, args=(options.total_mb << 20, options.rate_mb * 1e6), daemon=True)
        thread.start()
        thread.join()
        print("burst over", flush=True)
    while True:
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
