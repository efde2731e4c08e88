"""An agent with a session that can be resumed: resumable.py DIRECTORY [--resume SESSION].

Keeps DIRECTORY/<pid>.json (its state) and DIRECTORY/<session>.jsonl (its turns); reads lines: `fill N` takes N MiB at
once, `grow N` the same at 20 MB/s, `exit N` ends with that status. SIGTERM: saves a last turn and ends with 143.
"""

import json
import os
import signal
import sys
import time
import uuid

directory = sys.argv[1]
session = sys.argv[3] if sys.argv[2:3] == ["--resume"] else f"session-{uuid.uuid4().hex[:8]}"
transcript = os.path.join(directory, f"{session}.jsonl")


def turn(text: str) -> None:
    with open(transcript, "a") as file:
        file.write(json.dumps({"text": text}) + "\n")


def save(*_: object) -> None:
    turn("saved on SIGTERM")
    os._exit(143)


signal.signal(signal.SIGTERM, save)
with open("/proc/self/stat") as stat:
    ticks = stat.read().rpartition(")")[2].split()[19]
with open(os.path.join(directory, f"{os.getpid()}.json"), "w") as state:
    json.dump({"sessionId": session, "procStart": ticks, "status": "idle"}, state)
turn("resumed" if "--resume" in sys.argv else "began")
print(f"{session} {'goes on' if '--resume' in sys.argv else 'begins'}", flush=True)
kept = []
while True:
    command, _, number = input("agent> ").partition(" ")
    if command == "exit":
        sys.exit(int(number))
    for _ in range(int(number)):
        kept.append(bytearray(b"x") * (1 << 20))
        time.sleep(0.05 if command == "grow" else 0)
