"""`governor run` in a container, and the daemon of its node: who asks the agent, who brakes, who takes over."""

import json
import os
import pty
import select
import signal
import subprocess
import sys

import pytest
from conftest import AGENT
from test_node import Node

from tests.fakes import resumable_profile
from tests.journal_lines import lines_of
from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

POLICY = """
[select]
namespace = ["agents"]
[compact]
settle = "2s"
[archive]
globs = ["{directory}/*.jsonl"]
"""
TYPED = '[type]\ncompact = "/compact"\nwhile_busy = "queued"\n'
# A container: its own mounts, pids and cgroup namespace, in the memcg whose cgroup.procs is the first argument.
ENTER = r"""
echo 0 > "$1/cgroup.procs"
shift
exec unshare --cgroup sh -c 'umount -l /sys/fs/cgroup; mount -t cgroup2 none /sys/fs/cgroup; mount -t tmpfs none /run
exec "$@"' sh "$@"
"""
IN_A_CONTAINER = ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-c", ENTER, "sh"]


class Inside:
    """`governor run` of an agent, at a terminal, in a container."""

    def __init__(self, pod, directory):
        self.directory, self.shown = directory, b""
        text = resumable_profile.profile(directory).replace('[signals]\ncompact = "SIGUSR1"\n', TYPED)
        (directory / "agent.toml").write_text(text)
        run = [sys.executable, "-m", "governor", "run", "--source", "poll", "--profile", directory / "agent.toml"]
        run += ["--journal", directory / "inside.ndjson", "--archive-dir", directory / "archives", "--"]
        argv = [*IN_A_CONTAINER, pod.path, *run, *resumable_profile.command(directory)]
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            environment = {**os.environ, "XDG_STATE_HOME": str(directory / "state"), "TERM": "xterm"}
            os.execvpe(argv[0], list(map(str, argv)), environment)

    def shows(self, text, seconds=60):
        def look():
            while select.select([self.master], [], [], 0)[0]:
                try:
                    self.shown += os.read(self.master, 65536)
                except OSError:  # its end
                    break
            return text in self.shown.decode(errors="replace")

        try:
            wait_for(look, seconds, f"{text!r} on the terminal")
        except AssertionError as error:
            raise AssertionError(f"{error}: {self.shown.decode(errors='replace')}") from None

    def type(self, text):
        os.write(self.master, text.encode())

    def turns(self):
        return [json.loads(line)["text"] for path in self.directory.glob("*.jsonl") for line in path.open()]

    def lines(self, *kinds):
        read = lines_of(self.directory / "inside.ndjson")
        return [line for line in read if line["kind"] in kinds and not line.get("from_outside")]

    def close(self):
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.master)


@pytest.fixture
def node(tmp_path, loaded):
    made = Node(tmp_path)
    yield made
    made.close()


def lie(pod, directory):
    """A container whose governor-run says that it stands back and delivers, and does nothing; and its agent."""
    code = f"""
import ctypes, os, socket, subprocess, sys, time
ctypes.CDLL(None).prctl(15, b"governor-run", 0, 0, 0)
subprocess.Popen([sys.executable, {str(AGENT)!r}, {str(directory / "liar.jsonl")!r}, "touch", "--rate-mb", "40",
                  "--begin", {str(directory / "liar.begin")!r}])
os.makedirs("/run/governor")
server = socket.socket(socket.AF_UNIX)
server.bind("/run/governor/memcg-%d.sock" % os.stat("/sys/fs/cgroup").st_ino)
server.listen()
while True:
    connection, _ = server.accept()
    connection.sendall(b'{{"type": "led", "can": ["compact", "clear"]}}\\n')
    while connection.recv(4096):
        pass
"""
    argv = [*IN_A_CONTAINER, pod.path, sys.executable, "-c", code]
    return subprocess.Popen([str(word) for word in argv])


def test_compact_is_typed_inside_and_the_rest_is_the_daemons_until_it_is_gone(node, tmp_path):
    inner = tmp_path / "inner"
    inner.mkdir()
    (node.policies / "10-agents.toml").write_text(POLICY.format(directory=tmp_path / "*"))
    pod, liars = node.pod(256), node.pod(128)
    liar = lie(liars, inner)
    inside = Inside(pod, inner)
    try:
        inside.shows("agent> ")
        node.daemon()
        for each in (pod, liars):
            assert "stands back" in node.await_line(each, "inside_guard", 90)["text"]
        assert inside.lines("led")

        inside.type("fill 150\r")
        assert node.await_line(pod, "deliver")["how"] == ["governor run"]
        node.await_line(pod, "delivered")
        assert "/compact " in inside.turns()
        inside.type("grow 200\r")
        assert "frozen" in node.await_line(pod, "braked")["text"]
        node.await_line(pod, "terminating")
        inside.shows(" goes on")  # under the same session, by the governor run that was spared
        assert "saved on SIGTERM" in inside.turns()
        assert node.lines(pod, "archived") and pod.events()["oom_kill"] == 0
        assert not inside.lines("braked", "terminating", "archived")

        (inner / "liar.begin").touch()
        assert "frozen" in node.await_line(liars, "braked")["text"]
        node.await_line(liars, "terminating")
        node.await_line(liars, "agent_ended")
        assert liars.events()["oom_kill"] == 0

        wait_for(lambda: len(inside.lines("led")) == 2, 60, "the next guard, led")
        node.process.kill()
        node.process.wait()
        wait_for(lambda: inside.lines("led_no_more"), 30, "the guard on its own")
        inside.type("grow 250\r")
        wait_for(lambda: inside.lines("braked"), 60, "a brake of its own")
    except AssertionError as error:
        raise AssertionError(f"{error}:\n{node.log()}\n{inside.shown.decode(errors='replace')}") from None
    finally:
        inside.close()
        liar.kill()
        liar.wait()
