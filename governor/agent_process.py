"""The process that is protected: found, watched through a pidfd, and where its session files are."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress

from governor import inside, subtree
from governor.actions import processes
from governor.profile import Match
from governor.profile_agent import Agent, NoAgent, find_agent, fits
from governor.session_files import Pattern, home_of, parse_pattern

_STARTING_S = 10.0
_LOOK_AGAIN_NS = 5_000_000_000


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
    ) -> None:
        """`is_within`: governor itself is in that memcg, and not its agent. `match`: which of that tree it is.

        `only_wanted`: after `wanted_pid` nobody else of the memcg is taken for the agent. `lives_elsewhere`: until it
        is found nothing is looked up here in its name.
        """
        self._only_wanted = only_wanted
        self._cgroup, self._is_within = cgroup, is_within
        self._wanted_pid = wanted_pid
        self._match = match
        self.pid = self.start_ticks = 0
        self.pidfd = -1
        self._home = "/"
        self.door: inside.Door | None = None  # to where it lives, if that is elsewhere
        self.lives_elsewhere = lives_elsewhere  # kept until the next is found: its paths are not ours
        self.uids: frozenset[int] = frozenset()  # who it runs as
        self.known: Agent | None = None  # what a profile found
        self.ends_all = False  # whether what was started in its place ends with it
        self._looked_ns = 0
        self._below: set[tuple[int, int, str, bool]] = set()  # who descends from a stand-in, at the last look
        self._patterns: dict[tuple[str, ...], list[Pattern]] = {}

    def find(self) -> bool:
        """Look for it unless it is known; True when it was found just now."""
        if self.pidfd >= 0:
            return False
        pid = self._wanted_pid if self._only_wanted else self._wanted_pid or self._leading_pid()
        self.known = self._meant(pid)
        if self._may_still_come(pid):
            return False
        found = subtree.read_stat(self.known.pid if self.known else pid)
        if not found or found.ended:
            if not self._only_wanted:
                self._wanted_pid = 0  # it ended: whoever leads the memcg from now on
            return False
        try:
            self.pidfd = os.pidfd_open(found.pid)
        except OSError:
            return False
        self.pid, self.start_ticks = found.pid, found.start_ticks
        try:
            self.door = inside.door_to(self.pid, self.start_ticks)
            self.lives_elsewhere = self.door is not None
        except ProcessLookupError:
            self.let_go()
            return False
        except OSError:  # no way in: nothing is read in its name
            self.lives_elsewhere = True
        if not self.lives_elsewhere:  # a path of a container is not to be looked up here
            self._home = self.known.home if self.known else home_of(self.pid)
        self.ends_all = self._ends_all()
        with suppress(OSError):
            self.uids = frozenset({os.stat(f"/proc/{found.pid}").st_uid})  # noqa: PTH116  no pathlib here
        return True

    def is_stand_in(self, now_ns: int) -> bool:
        """Whether what the profile means has come by now, beside or in place of whoever was taken for it.

        To be asked while nothing grows: looks every five seconds, and at more than /proc/PID/stat only if there is
        somebody new.
        """
        if self.pidfd < 0 or self.known or not self._match or not self._match.process:
            return False
        if now_ns - self._looked_ns < _LOOK_AGAIN_NS:
            return False
        self._looked_ns = now_ns
        members = map(processes.process_of, subtree.members(self.pid, self._cgroup, os.getpid()))
        below = {(each.pid, each.start_ticks, each.comm, each.forked_only) for each in members}
        has_news = not below <= self._below
        self._below = below
        return has_news and self._meant(self.pid) is not None

    def _meant(self, pid: int) -> Agent | None:
        """Of a process and what it started the one that the profile means."""
        if self._match and pid:
            with suppress(NoAgent):
                return find_agent(self._match, pid)
        return None

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
        with suppress(OSError):
            os.close(self.pidfd)
        if self.door:
            self.door.close()
            self.door = None
        self.pid = self.start_ticks = 0
        self.pidfd = -1
        self._patterns = {}
        self._below = set()
