"""A server that grows while it has locks: what others see of it while it is held.

    holder.py DIRECTORY PORT

Answers HTTP on PORT of 127.0.0.1. Once DIRECTORY/begin is there, it takes a lock of DIRECTORY/lock and SQLite's of
DIRECTORY/base.db, fills memory until DIRECTORY/enough is there, lets go of everything, and serves on.
"""

from __future__ import annotations

import fcntl
import mmap
import sqlite3
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

MIB = 1 << 20
RATE_MIB = 40


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()


def main(directory: Path, port: int) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", port), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = sqlite3.connect(directory / "base.db", isolation_level=None)
    base.execute("create table kept (number integer)")
    print("ready", flush=True)
    while not (directory / "begin").exists():
        time.sleep(0.02)
    with (directory / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        base.execute("begin immediate")
        grown = []
        while not (directory / "enough").exists():
            grown.append(mmap.mmap(-1, MIB))
            grown[-1].write(b"x" * MIB)
            time.sleep(1 / RATE_MIB)
        base.execute("commit")
    for each in grown:
        each.close()
    print("let go", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
