"""Guarded delivery: types a line, such as an agent's compact command, where it means what it says, nowhere else.

A command that is typed blindly answers dialogs, runs in shells and is glued to drafts. So: look first; put a draft
aside; type the text; look again that it, and nothing else, stands in the input; only then Enter; and believe it only
when its effect is seen. What cannot be done safely is deferred, with nothing typed, or with the text left where it is
and said so. Runs in a short-lived child: `start` makes it, and its exit status and output are the outcome.

Between the last look and Enter lie a few milliseconds in which a dialog may still open; nobody can close that gap.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from governor.actions.commands import signal_agent
from governor.channels.terminal import ChannelError, Terminal
from governor.children import Child, Deferred, fork
from governor.delivery_evidence import Evidence, Gone, before_text, stands
from governor.journal import printable
from governor.model import Status, Tier
from governor.policy import MS, SECOND
from governor.profile import Profile, WhileBusy
from governor.profile_agent import Agent, NoAgent, find_agent, is_in_our_namespaces
from governor.profile_state import Seen, State, is_frozen, look, shown
from governor.subtree import ancestors, read_stat

if TYPE_CHECKING:
    import socket

_REASON_LIMIT = 400
_STEP_S = 0.1  # between two looks
_STANDS_NS = 3 * SECOND  # for the text to come to stand in the input
_ARRIVES_NS = 15 * SECOND  # and while the input shows nothing of it: a slow agent has not read the keys yet
_STASH_NS = SECOND
_ROOM_NS = 5 * SECOND  # with less time than this nothing is begun
_END_NS = 500 * MS  # before the deadline: to say what was seen
_CPU_S = 30  # of a CPU, for a whole delivery
_BACKSPACE = b"\x7f"
_SHOWN_LIMIT = 60  # of the text, in a reason


@dataclass(frozen=True, slots=True)
class Outcome:
    """DELIVERED, DEFERRED (not now) or FAILED, and why: one printable line."""

    status: Status
    reason: str


def start(profile: Profile, tier: Tier, pid: int, channel: str, deadline_ns: int) -> Child:
    """Deliver in a child: exit status 0 delivered, 75 deferred, else failed; its output is the reason.

    `pid` is the agent or what started it; `channel` as in `open_terminal`, "" for none; `deadline_ns` on the
    monotonic clock. Raises OSError: no child.
    """

    def work() -> bytes:
        limit_cpu(_CPU_S)
        try:
            agent = find_agent(profile.match, pid)
            with alone_with(agent):
                outcome = deliver(profile, tier, agent, open_terminal(channel, agent), deadline_ns)
        except (NoAgent, ChannelError) as error:
            outcome = Outcome(Status.FAILED, str(error))
        return as_output(outcome)

    return fork(work, deadline_ns, f"{tier.value} by profile {profile.name}", is_delivery=True)


def limit_cpu(most_s: int) -> None:
    """What the agent writes decides how long it takes to look: no more of a CPU than this in all. For a child."""

    def over(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # it comes again each second, until SIGKILL
        raise ChannelError(f"its output took more than {most_s} s of CPU time")

    signal.signal(signal.SIGXCPU, over)
    resource.setrlimit(resource.RLIMIT_CPU, (most_s, most_s + 5))


def as_output(outcome: Outcome) -> bytes:
    """What a child that delivered prints; raises Deferred or ChannelError for its exit status."""
    reason = printable(outcome.reason)[:_REASON_LIMIT]
    if outcome.status is Status.DEFERRED:
        raise Deferred(reason)
    if outcome.status is not Status.DELIVERED:
        raise ChannelError(reason)
    return reason.encode()


def alone_with(agent: Agent) -> socket.socket:
    """While this is open nobody else of governor types for the agent, not even a child of a governor that was killed.

    A name in the abstract namespace: it goes with its process, and leaves no file. Raises Deferred where it is taken.
    """
    import socket  # only the child needs it

    taken = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        taken.bind(f"\0governor-types-{agent.pid}-{agent.start_ticks}")
    except OSError:
        taken.close()
        raise Deferred("nothing typed: something else is being typed for it") from None
    return taken


def open_terminal(channel: str, agent: Agent) -> Terminal | None:
    """The terminal that "tmux:SOCKET:TARGET" or "pty:CONTROL_SOCKET" names; None for "".

    Raises ChannelError for another text. Imports what it needs here: only the child needs it.
    """
    kind, _, where = channel.partition(":")
    if kind == "tmux" and ":" in where:
        from governor.channels.tmux import TmuxTerminal

        if not is_in_our_namespaces(agent.pid):
            raise ChannelError("the agent is in a container: its tmux is not reached from outside")
        stat = read_stat(agent.pid)
        socket, _, target = where.partition(":")
        return TmuxTerminal(socket, target, agent.uid, stat.terminal if stat else 0)
    if kind == "pty" and where:
        from governor.channels.pty import PtyTerminal

        return PtyTerminal(where, ancestors(agent.pid))
    if channel:
        raise ChannelError(f"found channel {channel!r}, expected tmux:SOCKET:TARGET or pty:CONTROL_SOCKET")
    return None


def deliver(profile: Profile, tier: Tier, agent: Agent, terminal: Terminal | None, deadline_ns: int) -> Outcome:
    """Bring the command of `tier` to the agent by what the profile knows: typed, or a signal."""
    if text := profile.text(tier):
        if terminal is None:
            return Outcome(Status.FAILED, f"{text} is to be typed, and no terminal is known")
        return _Typist(profile, text, agent, terminal, deadline_ns).deliver(partial(Evidence, profile, tier, agent))
    if name := profile.signal(tier):
        return _signal(name, agent)
    return Outcome(Status.FAILED, f"profile {profile.name} knows no way to {tier.value}")


def type_line(profile: Profile, text: str, agent: Agent, terminal: Terminal, deadline_ns: int) -> Outcome:
    """Say something to the agent as its user would: delivered once it stands in the input no more."""
    return _Typist(profile, text, agent, terminal, deadline_ns).deliver(lambda _: Gone(text))


def refusal(profile: Profile, seen: Seen) -> str:
    """Why nothing may be typed now; "" where it may."""
    if seen.state not in (State.IDLE, State.BUSY):
        return f"it is {seen.state.value}: {seen.why}"
    if seen.draft is None:
        return f"no input is on its screen ({seen.why})"
    if seen.state is State.BUSY and profile.type.while_busy is not WhileBusy.QUEUED:
        return f"it is busy, and a command would be {profile.type.while_busy.value}: {seen.why}"
    return ""


def _signal(name: str, agent: Agent) -> Outcome:
    try:
        pidfd = os.pidfd_open(agent.pid)
    except OSError:
        return Outcome(Status.FAILED, "the agent is gone")
    try:
        stat = read_stat(agent.pid)
        if stat is None or stat.start_ticks != agent.start_ticks:
            return Outcome(Status.FAILED, "the agent is gone")
        ended = signal_agent(pidfd, agent.pid, name)
    finally:
        os.close(pidfd)
    return Outcome(Status.DELIVERED, f"{name} sent") if ended.ok else Outcome(Status.FAILED, ended.output.decode())


class _Typist:
    """One delivery by typing; where it stands decides what an error of the terminal means."""

    def __init__(self, profile: Profile, text: str, agent: Agent, terminal: Terminal, deadline_ns: int) -> None:
        self._profile, self._text, self._agent, self._terminal = profile, text, agent, terminal
        self._deadline_ns = deadline_ns
        self._shown = text if len(text) <= _SHOWN_LIMIT else f"{text[:_SHOWN_LIMIT]}..."
        self._typed = self._entered = self._stashed = False

    def deliver(self, evidence_since: Callable[[Seen], Evidence | Gone]) -> Outcome:
        """`evidence_since` a look before anything was typed tells whether the text was accepted."""
        try:
            return self._deliver(evidence_since)
        except ChannelError as error:
            if self._entered:
                return Outcome(Status.FAILED, f"{self._shown} was sent, and then: {error}")
            if self._typed:  # and may be on its way: who types again soon types it twice
                return Outcome(Status.FAILED, f"{error}; {self._shown} may stand in its input{self._aside()}")
            return Outcome(Status.DEFERRED, f"{error}{self._aside()}")

    def _deliver(self, evidence_since: Callable[[Seen], Evidence | Gone]) -> Outcome:
        seen = self._look()
        if why := refusal(self._profile, seen):
            return Outcome(Status.DEFERRED, f"nothing typed: {why}")
        if self._deadline_ns - time.monotonic_ns() < _ROOM_NS + self._profile.type.pause_ns:
            return Outcome(Status.DEFERRED, "nothing typed: too little time is left to do it in")
        if seen.draft and not stands(seen.draft, self._text):
            outcome, seen = self._put_aside(seen)
            if outcome:
                return outcome
        evidence = evidence_since(seen)
        if not stands(seen.draft, self._text):  # else an earlier delivery had to leave it there
            self._typed, before = True, seen.draft
            with suppress(ChannelError):  # the keys may have arrived all the same: the look tells
                self._send(self._profile.type.before + self._text)
            self._until(lambda seen: seen.draft != before or not seen.open, _ARRIVES_NS)
        time.sleep(self._profile.type.pause_ns / SECOND)
        # The last look is the one right before Enter.
        seen = self._until(lambda seen: stands(seen.draft, self._text) or not seen.open, _STANDS_NS)
        why = refusal(self._profile, seen)
        if why or not stands(seen.draft, self._text):
            return self._leave_off(seen, why)
        self._entered = True
        self._send(self._profile.type.enter)
        self._stashed = self._stashed and not self._profile.type.stash_returns
        return self._confirm(evidence)

    def _put_aside(self, seen: Seen) -> tuple[Outcome | None, Seen]:
        """Empty the input of the user's draft; an outcome where that cannot be done."""
        keys, draft = self._profile.type.stash, seen.draft
        if not keys:
            return Outcome(Status.DEFERRED, f"nothing typed: a draft is in its input ({shown(draft or '')})"), seen
        self._send(keys)
        seen = self._until(lambda seen: seen.draft != draft or not seen.open, _STASH_NS)
        if seen.open and seen.draft not in ("", draft):  # there was none, and an older one came back instead
            self._send(keys)
            seen = self._until(lambda seen: seen.draft in ("", draft) or not seen.open, _STASH_NS)
        self._stashed = seen.draft == ""
        if why := refusal(self._profile, seen):
            return Outcome(Status.DEFERRED, f"no command typed: {why}{self._aside()}"), seen
        if seen.draft not in ("", draft):
            return Outcome(Status.DEFERRED, "no command typed: the draft in its input cannot be put aside"), seen
        return None, seen  # if it still shows, it may be a hint of an empty input: the look before Enter will tell

    def _leave_off(self, seen: Seen, why: str) -> Outcome:
        """Do not press Enter; take the text out again where nothing but the input can get the keys."""
        reason = why or f"its input shows {shown(seen.draft or '')} instead of {self._shown}"
        if seen.open and seen.draft and self._typed and (before := before_text(seen.draft, self._text)) is not None:
            for _ in self._text:
                self._terminal.type(_BACKSPACE)
            seen = self._until(lambda seen: before_text(seen.draft or "", "") == before or not seen.open, _STASH_NS)
            if seen.open and before_text(seen.draft or "", "") == before:
                self._typed = False
                self._bring_back(seen)
        left = f"; {self._shown} was typed and left there" if self._typed else "; the text was taken out again"
        # What was typed and is not seen may come yet: who types again soon types it twice.
        status = Status.FAILED if self._typed and not why else Status.DEFERRED
        return Outcome(status, f"Enter was not pressed: {reason}{left}{self._aside()}")

    def _confirm(self, evidence: Evidence | Gone) -> Outcome:
        """Wait for the effect; while the agent is frozen the time stands still."""
        left_ns = self._profile.confirm.within_ns
        queued, seen = False, None
        while left_ns > 0 and time.monotonic_ns() < self._deadline_ns - _END_NS:
            began_ns = time.monotonic_ns()
            time.sleep(_STEP_S)
            seen = self._look()
            if seen.state is State.STOPPED and read_stat(self._agent.pid) is None:
                return Outcome(Status.FAILED, f"{self._shown} was sent, and then {seen.why}{self._aside()}")
            verdict = evidence.judge(seen)
            if verdict.refused:
                self._bring_back(seen)
                return Outcome(Status.FAILED, f"{self._shown} was refused: {verdict.refused}{self._aside()}")
            if verdict.accepted:
                self._bring_back(self._until(lambda seen: seen.draft is not None, _STASH_NS))
                return Outcome(Status.DELIVERED, f"{self._shown}: {verdict.accepted}{self._aside()}")
            queued = verdict.queued
            passed_ns = time.monotonic_ns() - began_ns
            if is_frozen(self._agent.pid):
                self._deadline_ns += passed_ns
            else:
                left_ns -= passed_ns
        if queued:
            return Outcome(Status.DELIVERED, f"{self._shown} waits for the end of the turn{self._aside()}")
        last = f"it is {seen.state.value} ({seen.why}); its screen ends in {_end(seen.text)}" if seen else "no time"
        return Outcome(Status.FAILED, f"{self._shown} was sent, and nothing shows that it ran: {last}{self._aside()}")

    def _bring_back(self, seen: Seen) -> None:
        """Put the draft back into an empty input."""
        keys = self._profile.type.unstash
        if self._stashed and keys and seen.open and seen.draft == "":
            self._send(keys)
            self._stashed = False

    def _aside(self) -> str:
        return "; the draft is still put aside" if self._stashed else ""

    def _look(self) -> Seen:
        return look(self._profile, self._agent, self._terminal.screen())

    def _until(self, is_so: Callable[[Seen], bool], within_ns: int) -> Seen:
        """Look until it is so or time is up; the last look."""
        until_ns = min(time.monotonic_ns() + within_ns, self._deadline_ns - _END_NS)
        while not is_so(seen := self._look()) and time.monotonic_ns() < until_ns:
            time.sleep(_STEP_S)
        return seen

    def _send(self, keys: str) -> None:
        self._terminal.type(keys.encode())


def _end(text: str) -> str:
    """The last line of a screen that shows words."""
    lines = [line for line in text.split("\n") if any(char.isalnum() for char in line)]
    return shown(lines[-1]) if lines else "nothing"
