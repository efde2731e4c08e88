"""Recycle: an idle agent ends by SIGTERM, and `governor run` compacts its stopped session and takes it up again.

Carries out, decides nothing: the ladder asks for a look (`prepare`), and with a fresh sample for the end (`restart`).
Nothing is typed and nobody is killed: what is not idle, or has a draft in its input, is left alone and looked at
later; an agent that does not end within the grace stays. The session is archived before, so that nothing is lost.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

from governor import model, resume
from governor.agent_process import AgentProcess
from governor.channels.terminal import ChannelError
from governor.children import Child, Children, Deferred, Ended, fork
from governor.delivery import open_terminal
from governor.journal import Note, printable
from governor.limits import Limits
from governor.model import Status
from governor.policy import Policy
from governor.profile import Profile
from governor.profile_agent import Agent, find_agent
from governor.profile_state import Seen, State, look, read_state_file, shown
from governor.session_files import find, parse_pattern

_REASON_LIMIT = 400


def refusal(profile: Profile, agent: Agent, seen: Seen) -> str:
    """Why an agent may not be recycled now; "" where it may."""
    if seen.state is not State.IDLE:
        return f"it is {seen.state.value}: {seen.why}"
    if profile.screen.prompt and seen.draft is None:
        return "no input is on its screen"
    if seen.draft:
        return f"a draft is in its input ({shown(seen.draft)})"
    if not seen.session:
        return "its session is not known"
    transcript = profile.confirm.transcript.replace("{session}", seen.session)
    return "nothing of its session is written yet" if transcript and not _is_there(transcript, agent.home) else ""


def _is_there(glob: str, home: str) -> bool:
    for found in find([parse_pattern(glob, home)]):
        if found.fd is not None:
            os.close(found.fd)
            return True
    return False


@dataclass(slots=True)
class Recycle:
    """Of the agent of one governed memcg; `feed` hands an event to the ladder, `answered` what became of it."""

    agent: AgentProcess
    children: Children
    limits: Limits
    note: Note
    feed: Callable[[model.Event], None]
    answered: Callable[[Status, str], None]
    agent_bytes: Callable[[], int]  # what the agent and what descends from it hold
    profile: Profile | None
    channel: str  # as delivery.open_terminal has it
    program: str  # the agent's, as governor run was given it
    resume_path: str  # where governor run looks for what to start after the agent's end; "": nobody does
    _until_ns: int | None = None  # of the grace, while an agent is awaited that was asked to end

    @property
    def possible(self) -> bool:
        """Whether somebody takes orders and hears of the agent's end, and the profile knows what to order.

        governor run hears of the end of what it started: a shell above the agent goes on.
        """
        session = self.profile.session if self.profile else None
        is_heard = self.resume_path and self.agent.ends_all
        return bool(is_heard and session and session.compact_stopped and session.resume)

    def prepare(self, within_ns: int, archive: Callable[[Callable[[bool], None]], None]) -> None:
        """Find out whether it is idle, archive, look again: then it is ready. `archive` tells whether it did."""
        deadline_ns = time.monotonic_ns() + within_ns

        def archived(is_well: bool) -> None:
            if is_well:
                self._look(deadline_ns, self._ready)
            else:
                self.answered(Status.FAILED, "its session could not be archived")

        self._look(deadline_ns, lambda: archive(archived))

    def restart(self, reason: str, policy: Policy) -> None:
        """Order what follows, then SIGTERM."""
        profile, agent = self.profile, self.agent.known
        if not profile or not agent:
            self.answered(Status.FAILED, "the agent is gone")
            return
        state = read_state_file(profile.state_file, agent).state
        if state in (State.BUSY, State.WAITING):  # since it was looked at
            self.answered(Status.DEFERRED, f"it is {state.value} now")
            return
        try:
            is_ordered = resume.order_session(
                self.resume_path, resume.RECYCLED, reason, profile, agent, self.program, policy.recycle.compacting_ns
            )
        except OSError as error:
            self.answered(Status.FAILED, f"it would not be resumed: {error}")
            return
        if not is_ordered:
            self.answered(Status.FAILED, "its session is not known any more, or its program is not in PATH")
            return
        self.note("recycling", f"SIGTERM to the agent (process {self.agent.pid}), to go on compacted: {reason}")
        if self.agent.ask_to_end():
            self._until_ns = time.monotonic_ns() + policy.terminate.grace_ns
        else:
            resume.withdraw(self.resume_path)
            self.answered(Status.FAILED, "the agent is gone")

    def check_deadline(self, now_ns: int) -> None:
        """An agent that does not end is left alone."""
        if self._until_ns is not None and now_ns >= self._until_ns:
            self.let_be()
            self.answered(Status.FAILED, "the agent has not ended after SIGTERM")

    def prolong(self, by_ns: int) -> None:
        """The target was frozen for so long: the grace stood still."""
        if self._until_ns is not None:
            self._until_ns += by_ns

    @property
    def awaits_end(self) -> bool:
        """Whether the agent was asked to end, and an order says what follows."""
        return self._until_ns is not None

    def let_be(self) -> None:
        """Await the agent's end no longer: only one by SIGTERM, however late, is followed by what was ordered."""
        self._until_ns = None
        if self.resume_path:
            resume.loosen(self.resume_path)

    def leave(self) -> None:
        """The agent has ended, or others see to that: governor run does the rest, and tells the next guard."""
        self._until_ns = None

    def _look(self, deadline_ns: int, go_on: Callable[[], None]) -> None:
        profile = self.profile
        if not profile:
            self.answered(Status.FAILED, "no profile says how")
            return

        def on_end(ended: Ended) -> None:
            if ended.ok:
                go_on()
            elif ended.deferred:
                self.answered(Status.DEFERRED, ended.output.decode(errors="replace"))
            else:
                self.answered(Status.FAILED, ended.why)

        self.children.attempt(lambda: _start_look(profile, self.agent.pid, self.channel, deadline_ns), on_end)

    def _ready(self) -> None:
        state = self.limits.memory_state(time.monotonic_ns())
        self.feed(model.Ready(state, self.agent_bytes()))


def look_at(profile: Profile, agent: Agent, channel: str) -> Seen:
    """Everything that can be seen of it; raises ChannelError."""
    terminal = open_terminal(channel, agent)
    return look(profile, agent, terminal.screen() if terminal else None)


def _start_look(profile: Profile, pid: int, channel: str, deadline_ns: int) -> Child:
    def work() -> bytes:
        try:
            agent = find_agent(profile.match, pid)
            why = refusal(profile, agent, look_at(profile, agent, channel))
        except ChannelError as error:
            why = str(error)
        if why:
            raise Deferred(printable(why)[:_REASON_LIMIT])
        return b""

    return fork(work, deadline_ns, f"a look at the agent by profile {profile.name}", is_delivery=True)
