"""One agent that `governor run` started, from its start to its end, with its guard beside it.

Passes bytes, signals and the control socket's requests; waits for whatever is orphaned below it; ends what is left.
"""

from __future__ import annotations

import os
import select
import signal
import time

from governor import run_signals, run_start, subtree
from governor.run_guard import GuardProcess, Log
from governor.run_notice import Notices
from governor.run_options import Options
from governor.run_signals import ENDING, FORWARDED
from governor.run_socket import ControlSocket
from governor.run_streams import end_standard_stream, say
from governor.run_terminal import OuterTerminal, stop_own_group

_REST_NS = 1_000_000_000  # what the agent leaves running has so long after SIGTERM
_GUARD_NS = 20_000_000_000  # and its guard, which may be writing an archive
_AFTER_FAULT_S = 0.1
_BACKGROUND_NS = 100_000_000  # how often to look whether it is over
_LAST_READS = 64  # of 64 KiB: more than any pipe holds


class One:
    """Its process, its streams, its guard and its control socket."""

    def __init__(
        self, options: Options, terminal: OuterTerminal | None, log: Log | None, notices: Notices, wake_fd: int
    ) -> None:
        """Nothing is started yet; `wake_fd` is where signals are read from."""
        self._options, self._terminal, self._log, self._notices = options, terminal, log, notices
        self._wake_fd = wake_fd
        self._caught: set[int] = set()
        self._status: int | None = None  # the agent's, as a shell tells it
        self._kill_at_ns: int | None = None
        self._killed = False
        self._is_over = False  # somebody said so while nothing could be told: nothing comes back
        self._control: ControlSocket | None = None

    @property
    def is_last(self) -> bool:
        """Whether somebody has said that this is the end."""
        return self._kill_at_ns is not None or self._is_over or bool(self._caught & ENDING)

    def run(self, command: list[str], recycled: str | None) -> int:
        """The status that it ended with; raises CannotStart.

        `recycled` is for its guard: "" if the agent before it was compacted for this one, why not, or None.
        """
        options = self._options
        self._agent, self._streams = run_start.start(command, self._terminal, options.memcg, tuple(options.without))
        try:
            guard = options.guard and options.guard | {"recycled": recycled, "program": options.command[0]}
            self._guard = GuardProcess(guard, self._agent.pid, self._log)
            self._listen()
            while self._goes_on():
                try:
                    self._turn()
                except Exception as error:  # noqa: BLE001  a fault of ours must not end the agent's session
                    self._guard.say(f"{error!r} at line {_line(error)} of run_one.py: going on")
                    time.sleep(_AFTER_FAULT_S)
        finally:
            self._notices.end(self._streams.outward)
            if self._terminal:
                self._terminal.leave()
        if self._ends_the_rest():
            self._end_the_rest()
            self._pass_the_last()
        elif not self._terminal:
            self._streams.outward.leave_behind()
        self._end_governor()
        assert self._status is not None
        return self._status

    # The agent

    def _on_stopped(self) -> None:
        """It stopped itself: the shell above gets its terminal back, until it lets this job go on."""
        stat = subtree.read_stat(self._agent.pid)
        if not self._terminal or not stat or stat.state != "T" or self._held_by_governor():
            return
        self._read_the_last()
        self._terminal.leave()
        stop_own_group()
        self._caught |= run_signals.read(self._wake_fd) - {signal.SIGCONT}
        self._on_signal(signal.SIGCONT)

    def _held_by_governor(self) -> bool:
        if not self._options.guard:
            return False
        from governor import brake  # not before something was stopped

        try:
            return brake.is_stopped_by_governor(self._options.guard["knob_path"], self._agent.pid)
        except OSError:
            return False

    # The loop

    def _goes_on(self) -> bool:
        if self._status is None:
            return True
        now_ns, outward = time.monotonic_ns(), self._streams.outward
        if not outward.sink or not outward.waiting_bytes or now_ns >= (self._kill_at_ns or now_ns + 1):
            return False
        return self._terminal is None or outward.stalled_in_ns(now_ns) != 0

    def _turn(self) -> None:
        now_ns = time.monotonic_ns()
        if self._status is None:
            self._guard.keep(now_ns)
            if self._kill_at_ns is not None and now_ns >= self._kill_at_ns and not self._killed:
                self._killed = True
                for stat in self._rest():
                    subtree.send(stat.pid, stat.start_ticks, signal.SIGKILL)
        if self._terminal and self._status is None:
            self._terminal.take()  # a shell does not tell a job that runs that it is in the foreground now
        if self._control:
            self._control.drop_slow(now_ns)
        poller = select.poll()
        for fd, events in self._wanted(now_ns).items():
            poller.register(fd, events)
        for fd, events in poller.poll(self._wait_ms(now_ns)):
            self._on_ready(fd, events)
        if self._caught:
            self._on_signals()
        self._after_loss()
        self._notices.turn(self._streams.outward, now_ns)
        if not self._terminal:
            self._pass_ends_on()

    def _wanted(self, now_ns: int) -> dict[int, int]:
        wanted = {self._wake_fd: select.POLLIN}
        for flow in (self._streams.inward, self._streams.outward):
            for fd, events in flow.wants(now_ns).items():
                wanted[fd] = wanted.get(fd, 0) | events
        if self._terminal and not self._terminal.is_raw:
            wanted.pop(0, None)  # in the background; to read would stop us
        if self._agent.stops_fd >= 0 and self._status is None:
            wanted[self._agent.stops_fd] = select.POLLIN
        if self._log:
            wanted[self._log.read_fd] = select.POLLIN
        if self._control:
            wanted |= self._control.wants()
        return wanted

    def _wait_ms(self, now_ns: int) -> float | None:
        dues = [self._control.due_ns() if self._control else None, self._notices.due_ns()]
        if self._status is None:
            dues.append(self._guard.due_ns())
        if not self._killed:
            dues.append(self._kill_at_ns)
        if self._terminal and not self._terminal.is_raw:
            dues.append(now_ns + _BACKGROUND_NS)
        outward = self._streams.outward
        if self._terminal and (left_ns := outward.stalled_in_ns(now_ns)):
            dues.append(now_ns + left_ns)
        waits = [max(0, due_ns - now_ns) for due_ns in dues if due_ns is not None]
        return min(waits) / 1e6 + 1 if waits else None

    def _on_ready(self, fd: int, events: int) -> None:
        if fd == self._wake_fd:
            self._caught |= run_signals.read(self._wake_fd)
            return
        if fd == self._agent.stops_fd:
            if os.read(fd, 64):
                self._on_stopped()
            else:  # the keeper has ended, with the agent or before it
                os.close(fd)
                self._agent = self._agent._replace(stops_fd=-1)
            return
        if self._log and fd == self._log.read_fd:
            self._log.drain()
            return
        for flow in (self._streams.inward, self._streams.outward):
            flow.on_ready(fd, events)
        if self._control:
            self._control.on_ready(fd)

    def _after_loss(self) -> None:
        """A terminal that takes output again has missed some: let whoever has the agent's terminal draw it anew."""
        outward = self._streams.outward
        if outward.lost and not outward.waiting_bytes:
            outward.lost = False
            try:
                os.killpg(os.tcgetpgrp(self._streams.master), signal.SIGWINCH)
            except OSError:
                return

    def _pass_ends_on(self) -> None:
        """The end of a pipe, on either side, becomes one on the other."""
        for given_fd, flow in ((0, self._streams.inward), (1, self._streams.outward)):
            if flow.is_over:
                flow.close()
                end_standard_stream(given_fd)

    # Signals, and what has ended

    def _on_signals(self) -> None:
        caught, self._caught = self._caught, set()
        if signal.SIGCHLD in caught:
            self.reap()
        for number in FORWARDED:
            if number in caught:
                self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        agent = self._agent
        if self._status is not None:  # nobody takes the rest of its output
            if number in ENDING:
                self._kill_at_ns = time.monotonic_ns()
        elif number == signal.SIGWINCH and self._terminal:
            self._terminal.pass_size(self._streams.master)
        elif number == signal.SIGCONT:
            if self._terminal:
                self._terminal.is_raw = False  # whoever had it meanwhile may have set it
                self._terminal.pass_size(self._streams.master)
            if not self._held_by_governor():
                agent.go_on()
        elif number == signal.SIGTSTP and not self._terminal:
            agent.send(signal.SIGSTOP)  # its process group is an orphaned one: the kernel would discard SIGTSTP
            stop_own_group()
        else:
            agent.send(number)
            if number == signal.SIGTERM:
                self._asked_to_end()
            if number == signal.SIGHUP:  # its terminal is gone: there is nobody to go on for
                self._is_over = True

    def _asked_to_end(self) -> None:
        if self._kill_at_ns is None:
            self._kill_at_ns = time.monotonic_ns() + self._options.grace_ns
        stat = subtree.read_stat(self._agent.pid)
        if stat and stat.state == "T" and not self._held_by_governor():
            self._agent.go_on()

    def reap(self) -> None:
        """Wait for everything that has ended: the agent, its guard, and what was orphaned below us."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if os.WIFSTOPPED(status):
                if pid == self._agent.pid:
                    self._on_stopped()
                continue
            code = os.waitstatus_to_exitcode(status)
            if pid == self._agent.pid:
                self._status = code if code >= 0 else 128 - code
                self._read_the_last()
            elif pid == self._guard.pid:
                self._guard.ended(code, time.monotonic_ns())

    def _read_the_last(self) -> None:
        """What the agent had written when it ended; not what others may write for ever."""
        outward = self._streams.outward
        for _ in range(_LAST_READS):
            if not outward.fill():
                return

    def _pass_the_last(self) -> None:
        """To a reader of a pipe, what was written while it was ended; a terminal has its modes back by now."""
        if not self._terminal:
            self._read_the_last()
            while self._goes_on():
                self._turn()

    def _rest(self) -> list[subtree.Stat]:
        """What lives of the agent's tree: all that descends from us, but for its guard and that one's children."""
        found = subtree.descendants(os.getpid(), self._guard.pid)
        return [stat for stat in found if not stat.ended]

    def _ends_the_rest(self) -> bool:
        """What the agent left running goes on, unless we were told to end, or its container or memcg ends with us."""
        return os.getpid() == 1 or bool(self._options.memcg) or self._kill_at_ns is not None

    def _end_the_rest(self) -> None:
        for number in (signal.SIGTERM, signal.SIGKILL):
            rest = self._rest()
            for stat in rest:
                subtree.send(stat.pid, stat.start_ticks, number)
                subtree.send(stat.pid, stat.start_ticks, signal.SIGCONT)
            until_ns = time.monotonic_ns() + _REST_NS
            while self._rest() and time.monotonic_ns() < until_ns:
                self._await_children(50)
        self.reap()

    def _end_governor(self) -> None:
        self._guard.stop()
        began_ns = time.monotonic_ns()
        was_said = False
        while self._guard.pid:
            waited_ns = time.monotonic_ns() - began_ns
            if waited_ns >= _REST_NS and not was_said:
                say("the guard finishes its archive; Ctrl-C or SIGTERM: do not wait for that")
                was_said = True
            if waited_ns >= _GUARD_NS:
                os.kill(self._guard.pid, signal.SIGKILL)
            self._await_children(100)
        if self._control:
            self._control.close()
            self._control = None
        if self._guard.trouble and self._log:  # said there, but to nobody yet
            say(f"{self._guard.trouble}; see {self._log.path}")

    def is_told_to_end(self, wait_ns: int) -> bool:
        """Wait for so long; whether somebody said meanwhile that this is the end."""
        until_ns = time.monotonic_ns() + wait_ns
        while (left_ns := until_ns - time.monotonic_ns()) > 0:
            if self._await_children(left_ns // 1_000_000 + 1):
                return True
        return False

    def _await_children(self, for_ms: int) -> bool:
        """Reap for a while; whether a signal came that ends us."""
        poller = select.poll()
        poller.register(self._wake_fd, select.POLLIN)
        for fd, events in (self._control.wants() if self._control else {}).items():
            poller.register(fd, events)
        for fd, _ in poller.poll(for_ms):
            if self._control:  # its guard has something to say of the end
                self._control.on_ready(fd)
        ends = bool(run_signals.read(self._wake_fd) & ENDING)
        if ends:
            self._is_over = True
            self._guard.stop()
        self.reap()
        if self._log:
            self._log.drain()
        return ends

    def close(self) -> None:
        """The ends of its streams that are ours, before another one gets its own."""
        for flow in (self._streams.inward, self._streams.outward):
            flow.close()
        for fd in (self._streams.master, self._agent.pidfd, self._agent.stops_fd):
            if fd >= 0:
                os.close(fd)

    # The control socket

    def _listen(self) -> None:
        if self._options.socket_path:
            try:
                self._control = ControlSocket(self._options.socket_path, self._shown, self._type, self._warn)
            except OSError as error:
                self._guard.say(f"no control socket at {self._options.socket_path}: {error.strerror}")

    def _shown(self) -> tuple[int, int, int, bytes]:
        rows, columns = self._terminal.size() if self._terminal else (0, 0)
        return rows, columns, self._agent.pid, bytes(self._streams.outward.tail)

    def _type(self, keys: bytes) -> str:
        inward = self._streams.inward
        if self._status is not None:
            return "the agent has ended"
        if not inward.sink:
            return "the agent's standard input is closed"
        if inward.waiting_bytes:
            return "the agent does not read its input: something typed before is still waiting"
        inward.put(keys)
        return ""

    def _warn(self, text: str) -> None:
        """To the user: beside what the agent draws while it does, else on a line of its own."""
        if self._terminal and self._status is None:
            self._notices.put(text)
        else:
            say(text.removeprefix("governor: "))


def _line(error: Exception) -> int:
    trace = error.__traceback__
    while trace and trace.tb_next and trace.tb_next.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return trace.tb_lineno if trace else 0
