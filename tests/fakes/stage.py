"""An agent in a real terminal for a test: a pane of a tmux server of its own, or a PTY behind a control socket."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import pty
import shlex
import signal
import socket
import struct
import subprocess
import termios
import threading
from pathlib import Path

from tests.waiting import wait_for

ROWS, COLUMNS = 30, 100


class TmuxStage:
    """`channel` as governor.delivery has it; `pid` is the agent's."""

    def __init__(self, directory: Path, argv: list[str], environment: dict[str, str]) -> None:
        self.socket = str(directory / "tmux")
        pid_file = directory / "pid"
        command = f"echo $$ > {shlex.quote(str(pid_file))}; exec {shlex.join(argv)}"
        size = ["-x", str(COLUMNS), "-y", str(ROWS)]
        self.tmux("new-session", "-d", "-s", "agent", *size, "-c", str(directory), command, env=environment)
        self.pid = int(str(wait_for(lambda: pid_file.exists() and pid_file.read_text())))
        self.channel = f"tmux:{self.socket}:agent"

    def tmux(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        argv = ["tmux", "-f", "/dev/null", "-S", self.socket, *arguments]
        usual = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TERM": "xterm"}
        done = subprocess.run(argv, env=usual | (env or {}), capture_output=True, text=True, check=True, timeout=20)
        return done.stdout

    def type(self, text: str) -> None:
        for char in text:
            self.tmux("send-keys", "-t", "agent", "-H", *(f"{byte:x}" for byte in char.encode()))

    def close(self) -> None:
        self.tmux("kill-server")


class PtyStage:
    """As `governor run` does it: owns the PTY, drains it always, answers on a control socket."""

    def __init__(self, directory: Path, argv: list[str], environment: dict[str, str]) -> None:
        self.output = b""
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            os.chdir(directory)
            usual = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "TERM": "xterm"}
            os.execvpe(argv[0], argv, usual | environment)
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        path = str(directory / "control.sock")
        self.channel = f"pty:{path}"
        self.server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.server.bind(path)
        self.server.listen()
        for work in (self._drain, self._serve):
            threading.Thread(target=work, daemon=True).start()

    def _drain(self) -> None:
        while True:
            try:
                data = os.read(self.master, 65536)
            except OSError:
                return
            self.output = (self.output + data)[-(256 << 10) :]

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with connection:
                asked = json.loads(connection.makefile().readline() or "{}")
                connection.sendall(json.dumps(self.answer(asked)).encode() + b"\n")

    def answer(self, asked: dict[str, str]) -> dict[str, object]:
        if asked.get("ask") == "terminal":
            output = base64.b64encode(self.output).decode()
            return {"rows": ROWS, "columns": COLUMNS, "pid": self.pid, "output": output}
        if asked.get("ask") == "type":
            os.write(self.master, base64.b64decode(asked["keys"]))
            return {"ok": True}
        return {"ok": False, "reason": "no such question"}

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        self.server.close()
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.master)
