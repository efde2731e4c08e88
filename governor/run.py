"""`governor run`: the process that stays between a terminal (or pipes) and an agent, and keeps a guard beside it.

The command line becomes this process by exec. It reads, decides and protects nothing: it passes bytes, signals and
the exit status, waits for whatever is orphaned below it, and answers on the control socket. Imports what it needs of
the standard library only, without site-packages: it stays in the agent's container.
"""

from __future__ import annotations

import json
import os
import select
import signal
import time
from typing import Any, NamedTuple

from governor import run_compact, run_resume, run_start, subtree
from governor.run_agent import CannotStart
from governor.run_guard import GuardProcess, Log
from governor.run_notice import Notices
from governor.run_socket import ControlSocket
from governor.run_streams import fill_standard_streams, say
from governor.run_terminal import OuterTerminal, stop_own_group

_FORWARDED = (
    *(signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGWINCH, signal.SIGCONT, signal.SIGTSTP),
)
_REST_NS = 1_000_000_000  # what the agent leaves running has so long after SIGTERM
_GUARD_NS = 20_000_000_000  # and its guard, which may be writing an archive
_AFTER_FAULT_S = 0.1
_BACKGROUND_NS = 100_000_000  # how often to look whether it is over
_ENDING: set[int] = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT}
_LAST_READS = 64  # of 64 KiB: more than any pipe holds


class Options(NamedTuple):
    """What the command line found out; `guard` has the fields of loop.Guard and the names of its locks."""

    command: list[str]
    socket_path: str = ""  # "": no control socket
    log_path: str = ""  # of the guard, while the terminal is the agent's
    memcg: str = ""  # made for the agent, and removed at the end
    guard: dict[str, Any] | None = None
    grace_ns: int = 10_000_000_000
    without: list[str] = []  # noqa: RUF012  never changed; names that the agent's environment is not to have
    kept: list[int] = []  # noqa: RUF012  never changed; which words of the command a resumed agent is given again


class Run:
    """One agent, from its start to its end."""

    def __init__(self, options: Options) -> None:
        """Raises OSError where standard input is a terminal that is gone."""
        self._options = options
        self._terminal = OuterTerminal() if os.isatty(0) else None
        self._log = _log(options.log_path) if self._terminal and options.guard else None
        self._wake_fd = -1
        self._caught: set[int] = set()
        self._status: int | None = None  # the agent's, as a shell tells it
        self._kill_at_ns: int | None = None
        self._killed = False
        self._is_over = False  # somebody said so while nothing could be told: nothing comes back
        self._recycled: str | None = None  # the agent was recycled: "" compacted, else why not
        self._control: ControlSocket | None = None
        self._notices = Notices()

    def run(self) -> int:
        """Until the agent has ended for good and what it wrote is passed on; the status to exit with."""
        self._catch_signals()
        command, tries = self._options.command, run_resume.Tries()
        kept = [command[place] for place in self._options.kept]
        resume_path = (self._options.guard or {}).get("resume_path", "")
        run_resume.forget(resume_path)  # of an earlier process with our pid
        try:
            while True:
                tries.begin(time.monotonic_ns())
                status = self._run(command)
                order = run_resume.take(resume_path, status)
                if order is None or self._kill_at_ns is not None or self._is_over:
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
                if self._is_told_to_end(wait_ns) or not self._compact(order):
                    return status
                self._let_go()
                command = order.command
        except CannotStart as error:
            say(str(error))
            return error.status
        finally:
            self._close()

    def _compact(self, order: run_resume.Order) -> bool:
        """Compact the stopped session, where that is ordered; False when a signal came that ends us.

        One that could not be compacted goes on all the same, and the next guard hears why.
        """
        self._recycled = None
        if not order.compacting:
            return True
        options = self._options
        done = run_compact.compact(order, options.memcg, tuple(options.without), self._wake_fd, _ENDING)
        self._reap()
        if done.ended_by:
            return False
        self._recycled = done.why_not if order.is_recycle else None
        if done.why_not:
            say(f"its session was not compacted, and goes on as it is: {done.why_not}")
        return True

    def _run(self, command: list[str]) -> int:
        """One agent, from its start to its end; raises CannotStart."""
        options = self._options
        self._status, self._killed = None, False
        self._agent, self._streams = run_start.start(command, self._terminal, options.memcg, tuple(options.without))
        try:
            guard = options.guard and options.guard | {"recycled": self._recycled, "program": options.command[0]}
            self._guard = GuardProcess(guard, self._agent.pid, self._log)
            self._listen()
            while self._goes_on():
                try:
                    self._turn()
                except Exception as error:  # noqa: BLE001  a fault of ours must not end the agent's session
                    self._guard.say(f"{error!r} at line {_line(error)} of run.py: going on")
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
        self._caught |= self._read_signals() - {signal.SIGCONT}
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
            self._caught |= self._read_signals()
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
                _forget(given_fd)

    # Signals, and what has ended

    def _catch_signals(self) -> None:
        self._wake_fd, write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        for number in (*_FORWARDED, signal.SIGCHLD):
            if number == signal.SIGCHLD or signal.getsignal(number) != signal.SIG_IGN:  # as nohup leaves SIGHUP
                signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])

    def _read_signals(self) -> set[int]:
        try:
            return set(os.read(self._wake_fd, 4096))
        except BlockingIOError:
            return set()

    def _on_signals(self) -> None:
        caught, self._caught = self._caught, set()
        if signal.SIGCHLD in caught:
            self._reap()
        for number in _FORWARDED:
            if number in caught:
                self._on_signal(number)

    def _on_signal(self, number: int) -> None:
        agent = self._agent
        if self._status is not None:  # nobody takes the rest of its output
            if number in _ENDING:
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

    def _reap(self) -> None:
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
        self._reap()

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

    def _is_told_to_end(self, wait_ns: int) -> bool:
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
        ends = bool(self._read_signals() & _ENDING)
        if ends:
            self._is_over = True
            self._guard.stop()
        self._reap()
        if self._log:
            self._log.drain()
        return ends

    def _let_go(self) -> None:
        """The ends of an agent's streams that are ours, before another one gets its own."""
        for flow in (self._streams.inward, self._streams.outward):
            flow.close()
        os.close(self._streams.master)
        os.close(self._agent.pidfd)
        if self._agent.stops_fd >= 0:
            os.close(self._agent.stops_fd)

    def _close(self) -> None:
        self._remove_memcg()
        run_resume.forget((self._options.guard or {}).get("resume_path", ""))
        if self._log:
            self._log.close()

    def _remove_memcg(self) -> None:
        if self._options.memcg:
            from governor import run_memcg  # not while it would stay

            if not run_memcg.remove(self._options.memcg):
                say(f"{self._options.memcg} cannot be removed: something in it does not die")

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


def _log(path: str) -> Log | None:
    try:
        return Log(path)
    except OSError as error:
        say(f"no log at {path}: {error.strerror}; what the guard says is lost")
        return None


def _forget(fd: int) -> None:
    """A standard stream that has ended: whoever is at its other side is to see that."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    os.dup2(null, fd)
    os.close(null)


def main(arguments: list[str]) -> int:
    """Entry point: a JSON object with the other fields of Options, and the command, word for word."""
    fill_standard_streams()
    try:
        with open("/proc/self/comm", "w") as name:  # noqa: PTH123  a guard started by others looks for the agent below
            name.write("governor-run")
    except OSError:  # no /proc
        pass
    return Run(Options(arguments[1:], **json.loads(arguments[0]))).run()
