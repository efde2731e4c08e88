"""Journals for the tests of reports: the real ladder and the real journaling of its steps, on the test's clock."""

from datetime import UTC, datetime

from test_ladder import memory

from governor import decisions
from governor.codec import plain
from governor.journal import encode
from governor.model import Sampled
from governor.policy import SECOND, Policy

EPOCH_NS = 1_800_000_000 * SECOND
AHEAD_NS = 77 * SECOND  # boottime before monotonic, as on a machine that has slept


class Agent:
    identity = (17, 4711)


class Story:
    """Lines of a journal, told event by event."""

    def __init__(self, monkeypatch, tmp_path, policy=None, target="/sys/fs/cgroup/pod"):
        self.target, self.now_ns, self.lines, self.policy = target, 1000 * SECOND, [], policy or Policy()
        monkeypatch.setattr(decisions, "boottime_ns", lambda: self.now_ns + AHEAD_NS)
        monkeypatch.setattr(decisions.state_file, "path_for", lambda _: tmp_path / "state")
        self.decisions = decisions.Decisions(target, self.policy, Agent(), self, self.note)
        self.begin()

    def begin(self, **facts):
        guard = {"cgroup": self.target, "archive_directory": "/archives"}
        state = plain(self.decisions.state)
        self.write("begin", policy=plain(self.policy), state=state, guard=guard, facts={"kernel": "Linux 6", **facts})

    def write(self, kind, **fields):
        at = datetime.fromtimestamp((EPOCH_NS + self.now_ns) / 1e9, UTC).isoformat()
        line = {"time": at, "monotonic_ns": self.now_ns, "kind": kind, "target": self.target, **fields}
        self.lines.append(encode(line) + b"\n")

    def note(self, kind, text, **fields):
        self.write(kind, text=text, **fields)

    def feed(self, event, after_s=0.0):
        self.now_ns += int(after_s * SECOND)
        self.decisions.feed(event)

    def look(self, ratio, after_s=1.0, file_bytes=0, agent_bytes=0):
        self.now_ns += int(after_s * SECOND)
        found = memory(ratio, file_bytes=file_bytes)
        self.decisions.feed(Sampled(found, self.now_ns + AHEAD_NS, agent_bytes))

    def brake(self, event, frozen=True):
        """As target.py does: what reflex said, then the event."""
        said = {"crossed_ns": self.now_ns - 1_000_000, "frozen_ns": self.now_ns, "state": plain(event.state)}
        self.note("braked", f"braked: frozen at {event.state.unreclaimable_ratio:.2f}", **said, frozen=frozen)
        self.feed(event)

    def thaw(self, after_s=0.1):
        self.now_ns += int(after_s * SECOND)
        self.note("thawed", "thawed: as decided", at_ns=self.now_ns)

    def archived(self, name="one", files=2, base="", directory="/archives"):
        made = {"name": name, "directory": directory, "base": base, "files": files, "skipped": 0, "new": True}
        self.note("archived", f"archived {files} session files as {name}", **made)
