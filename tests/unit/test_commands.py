"""Commands and signals on any machine; what needs a real memcg is in tests/kernel/test_actions.py."""

import os
import signal
import subprocess
import sys
import time

import pytest

from governor import children, real_time
from governor.actions import commands, processes
from governor.poller import Poller

SECOND = 1_000_000_000


class Watched:
    """Children on a poller, as the loop has them."""

    def __init__(self):
        self.poller = Poller()
        self.children = children.Children(self.poller)
        self.ended = []

    def start(self, child):
        self.children.start(child, self.ended.append)
        return child

    def turn(self, now_ns=0):
        self.poller.wait(20_000_000)
        self.children.check_deadlines(now_ns)

    def end(self, now_ns=0, seconds=20):
        until = time.monotonic() + seconds
        while not self.ended and time.monotonic() < until:
            self.turn(now_ns)
        return self.ended[0]


@pytest.fixture
def watched():
    made = Watched()
    yield made
    made.children.abandon()


def sh(script, deadline_ns=SECOND):
    return children.spawn(("sh", "-c", script), {}, deadline_ns, "test")


def test_status_75_is_deferred_and_nothing_else_is(watched):
    watched.start(sh("exit 75"))
    assert watched.end().deferred and not watched.ended[0].ok
    watched.ended.clear()
    watched.start(sh("exit 74"))
    assert not watched.end().deferred


def test_what_is_over_its_deadline_is_not_deferred(watched):
    watched.start(sh("trap 'exit 75' TERM; sleep 60 & wait"))
    ended = watched.end(now_ns=SECOND)
    assert ended.over_deadline and not ended.deferred and not ended.ok


def test_a_flood_is_ended_long_before_its_deadline(watched):
    watched.start(sh("trap '' TERM; yes"))
    ended = watched.end()
    assert ended.flooded and not ended.ok and not ended.over_deadline
    assert len(ended.output) == 64 << 10


def test_deadlines_of_deliveries_stand_still(watched):
    delivery = watched.start(sh("sleep 60"))
    archive = watched.start(children.fork(lambda: time.sleep(60) or b"", SECOND, "archive"))
    watched.children.prolong(5 * SECOND)
    assert (delivery.deadline_ns, archive.deadline_ns) == (6 * SECOND, SECOND)
    watched.children.check_deadlines(2 * SECOND)
    assert [ended.over_deadline for ended in watched.ended] == [True]
    watched.children.check_deadlines(6 * SECOND)
    assert len(watched.ended) == 2


@pytest.mark.parametrize("parents", [[], ["/no/such/cgroup"], ["/proc"]])
def test_without_a_memcg_it_runs_and_says_why(watched, parents):
    runner = commands.Commands(parents)
    child, why_not = runner.run(("sh", "-c", 'echo "$WORD"'), {"WORD": "heard"}, SECOND, "test")
    watched.start(child)
    assert watched.end().output == b"heard\n" and watched.ended[0].ok
    assert why_not == "found no cgroup v2 that governor could use" or why_not.startswith(
        f"{parents[0]}/governor-exec-"
    )


def test_a_directory_that_is_no_cgroup_is_left_clean(watched, tmp_path):
    child, why_not = commands.Commands([str(tmp_path)]).run(("true",), {}, SECOND, "test")
    watched.start(child)
    assert watched.end().ok and why_not.endswith("/memory.max: No such file or directory")
    assert list(tmp_path.iterdir()) == []


def test_a_command_is_the_first_to_go(watched):
    child, _ = commands.Commands([]).run(("cat", "/proc/self/oom_score_adj"), {}, SECOND, "test")
    watched.start(child)
    assert watched.end().output == b"1000\n"


@pytest.mark.skipif(os.geteuid() != 0, reason="to be before the others wants CAP_SYS_NICE")
def test_a_command_is_not_before_the_others_as_governor_is(watched):
    os.setpriority(os.PRIO_PROCESS, 0, -20)
    try:
        watched.start(sh("nice"))
        assert (os.nice(0), watched.end().output) == (-20, b"0\n")
    finally:
        real_time.become_ordinary()


def test_only_what_a_dead_governor_left_is_swept(tmp_path):
    own = processes.read_process(os.getpid())
    alive = f"governor-exec-{own.pid}-{own.start_ticks}-0"
    left = [f"governor-exec-{own.pid}-{own.start_ticks - 1}-0", "governor-exec-999999999-5-1"]
    for name in (alive, *left, "governor-exec-odd", "governor-exec-", "other"):
        (tmp_path / name).mkdir()
    assert {path.rpartition("/")[2] for path in commands.Commands([str(tmp_path)]).sweep()} == set(left)
    assert {path.name for path in tmp_path.iterdir()} == {alive, "governor-exec-odd", "governor-exec-", "other"}


LISTENER = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b"told\\n"))
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
os.write(1, b"ready\\n")
while True: signal.pause()
"""


@pytest.fixture
def listener():
    process = subprocess.Popen([sys.executable, "-c", LISTENER], stdout=subprocess.PIPE)
    process.stdout.readline()
    pidfd = os.pidfd_open(process.pid)
    yield process, pidfd
    process.kill()
    process.wait()
    process.stdout.close()
    os.close(pidfd)


def test_a_signal_that_is_handled_is_sent(listener):
    process, pidfd = listener
    assert commands.signal_agent(pidfd, process.pid, "SIGUSR1").ok
    assert process.stdout.readline() == b"told\n"
    assert commands.signal_agent(pidfd, process.pid, "SIGHUP").ok  # blocked: something waits for it


def test_a_signal_that_would_end_the_agent_is_refused(listener):
    process, pidfd = listener
    ended = commands.signal_agent(pidfd, process.pid, "SIGUSR2")
    assert not ended.ok and b"does not handle SIGUSR2" in ended.output
    assert process.poll() is None


def test_an_agent_that_is_gone_is_said(listener):
    process, pidfd = listener
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert commands.signal_agent(pidfd, process.pid, "SIGUSR1").output == b"the agent is gone"


def test_a_name_that_is_no_signal_is_refused():
    with pytest.raises(ValueError, match="found signal 'USR9'"):
        commands.signal_agent(-1, 1, "USR9")
