"""A program that reads lines behind a prompt, as small agents do: lines.py RECORD [SECONDS_BEFORE_EACH_ANSWER]."""

import readline  # noqa: F401  its line editing
import signal
import sys
import time


def record(what: str) -> None:
    with open(sys.argv[1], "a") as file:
        file.write(what + "\n")


for name in ("SIGUSR1", "SIGUSR2"):
    signal.signal(getattr(signal, name), lambda number, _: record(signal.Signals(number).name))
while True:
    line = input("agent> ")
    record(line)
    time.sleep(float(sys.argv[2]) if len(sys.argv) > 2 else 0)
    if line == "ask":
        record("answer " + input("Delete all files? [y/N] "))
    print(f"did {line}")
