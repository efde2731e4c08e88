"""A stand-in for an agent in a terminal, with all that makes blind typing dangerous. Standard library only.

    repl.py RECORD [--orders FILE] [--state FILE] [--transcript FILE] [--dialog-on TEXT] [--compact-s 0.2]

Draws history, an input between two rules ("> draft") and what else there is. Enter (\\r, not \\n) submits; Ctrl-S
puts a draft aside and, on an empty input, brings it back (as it comes back after a submit); Escape is vim's NORMAL
mode, `i` leaves it; "!" in an empty input is shell mode. In a dialog there is no input: Enter approves, any other
key is taken as an answer. While busy, what is submitted is queued. RECORD gets a line of JSON for each thing that
was done to it.

ORDERS is read as it grows, a line of JSON each: {"dialog": TEXT}, {"close": 1}, {"busy": SECONDS}, {"say": TEXT},
{"stall": SECONDS} (reads and draws nothing meanwhile).
--dialog-on: a dialog opens as soon as this text stands in the input.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import sys
import termios
import time
import tty


class Repl:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.draft = self.stash = self.dialog = ""
        self.mode = "insert"
        self.history: list[str] = ["a stand-in agent"]
        self.queue: list[str] = []
        self.busy_until = 0.0
        self.session = 1
        self.orders_read = 0
        self.compacting_until = 0.0

    def record(self, **what: object) -> None:
        with open(self.options.record, "a") as file:
            file.write(json.dumps(what) + "\n")

    def write_state(self) -> None:
        if not self.options.state:
            return
        with open("/proc/self/stat") as file:
            ticks = file.read().rpartition(")")[2].split()[19]
        status = "waiting" if self.dialog else "busy" if self.busy_until else "idle"
        state = {"pid": os.getpid(), "sessionId": f"session-{self.session}", "procStart": ticks, "status": status}
        state |= {"waitingFor": self.dialog} if self.dialog else {}
        with open(self.options.state + ".new", "w") as file:
            json.dump(state, file)
        os.rename(self.options.state + ".new", self.options.state)

    def draw(self) -> None:
        self.write_state()
        lines = self.history[-10:]
        if self.busy_until:
            lines = [*lines, "* working (esc to interrupt)"]
        lines = [*lines, *(f"  queued: {line}" for line in self.queue)]
        rule = "─" * 40
        if self.dialog:
            lines = [*lines, rule, f" {self.dialog}", " > 1. Yes", "   2. No", " Esc to cancel"]
        else:
            sign = "!" if self.mode == "shell" else ">"
            lines = [*lines, rule, *f"{sign} {self.draft}".split("\n"), rule]
            lines += ["-- NORMAL --"] if self.mode == "normal" else ["draft put aside"] if self.stash else []
        sys.stdout.write("\x1b[H\x1b[2J" + "\r\n".join(lines))
        sys.stdout.flush()

    def key(self, char: str) -> None:
        if self.dialog:
            self.record(approved=self.dialog) if char == "\r" else self.record(answered=char)
            self.dialog = "" if char == "\r" else self.dialog
        elif self.mode == "normal":
            self.record(vim=char)
            self.mode = "insert" if char == "i" else "normal"
        elif char == "\x1b":
            self.mode = "normal"
        elif char == "\x13":
            self.draft, self.stash = ("", self.draft) if self.draft else (self.stash, "")
        elif char == "\x7f":
            self.draft = self.draft[:-1]
        elif char == "\r":
            self.submit()
        elif char == "!" and not self.draft:
            self.mode = "shell"
        elif char.isprintable() or char == "\n":
            self.draft += char
        if self.draft and self.draft == self.options.dialog_on:
            self.dialog = "Delete everything?"
            self.options.dialog_on = ""

    def submit(self) -> None:
        line, self.draft = self.draft, ""
        if self.mode == "shell":
            self.record(shell=line)
            self.mode = "insert"
        elif self.busy_until:
            self.record(queued=line)
            self.queue.append(line)
        else:
            self.run(line)
        if self.stash and not self.draft:
            self.draft, self.stash = self.stash, ""

    def run(self, line: str) -> None:
        self.record(line=line)
        self.history.append(f"> {line}")
        if line == "/compact":
            self.compacting_until = time.monotonic() + self.options.compact_s
        elif line == "/clear":
            self.session += 1
            self.history = [f"> {line}", "cleared"]

    def orders(self) -> bool:
        try:
            with open(self.options.orders) as file:
                lines = file.read().split("\n")[:-1]
        except (OSError, TypeError):
            return False
        for order in map(json.loads, lines[self.orders_read :]):
            self.dialog = order.get("dialog", "" if "close" in order else self.dialog)
            if "busy" in order:
                self.busy_until = time.monotonic() + order["busy"]
            if "stall" in order:
                time.sleep(order["stall"])
            if "say" in order:
                self.history.append(order["say"])
        had, self.orders_read = self.orders_read, len(lines)
        return had != len(lines)

    def tick(self) -> bool:
        changed = self.orders()
        now = time.monotonic()
        if self.busy_until and now >= self.busy_until:
            self.busy_until, changed = 0.0, True
            queue, self.queue = self.queue, []
            for line in queue:
                self.run(line)
        if self.compacting_until and now >= self.compacting_until:
            self.compacting_until, changed = 0.0, True
            self.history.append("  the session was compacted")
            if self.options.transcript:
                with open(self.options.transcript, "a") as file:
                    file.write('{"subtype":"compact_boundary"}\n')
        return changed


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("record")
    for name in ("orders", "state", "transcript", "dialog-on"):
        parser.add_argument(f"--{name}", default="")
    parser.add_argument("--compact-s", type=float, default=0.2)
    repl = Repl(parser.parse_args())
    usual = termios.tcgetattr(0)
    tty.setraw(0)
    try:
        repl.draw()
        while True:
            data = os.read(0, 1024) if select.select([0], [], [], 0.02)[0] else None
            if data == b"" or (data and b"\x04" in data):
                return
            for char in (data or b"").decode(errors="replace"):
                repl.key(char)
            if repl.tick() or data:
                repl.draw()
    finally:
        termios.tcsetattr(0, termios.TCSADRAIN, usual)


if __name__ == "__main__":
    main()
