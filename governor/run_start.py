"""Starts an agent with streams of its own: all that `governor run` keeps of it, so that it can be started again."""

from __future__ import annotations

import os
from typing import NamedTuple

from governor import run_agent
from governor.run_agent import Agent, CannotStart
from governor.run_streams import Flow, Sink
from governor.run_terminal import OuterTerminal


class Streams(NamedTuple):
    """What an agent's standard streams are connected to; `master`: our end of its terminal, -1 without one."""

    inward: Flow
    outward: Flow
    master: int = -1


def start(
    command: list[str], terminal: OuterTerminal | None, memcg: str, without: tuple[str, ...]
) -> tuple[Agent, Streams]:
    """Start the command at a terminal like ours, or with pipes; see run_agent.start(). Raises CannotStart."""
    try:
        if terminal:
            return _at_terminal(command, terminal, memcg, without)
        return _with_pipes(command, memcg, without)
    except OSError as error:
        raise CannotStart(1, f"the agent cannot be started: {error}") from None


def _at_terminal(
    command: list[str], terminal: OuterTerminal, memcg: str, without: tuple[str, ...]
) -> tuple[Agent, Streams]:
    master, slave = terminal.make_inner()
    # Output that goes to a file or a pipe goes there, and not through a terminal's line discipline.
    out, err = (slave if os.isatty(fd) else fd for fd in (1, 2))
    has_shell = os.getpid() not in (1, os.getsid(0))
    agent = run_agent.start(command, (slave, out, err), slave, has_shell, memcg, without)
    # The agent's end stays open here: its last output can be read, and it may close and open its own.
    inward = Flow(0, Sink(os.dup(master), is_ours=True))
    outward = Flow(os.dup(master), Sink(1 if os.isatty(1) else 0), keeps_tail=True, lossy=True)
    return agent, Streams(inward, outward, master)


def _with_pipes(command: list[str], memcg: str, without: tuple[str, ...]) -> tuple[Agent, Streams]:
    in_read, in_write = os.pipe2(os.O_CLOEXEC)
    out_read, out_write = os.pipe2(os.O_CLOEXEC)
    agent = run_agent.start(command, (in_read, out_write, 2), memcg=memcg, without=without)
    os.close(in_read)
    os.close(out_write)
    os.set_blocking(out_read, False)
    return agent, Streams(Flow(0, Sink(in_write, is_ours=True)), Flow(out_read, Sink(1), keeps_tail=True))
