"""A terminal of tmux's with one program in it: keys in, what a person would see out."""

import os
import shlex
import subprocess
from contextlib import suppress

from tests.waiting import wait_for


class Screen:
    """One pane, so many columns and lines."""

    def __init__(self, directory, command, columns=80, lines=24, shell=False, **environment):
        self._socket = str(directory / "tmux.sock")
        started = {"TERM": "xterm-256color", "LC_ALL": "C.UTF-8", "PS1": "$ ", **environment}
        words = " ".join(shlex.quote(str(word)) for word in command)
        program = f"env {' '.join(f'{k}={shlex.quote(v)}' for k, v in started.items())} "
        program += "bash --norc --noprofile" if shell else f"sh -c {shlex.quote(f'{words}; echo ended with $?; cat')}"
        size = ("-x", str(columns), "-y", str(lines))
        self._tmux("-f", "/dev/null", "new-session", "-d", *size, program)
        if shell:
            self.keys(words, "Enter")

    def _tmux(self, *arguments):
        environment = {key: value for key, value in os.environ.items() if not key.startswith("TMUX")}
        command = ["tmux", "-u", "-S", self._socket, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout

    def keys(self, *keys):
        self._tmux("send-keys", *keys)

    def resize(self, columns, lines):
        self._tmux("resize-window", "-x", str(columns), "-y", str(lines))

    @property
    def pid(self):
        return int(self._tmux("display-message", "-p", "#{pane_pid}"))

    def text(self):
        return self._tmux("capture-pane", "-p")

    def shows(self, *words, seconds=30):
        """The screen, once all the words are on it."""

        def found():
            text = self.text()
            return text if all(word in " ".join(text.split()) for word in words) else None

        try:
            return wait_for(found, seconds)
        except AssertionError:
            raise AssertionError(f"{words} did not come; there is:\n{self.text()}") from None

    def close(self):
        with suppress(subprocess.CalledProcessError):  # closed before
            self._tmux("kill-server")
