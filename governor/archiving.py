"""Has an agent's session archived by a child, in its turn, and says what became of it. Decides nothing."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import orjson

from governor import archive, instance, model, retention
from governor.agent_process import AgentProcess
from governor.children import Children, Ended, fork, memory_bound
from governor.codec import plain
from governor.inside import kept_open
from governor.inside_read import find_inside
from governor.journal import Note
from governor.manifest import ArchiveError, read_manifest
from governor.policy import Archive
from governor.session_files import CREDENTIALS, Found, find

_SEARCH_BYTES = 64 << 20  # for the names of directories: the child that archives is in governor's memcg


@dataclass(slots=True)
class Archiving:
    """Of the agent of one governed memcg."""

    cgroup: str
    directory: Path
    agent: AgentProcess
    children: Children
    note: Note
    say: Callable[[str], None]
    _full: tuple[Path, str] = (Path(), "")  # where this agent's full archive is, and its name

    def begin(
        self, policy: Archive, reason: str, state: model.State, then: Callable[[bool], None], is_last: bool = False
    ) -> None:
        """In full, or what has changed since the full one of this agent; `is_last`: no further one is based on it.

        `then` is told whether it went well.
        """
        agent = self.agent
        way = agent.way_in()
        patterns = agent.patterns(policy.globs)
        facts = {"agent_pid": agent.pid, "ladder": plain(state)}
        place, base = self._full
        exclude = (*CREDENTIALS, *policy.exclude)

        def on_end(ended: Ended) -> None:
            self._ended(ended, policy, is_last)
            then(ended.ok)
            if ended.ok:
                self._prune(ended, policy)

        if agent.lives_elsewhere and not way:
            on_end(Ended(1, b"there is no way to where the agent's files are", False))
            return
        try:
            door = kept_open(way) if way else None
        except OSError as error:
            on_end(Ended(1, str(error).encode(), False))
            return

        def work() -> bytes:
            since, others = None, set[Path]()
            with suppress(OSError):  # where the directory is full or read-only
                others = {instance.state_directory() / "archive"} - {self.directory}
            if base:
                with suppress(ArchiveError):  # gone or damaged: then in full
                    since = read_manifest(place, base)
            made = archive.write(
                self.directory,
                patterns,
                reason,
                self.cgroup,
                facts,
                policy.limit_bytes,
                exclude=exclude,
                since=since,
                fallbacks=[*others],
                matches=lambda: in_little_memory(
                    find_inside(door, policy.globs, exclude) if door else find(patterns, exclude)
                ),
            )
            fallback = made.facts.get("fallback", {})
            directory = Path(fallback.get("directory", self.directory))
            summary: dict[str, object] = {"name": made.name, "directory": str(directory), "base": made.base}
            summary |= {"files": len(made.files), "skipped": len(made.skipped), "new": made != since}
            summary |= {"left_out": made.left_out, "complete": made.complete}
            return orjson.dumps(summary | fallback)

        deadline_ns, what = time.monotonic_ns() + policy.deadline_ns, f"archive: {reason}"
        self.children.attempt_in_turn(
            lambda: fork(work, deadline_ns, what, keep=door.fds if door else ()),
            on_end,
            deadline_ns,
            what,
            let_go=door.close if door else lambda: None,
        )

    def _ended(self, ended: Ended, policy: Archive, is_last: bool) -> None:
        if ended.ok:
            made = orjson.loads(ended.output)
            what = "changed session files" if made["base"] else "session files"
            refused = "; ".join(f"{place}: {why}" for place, why in made.get("refused", {}).items())
            where = f" in {made['directory']} ({refused})" if refused else ""
            lacks = "" if made["complete"] else f"; it lacks {made['left_out']} or more, see its manifest"
            text = f"archived {made['files']} {what} as {made['name']}{where}{lacks}"
            self.note(
                "archived", text if made["new"] else f"nothing has changed since archive {made['name']}", **made
            )
            if not made["files"] and not made["base"]:
                self.say(f"no session file was found for {policy.globs}: name them with --archive")
            if made["new"] and not made["base"] and not is_last:
                self._full = Path(made["directory"]), made["name"]
        else:
            self.forget()
            self.note("archive_failed", f"archive failed: {ended.why}", status=ended.status)

    def _prune(self, ended: Ended, policy: Archive) -> None:
        """Where the archive is; in a child of its own: it reads the manifests of all, and nobody is held for that."""
        made = orjson.loads(ended.output)
        directory = Path(made["directory"])

        def work() -> bytes:
            keep = policy.keep_count, policy.keep_bytes
            return b"%d" % len(retention.prune(directory, self.cgroup, *keep, spare=made["name"]))

        def on_end(pruned: Ended) -> None:
            if not pruned.ok:
                self.note("prune_failed", f"old archives in {directory} could not be removed: {pruned.why}")
            elif count := int(pruned.output):
                self.note("pruned", f"removed {count} old archives in {directory}", count=count)

        self.children.attempt(lambda: fork(work, time.monotonic_ns() + policy.deadline_ns, "old archives"), on_end)

    def forget(self) -> None:
        """The next archive is a full one."""
        self._full = self._full[0], ""


def in_little_memory(search: Iterator[Found]) -> Iterator[Found]:
    """With a bound on memory while it searches, and not while others use what it finds: they may not do with less."""
    before, bound = resource.getrlimit(resource.RLIMIT_AS), memory_bound(_SEARCH_BYTES)
    while True:
        resource.setrlimit(resource.RLIMIT_AS, bound)
        try:
            found = next(search, None)
        finally:
            resource.setrlimit(resource.RLIMIT_AS, before)
        if found is None:
            return
        yield found
