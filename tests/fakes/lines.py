"""A program that reads lines behind a prompt, as small agents do: lines.py RECORD [SECONDS_BEFORE_EACH_ANSWER].

`fill N` keeps N MiB more, `/compact` gives half of it back, `/clear` all.
"""

import readline  # noqa: F401  its line editing
import signal
import sys
import time


def record(what: str) -> None:
    with open(sys.argv[1], "a") as file:
        file.write(what + "\n")


kept = []
for name in ("SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, _: record(signal.Signals(number).name))
while True:
    line = input("agent> ")
    record(line)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
    if line == "ask":
        record("answer " + input("Delete all files? [y/N] "))
    if line.startswith("fill "):
        kept += [bytearray(b"x") * (1 << 20) for _ in range(int(line[5:]))]
    if line in ("/compact", "/clear"):
        del kept[: len(kept) // 2 if line == "/compact" else len(kept)]
    print(f"did {line}")
