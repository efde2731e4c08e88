"""Processes of a container that do in Python what its own programs would: all that they need is imported already."""

import ctypes
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from governor import inside

_LIBC = ctypes.CDLL(None)


def call_oneself(name):
    """As `ps -o comm` shows it."""
    _LIBC.prctl(15, name.encode(), 0, 0, 0)  # PR_SET_NAME


def child(work):
    """The pid of a child that does it and ends; raises nothing there."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG: none of them outlives its test
            work()
            status = 0
        except BaseException as error:  # noqa: BLE001  there is nobody above
            sys.stderr.write(f"{error!r}\n")
        finally:
            os._exit(status)
    return pid


def children_of(pid):
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def await_child(pid):
    until = time.monotonic() + 5
    while not (found := children_of(pid)):
        assert time.monotonic() < until, "no child"
        time.sleep(0.005)
    return found[0]


class GovernorRun:
    """A process that is called governor-run, with an agent below it that waits; `serve` is what the former does.

    `outer_pid` is a process outside, whose child it is: kill that, and all of them are gone.
    """

    def __init__(self, container, serve, uid=None, name="governor-run", memcg=None):
        self._door = inside.door_to(container.pid, container.start_ticks)
        uid = self._door.remembered.uid if uid is None else uid

        def enter():
            inside.enter_all(self._door)
            inner = child(lambda: self._run(serve, uid, name))
            os.waitpid(inner, 0)

        def begin():
            if memcg:
                Path(memcg, "cgroup.procs").write_text(str(os.getpid()))
            enter()

        self.outer_pid = child(begin)
        self.pid = self.agent_pid = 0
        try:
            self.pid = await_child(self.outer_pid)
            self.agent_pid = await_child(self.pid)
        except BaseException:
            self.close()
            raise

    def _run(self, serve, uid, name):
        call_oneself(name)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        agent = child(lambda: (call_oneself("agent"), signal.pause()))
        try:
            serve()
        finally:
            os.kill(agent, signal.SIGKILL)

    def close(self):
        for pid in (self.agent_pid, self.pid, self.outer_pid):
            with suppress(ProcessLookupError):
                if pid:
                    os.kill(pid, signal.SIGKILL)
        os.waitpid(self.outer_pid, 0)
        self._door.close()
