"""`governor run` as people start it: at a terminal of its own, with pipes, or in a shell with job control in tmux."""

import fcntl
import json
import os
import pty
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

from tests.waiting import wait_for

RUN = [sys.executable, "-m", "governor", "run"]
BOOT = f"import sys; sys.path.insert(0, {os.getcwd()!r}); from governor.run import main; sys.exit(main(sys.argv[1:]))"


BECOME = "import ctypes, os, sys; ctypes.CDLL(None).prctl(36, 1, 0, 0, 0); os.execv(sys.argv[1], sys.argv[1:])"


def resident(*command, **options):
    """The process that stays, as the command line execs it: a reaper of orphans (36: PR_SET_CHILD_SUBREAPER)."""
    stays = [sys.executable, "-I", "-S", "-c", BOOT, json.dumps(options), *command]
    return [sys.executable, "-I", "-S", "-c", BECOME, *stays]


class AtTerminal:
    """A command at a terminal of its own, whose session it leads, as in `docker run -it`."""

    def __init__(self, *command, rows=24, columns=80, environment=None):
        self.output = b""
        read_fd, write_fd = os.pipe()
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.close(write_fd)
            os.read(read_fd, 1)  # until the size is set
            os.close(read_fd)
            os.execvpe(command[0], command, {**os.environ, **(environment or {})})
        self.resize(rows, columns)
        os.close(read_fd)
        os.close(write_fd)
        self.status = None

    def resize(self, rows, columns):
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys):
        while keys:
            select.select([], [self.fd], [], 10)
            keys = keys[os.write(self.fd, keys[:512]) :]

    def read(self, seconds=0.1):
        """One piece of output; b"" where there is none now or any more."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return b""
        try:
            data = os.read(self.fd, 65536)
        except OSError:
            data = b""
        self.output += data
        return data

    def await_output(self, wanted, seconds=20.0):
        until = time.monotonic() + seconds
        while wanted not in self.output:
            assert time.monotonic() < until, (wanted, self.output[-2000:])
            self.read()
        return self.output

    def wait(self, seconds=20.0):
        """Its exit status; what it printed is read meanwhile."""
        until = time.monotonic() + seconds
        while self.status is None:
            assert time.monotonic() < until, self.output[-2000:]
            self.read(0.02)
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                while self.read(0):
                    pass
                self.status = os.waitstatus_to_exitcode(status)
        return self.status

    def close(self):
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


class Shell:
    """A real shell with job control, in tmux."""

    def __init__(self, directory, environment):
        self._socket = str(directory / "tmux")
        names = [f"{name}={value}" for name, value in environment.items()]
        shell = ["env", *names, "PS1=$ ", "bash", "--norc", "--noprofile", "-i"]
        self._tmux("-f", "/dev/null", "new-session", "-d", "-x", "100", "-y", "40", *shell)
        self.await_prompt()

    def _tmux(self, *arguments):
        command = [shutil.which("tmux"), "-S", self._socket, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def keys(self, *keys):
        self._tmux("send-keys", *keys)

    def line(self, text):
        self.keys("-l", text)
        self.keys("Enter")

    def screen(self):
        return self._tmux("capture-pane", "-p", "-J").rstrip()

    def await_prompt(self):
        """Until the shell reads again: what is typed before goes to whom it ran."""
        wait_for(lambda: self.screen().endswith("$"), 8.0, "the prompt")

    def await_raw(self):
        """Until governor has taken the terminal; a shell that edits a line leaves ISIG as it is."""
        fd = os.open(self._tmux("display-message", "-p", "#{pane_tty}").strip(), os.O_RDONLY | os.O_NOCTTY)
        try:
            wait_for(lambda: not termios.tcgetattr(fd)[3] & termios.ISIG, 8.0, "raw mode")
        finally:
            os.close(fd)

    def await_line(self, wanted, seconds=8.0):
        try:
            wait_for(lambda: any(line.rstrip() == wanted for line in self.screen().split("\n")), seconds)
        except AssertionError:
            raise AssertionError(f"found no line {wanted!r} in:\n{self.screen()}") from None

    def close(self):
        self._tmux("kill-server")


def ask(path, *lines, seconds=10.0):
    """The answers of a control socket to these requests, one after the other on one connection."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(seconds)
        client.connect(str(path))
        file = client.makefile("rwb")
        answers = []
        for line in lines:
            file.write(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n")
            file.flush()
            answers.append(file.readline())
        return [json.loads(answer) if answer else None for answer in answers]


def stat_of(pid):
    """State letter, parent, process group and session of a process; None when it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return fields[0], *map(int, fields[1:4])
