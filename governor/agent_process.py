"""The process that is protected: found, watched through a pidfd, and where its session files are."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace

from governor import inside, subtree
from governor.actions import processes
from governor.agent_look import AgentLook
from governor.policy import SECOND
from governor.profile import Match
from governor.profile_agent import Agent, NoAgent, find_agent, fits, lives_elsewhere
from governor.session_files import Pattern, home_of, home_of_user, parse_pattern

_STARTING_S = 10.0
_READ_AT_ONCE = 1000  # processes: some 20 ms
_LOOK_AGAIN_NS = 5 * SECOND
_SETTLED_NS = 8 * SECOND  # until its HOME is read, for after its end: most that come and go have gone by then


class AgentProcess:
    """The agent of one memcg; pid 0 and pidfd -1 while there is none."""

    def __init__(
        self,
        cgroup: str,
        wanted_pid: int = 0,
        is_within: bool = False,
        match: Match | None = None,
        only_wanted: bool = False,
        lives_elsewhere: bool = False,
        has_own_mounts: bool = False,
        look: AgentLook | None = None,
    ) -> None:
        """`is_within`: governor itself is in that memcg, and not its agent. `match`: which of that tree it is.

        `only_wanted`: after `wanted_pid` nobody else of the memcg is taken for the agent. `lives_elsewhere`: until it
        is found nothing is looked up here in its name. `has_own_mounts`: nor while it is among the mounts or
        at the root of the machine, as a runtime is that has not made its container yet. `look`: how arguments and
        environment are read of who lives elsewhere.
        """
        self._is_container, self._look = lives_elsewhere, look
        self._only_wanted = only_wanted
        self._cgroup, self._is_within = cgroup, is_within
        self._wanted_pid = wanted_pid
        self._match = match
        self.pid = self.start_ticks = 0
        self.pidfd = -1
        self._home = "/"
        self._door: inside.Door | None = None  # to where it lives, if that is elsewhere
        self._has_own_mounts = has_own_mounts
        self.lives_elsewhere = lives_elsewhere  # kept until the next is found: its paths are not ours
        self.uids: frozenset[int] = frozenset()  # who it runs as
        self.known: Agent | None = None  # what a profile found
        self.ends_all = False  # whether what was started in its place ends with it
        self._looked_ns = 0
        self._followed_first_ns = self._follow_ns = 0
        self._below: dict[int, tuple[int, str, bool]] = {}  # who descends from a stand-in, as last read
        self._last_read_pid = 0  # where not all are read each time
        self._patterns: dict[tuple[str, ...], list[Pattern]] = {}

    def find(self) -> bool:
        """Look for it unless it is known; True when it was found just now."""
        if self.pidfd >= 0 or (self._look and self._look.is_waiting):
            return False
        pid = self._wanted_pid if self._only_wanted else self._wanted_pid or self._leading_pid()
        if not pid:
            self.known = None
            return False
        is_cheap = not self._needs_child(pid)
        if is_cheap or self._is_asking or self._has_news(pid) or not self._may_still_come(pid):
            self.known = self._meant(pid)
        if self._is_asking or self._may_still_come(pid):
            return False
        found = subtree.read_stat(self.known.pid if self.known else pid)
        if not found or found.ended or (self.known and self.known.start_ticks != found.start_ticks):
            if not self._only_wanted:
                self._wanted_pid = 0  # it ended: whoever leads the memcg from now on
            return False
        try:
            self.pidfd = os.pidfd_open(found.pid)
        except OSError:
            return False
        self.pid, self.start_ticks = found.pid, found.start_ticks
        try:
            self._open_door(self._has_own_mounts)
        except ProcessLookupError:
            self.let_go()
            return False
        if not self.lives_elsewhere:  # a path of a container is not to be looked up here
            own = home_of_user if self._is_container else home_of
            self._home = self.known.home if self.known else own(self.pid)
        self.ends_all = not self.lives_elsewhere and self._ends_all()
        return True

    def way_in(self) -> inside.Door | None:
        """The door to where it lives by now, if that is elsewhere; once it has ended, to where it was seen last.

        It moves: the init of a container is there before the container's mounts are.
        """
        if self.pidfd >= 0 and not (self._door and inside.leads_there(self._door)):
            with suppress(ProcessLookupError):
                self._open_door(self.lives_elsewhere)
        return self._door

    def follow(self, now_ns: int) -> None:
        """See where it lives by now, for what it leaves behind: soon, then ever more seldom."""
        if self.pidfd >= 0 and now_ns >= self._follow_ns:
            self._followed_first_ns = self._followed_first_ns or now_ns
            self._follow_ns = now_ns + max(SECOND, now_ns - self._followed_first_ns)
            door = self.way_in()
            if door and self._look and now_ns - self._followed_first_ns >= _SETTLED_NS:
                self._look.home(door, lambda home: self._remember(door, home))

    def _remember(self, door: inside.Door, home: str) -> None:
        if self._door is door:
            self._door = replace(door, home=home)

    def check_deadlines(self, now_ns: int) -> None:
        """A look at it may be over its time."""
        if self._look:
            self._look.check_deadlines(now_ns)

    def _open_door(self, lived_elsewhere: bool) -> None:
        """Raises ProcessLookupError: it has ended, and nothing is changed."""
        try:
            door = inside.door_to(self.pid, self.start_ticks)
            if door and self._has_own_mounts and inside.is_at_the_machines_root(door):
                door.close()
                door = None
            self.lives_elsewhere = lived_elsewhere or door is not None
        except ProcessLookupError:
            raise
        except OSError:  # no way in: nothing is read in its name
            door, self.lives_elsewhere = None, True
        self._close_door()
        self._door = door
        with suppress(OSError):
            self.uids = frozenset({os.stat(f"/proc/{self.pid}").st_uid})  # noqa: PTH116  no pathlib here

    def _close_door(self) -> None:
        if self._door:
            self._door.close()
            self._door = None

    def is_stand_in(self, now_ns: int) -> bool:
        """Whether what the profile means has come by now, beside or in place of whoever was taken for it.

        Or whether that one has become a `governor run`, which it was not yet, and has started its agent.

        To be asked while nothing grows: looks every five seconds, and at more than /proc/PID/stat only if there is
        somebody new.
        """
        is_meant = bool(self._match and self._match.process)
        if self.pidfd < 0 or self.known or not (is_meant or self._is_led_to):
            return False
        if self._is_asking:
            return self._meant(self.pid) is not None
        if now_ns - self._looked_ns < _LOOK_AGAIN_NS:
            return False
        self._looked_ns = now_ns
        if self._is_led_to and subtree.comm_of(self.pid) == subtree.RUN_COMM and self._leading_pid() != self.pid:
            return True
        if not is_meant:
            return False
        return self._has_news(self.pid) and self._meant(self.pid) is not None

    def _has_news(self, pid: int) -> bool:
        """Whether somebody is new among a process and what it started since this was asked last.

        Where the memcg has more than a thousand, among all of them: those not seen so far, and the others in turn.
        """
        pids = subtree.memcg_pids(self._cgroup)
        if len(pids) <= _READ_AT_ONCE:
            stats = subtree.members(pid, self._cgroup, os.getpid())
            pids = [stat.pid for stat in stats]
        else:
            pids.sort(key=lambda pid: (pid in self._below, pid <= self._last_read_pid, pid))
            stats = [stat for pid in pids[:_READ_AT_ONCE] if (stat := subtree.read_stat(pid))]
            self._last_read_pid = stats[-1].pid if stats else 0
        found = {
            each.pid: (each.start_ticks, each.comm, each.forked_only) for each in map(processes.process_of, stats)
        }
        has_news = not found.items() <= self._below.items()
        self._below = {pid: self._below[pid] for pid in pids if pid in self._below} | found
        return has_news or (self._look is not None and self._look.is_to_be_repeated)

    @property
    def _is_led_to(self) -> bool:
        """Whether it is whoever leads the memcg, and not somebody who was named."""
        return not (self._only_wanted or self._wanted_pid or self._is_within)

    def _meant(self, pid: int) -> Agent | None:
        """Of a process and what it started the one that the profile means; None as well while it `_is_asking`."""
        if self._match and self._look and self._needs_child(pid):
            return self._look.agent(self._match, pid)
        if self._match and pid:
            with suppress(NoAgent):
                return find_agent(self._match, pid)
        return None

    def _needs_child(self, pid: int) -> bool:
        """Whether a profile is to be looked for among processes that may let whoever reads their arguments wait."""
        return bool(self._match and self._look and pid) and (self._is_container or lives_elsewhere(pid))

    @property
    def _is_asking(self) -> bool:
        return self._look is not None and self._look.is_open

    def _ends_all(self) -> bool:
        """Whether nobody between what was started and the agent goes on after it, as far as is known."""
        chain = subtree.ancestors(self.pid)
        if self._wanted_pid not in chain:
            return False
        above = [subtree.read_stat(pid) for pid in chain[1 : chain.index(self._wanted_pid) + 1]]
        match = self._match
        return all(
            stat
            and subtree.ends_with_child(stat.pid, stat.comm, match is not None and fits(match, stat.pid, stat.comm))
            for stat in above
        )

    def _may_still_come(self, pid: int) -> bool:
        """Whether what the profile means is not there yet, but what starts it has run for moments only."""
        if not self._match or not self._match.process or not (stat := subtree.read_stat(pid)):
            return False
        is_whole = self.known is not None and not (self._match.wrapped and self.known.pid == pid)
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - stat.start_ticks / os.sysconf("SC_CLK_TCK")
        return not is_whole and age_s < _STARTING_S

    def _leading_pid(self) -> int:
        if self._is_within:
            other = subtree.oldest_other(self._cgroup, os.getpid())
            return other.pid if other else 0
        leader = processes.leader(self._cgroup)
        return leader.pid if leader else 0

    @property
    def identity(self) -> tuple[int, int]:
        """Pid and start in clock ticks: no two processes of a boot share both."""
        return self.pid, self.start_ticks

    def patterns(self, globs: Sequence[str]) -> list[Pattern]:
        """Globs with this agent's home for `~`; without an agent those with `~` are left out.

        Links in their fixed part are resolved once: what the container makes of it later is not followed. None for an
        agent that lives elsewhere.
        """
        if self.lives_elsewhere:
            return []
        wanted = tuple(glob for glob in globs if self.pidfd >= 0 or glob[0] != "~")
        if wanted not in self._patterns:
            self._patterns = {wanted: [parse_pattern(glob, self._home) for glob in wanted]}
        return self._patterns[wanted]

    def ask_to_end(self) -> bool:
        """SIGTERM; False when there is nobody to take it."""
        return self.pidfd >= 0 and processes.ask_to_end(self.pidfd, self.pid)

    def forget(self) -> None:
        """It ended."""
        self.let_go()
        if not self._only_wanted:
            self._wanted_pid = 0

    def let_go(self) -> None:
        """To be found anew, from where it was looked for before."""
        if self._look:
            self._look.close()
        with suppress(OSError):
            os.close(self.pidfd)
        self._close_door()
        self.pid = self.start_ticks = self._followed_first_ns = self._follow_ns = 0
        self.pidfd = -1
        self.known = None
        self._patterns = {}
        self._below = {}
