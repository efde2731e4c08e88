"""Compacts the session of an agent that has ended, before `governor run` takes it up again.

Runs as the agent does, in its memcg and with its environment, but with no terminal and no input; bounded in time and
output.
"""

from __future__ import annotations

import os
import re
import select
import signal
import time
from typing import NamedTuple

from governor import run_agent
from governor.run_agent import Agent, CannotStart
from governor.run_resume import Order

_TAIL_BYTES = 16 << 10
_SHOWN_LIMIT = 200
_LAST_NS = 2_000_000_000  # from SIGTERM to SIGKILL


class Compacted(NamedTuple):
    """`why_not` is "" where it was done; `ended_by` is the signal that ends us all, 0 for none."""

    why_not: str
    ended_by: int = 0


def compact(order: Order, memcg: str, without: tuple[str, ...], wake_fd: int, ending: set[int]) -> Compacted:
    """Run it; `memcg` and `without` as for run_agent.start(). `wake_fd` tells signals by their numbers."""
    read_fd, write_fd = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    try:
        agent = run_agent.start(order.compacting, (null, write_fd, write_fd), memcg=memcg, without=without)
    except (CannotStart, OSError) as error:  # no process, or no memory for one
        os.close(read_fd)
        return Compacted(str(error))
    finally:
        os.close(null)
        os.close(write_fd)
    try:
        return _await(agent, order, read_fd, wake_fd, ending)
    finally:
        os.close(agent.pidfd)
        os.close(read_fd)


def _await(agent: Agent, order: Order, read_fd: int, wake_fd: int, ending: set[int]) -> Compacted:
    until_ns, ended_by, tail, is_late = time.monotonic_ns() + int(order.within_s * 1e9), 0, b"", False
    poller = select.poll()
    for fd in (agent.pidfd, read_fd, wake_fd):
        poller.register(fd, select.POLLIN)
    while not select.select([agent.pidfd], [], [], 0)[0]:
        left_ns = until_ns - time.monotonic_ns()
        if left_ns <= 0 and is_late:
            until_ns += _LAST_NS
            os.killpg(agent.pid, signal.SIGKILL)
        elif left_ns <= 0:
            until_ns, is_late = time.monotonic_ns() + _LAST_NS, True
            agent.send(signal.SIGTERM)
        for fd, events in poller.poll(max(0, left_ns) // 1_000_000 + 1):
            if fd == wake_fd:
                told = set(os.read(wake_fd, 4096)) & ending
                if told and not ended_by:
                    ended_by, until_ns, is_late = told.pop(), time.monotonic_ns() + _LAST_NS, True
                    agent.send(signal.SIGTERM)
            elif fd == read_fd:
                if events & select.POLLIN:
                    tail = (tail + _read(read_fd))[-_TAIL_BYTES:]
                else:  # its end
                    poller.unregister(read_fd)
    _, status = os.waitpid(agent.pid, 0)
    code = os.waitstatus_to_exitcode(status)
    name, output = order.compacting[0], (tail + _read(read_fd))[-_TAIL_BYTES:].decode(errors="replace")
    if is_late:
        return Compacted(f"{name} took longer than {order.within_s:g} s", ended_by)
    if code:
        return Compacted(f"{name} ended with status {code}: {_shown(output[-_SHOWN_LIMIT:])}")
    refused = next((match for each in order.refused if (match := re.search(each, output, re.MULTILINE))), None)
    return Compacted(f"{name} said: {_shown(output[refused.start() :])}" if refused else "")


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, 65536)
    except BlockingIOError:
        return b""


def _shown(output: str) -> str:
    """What it said, on one line of bounded length, with nothing in it that could steer a terminal."""
    text = " ".join(output[:_SHOWN_LIMIT].split())
    return "".join(char if char.isprintable() else "?" for char in text)
