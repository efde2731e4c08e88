"""`governor run`: the process that stays between a terminal (or pipes) and an agent, and keeps a guard beside it.

The command line becomes this process by exec. It reads, decides and protects nothing: `run_one` has the agent that
runs, and here is what comes after it: nothing, or the same session again. Imports what it needs of the standard
library only, without site-packages: it stays in the agent's container.
"""

from __future__ import annotations

import json
import os
import time

from governor import run_compact, run_resume, run_signals
from governor.run_agent import CannotStart
from governor.run_guard import Log
from governor.run_notice import Notices
from governor.run_one import One
from governor.run_options import Options
from governor.run_streams import fill_standard_streams, say
from governor.run_terminal import OuterTerminal


class Run:
    """One session: its agents, one after the other."""

    def __init__(self, options: Options) -> None:
        """Raises OSError where standard input is a terminal that is gone."""
        self._options = options
        self._terminal = OuterTerminal() if os.isatty(0) else None
        self._log = _log(options.log_path) if self._terminal and options.guard else None
        self._notices = Notices()
        self._resume_path = (options.guard or {}).get("resume_path", "")
        self._recycled: str | None = None  # the agent was recycled: "" compacted, else why not

    def run(self) -> int:
        """Until the agent has ended for good and what it wrote is passed on; the status to exit with."""
        wake_fd = run_signals.catch()
        command, tries = self._options.command, run_resume.Tries()
        kept = [command[place] for place in self._options.kept]
        run_resume.forget(self._resume_path)  # of an earlier process with our pid
        try:
            while True:
                tries.begin(time.monotonic_ns())
                one = One(self._options, self._terminal, self._log, self._notices, wake_fd)
                status = one.run(command, self._recycled)
                order = run_resume.take(self._resume_path, status)
                if order is None or one.is_last:
                    return status
                wait_ns = tries.wait_ns(time.monotonic_ns(), order.is_recycle)
                if wait_ns is None:
                    say(f"{order.why}. It was resumed {tries.failures} times and did not last: not again")
                    return status
                if not order.may_be_large and tries.failures == 1:
                    order = order._replace(compacting=[])
                how = "is compacted, and goes on" if order.compacting else "goes on"
                shown = " ".join(order.given(["..."] if kept else []).command)  # they may be long
                say(f"{order.why}. Its session {how} in {wait_ns / 1e9:.1f} s: {shown}")
                order = order.given(kept)
                goes_on = not one.is_told_to_end(wait_ns) and self._compact(order, wake_fd)
                one.reap()
                if not goes_on:
                    return status
                one.close()
                command = order.command
        except CannotStart as error:
            say(str(error))
            return error.status
        finally:
            self._close()

    def _compact(self, order: run_resume.Order, wake_fd: int) -> bool:
        """Compact the stopped session, where that is ordered; False when a signal came that ends us.

        One that could not be compacted goes on all the same, and the next guard hears why.
        """
        self._recycled = None
        if not order.compacting:
            return True
        options = self._options
        done = run_compact.compact(order, options.memcg, tuple(options.without), wake_fd, run_signals.ENDING)
        if done.ended_by:
            return False
        self._recycled = done.why_not if order.is_recycle else None
        if done.why_not:
            say(f"its session was not compacted, and goes on as it is: {done.why_not}")
        return True

    def _close(self) -> None:
        self._remove_memcg()
        run_resume.forget(self._resume_path)
        if self._log:
            self._log.close()

    def _remove_memcg(self) -> None:
        if self._options.memcg:
            from governor import run_memcg  # not while it would stay

            if not run_memcg.remove(self._options.memcg):
                say(f"{self._options.memcg} cannot be removed: something in it does not die")


def _log(path: str) -> Log | None:
    try:
        return Log(path)
    except OSError as error:
        say(f"no log at {path}: {error.strerror}; what the guard says is lost")
        return None


def main(arguments: list[str]) -> int:
    """Entry point: a JSON object with the other fields of Options, and the command, word for word."""
    fill_standard_streams()
    try:
        with open("/proc/self/comm", "w") as name:  # noqa: PTH123  a guard started by others looks for the agent below
            name.write("governor-run")
    except OSError:  # no /proc
        pass
    return Run(Options(arguments[1:], **json.loads(arguments[0]))).run()
