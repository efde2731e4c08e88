"""An agent with a session that can be resumed: resumable.py DIRECTORY [WORDS...] [--resume SESSION].

Keeps DIRECTORY/<pid>.json (its state), DIRECTORY/<session>.jsonl (its turns) and DIRECTORY/words (an array a line:
how each was started, "" or its last option, and WORDS). Reads lines: `fill N` takes N MiB, `grow N` the same at
20 MB/s, `work N` is busy for N seconds, `deaf` ignores SIGTERM from then on, `exit N` ends with that status; all else
is a turn. SIGTERM: saves a last turn and ends with 143.

resumable.py DIRECTORY [WORDS...] --compact SESSION compacts a stopped session, in a turn: fails where
DIRECTORY/overloaded is, says that it does with status 0 where DIRECTORY/refuses is, and takes for ever where
DIRECTORY/hangs is.
"""

import json
import os
import signal
import sys
import time
import uuid

directory = sys.argv[1]
is_again = sys.argv[-2] in ("--resume", "--compact")
mode, session = sys.argv[-2:] if is_again else ("", f"session-{uuid.uuid4().hex[:8]}")
transcript = os.path.join(directory, f"{session}.jsonl")


def turn(text: str) -> None:
    with open(transcript, "a") as file:
        file.write(json.dumps({"text": text}) + "\n")


def tell(status: str) -> None:
    path = os.path.join(directory, f"{os.getpid()}.json")
    with open(f"{path}.new", "w") as state:
        json.dump({"sessionId": session, "procStart": ticks, "status": status}, state)
    os.rename(f"{path}.new", path)


def save(*_: object) -> None:
    turn("saved on SIGTERM")
    os._exit(143)


with open(os.path.join(directory, "words"), "a") as words:
    words.write(json.dumps([mode, *(sys.argv[2:-2] if is_again else sys.argv[2:])]) + "\n")
if mode == "--compact":
    while os.path.exists(os.path.join(directory, "hangs")):
        time.sleep(0.1)
    if os.path.exists(os.path.join(directory, "overloaded")):
        sys.exit("the model is \x1b[31moverloaded")
    if os.path.exists(os.path.join(directory, "refuses")):
        print('{"result": "too short"}')
        sys.exit(0)
    turn("compacted")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
with open("/proc/self/stat") as stat:
    ticks = stat.read().rpartition(")")[2].split()[19]
tell("idle")
turn("resumed" if mode else "began")
print(f"{session} {'goes on' if mode else 'begins'}", flush=True)
kept = []
while True:
    command, _, number = input("agent> ").partition(" ")
    tell("busy")
    if command == "exit":
        sys.exit(int(number))
    elif command == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif command == "work":
        time.sleep(int(number))
    elif command not in ("fill", "grow"):
        turn(f"{command} {number}")
    else:
        for _ in range(int(number)):
            kept.append(bytearray(b"x") * (1 << 20))
            time.sleep(0.05 if command == "grow" else 0)
    tell("idle")
