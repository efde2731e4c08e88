"""What a profile says of one kind of agent: how to know it, read its state, reach it, confirm, and bring it back.

`profile_file` reads TOML into these classes: the tables and keys of a file are the fields here, without the unit.
Texts that are sent are bytes for a terminal (`"\\u0013"` is Ctrl-S). Expressions are Python's, MULTILINE, over the
visible screen: lines joined by newlines, without the spaces at their ends, and down to the cursor at least: what runs
is told from what waits by a prompt that is not the last line. Pure.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from governor.model import Tier
from governor.policy import MS, SECOND, Efficacy


class Standing(Enum):
    """Whether it was tried on the real agent."""

    PROVEN = "proven"
    EXPERIMENTAL = "experimental"


class WhileBusy(Enum):
    """What an agent does with a command that comes in the middle of a turn."""

    QUEUED = "queued"  # runs after the turn: so it may be typed
    REFUSED = "refused"  # dropped: so it is not typed
    KEPT = "kept"  # stays in the input: so it is not typed


@dataclass(frozen=True, slots=True)
class Match:
    """Which process is the agent."""

    # Globs of its name, the last part of argv[0], or of the script that an interpreter (node, python ...) runs.
    # Empty: whatever process is given.
    process: tuple[str, ...] = ()
    wrapped: bool = False  # the first that matches only wraps: the agent is its child that matches, if there is one


@dataclass(frozen=True, slots=True)
class StateFile:
    """A JSON object that the agent keeps about itself; in its home, so it may say anything."""

    path: str = ""  # "~/.tool/{pid}.json"; empty: there is none
    required: bool = True  # nothing is typed where it cannot be read or does not say the state
    session: str = ""  # keys at the top of the object ...
    cwd: str = ""
    start: str = ""  # start of the process in clock ticks, as /proc/PID/stat: tells a dead agent's file
    status: str = ""
    detail: str = ""  # more about the status, for people
    idle: tuple[str, ...] = ()  # ... and what the status may say
    busy: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Screen:
    """How to read the state from what the terminal shows: expressions."""

    # The input: the last match counts, its group "draft" is what stands in it; nothing is typed where it is absent.
    prompt: str = ""
    placeholder: tuple[str, ...] = ()  # whole drafts that are none: hints that an empty input shows
    busy: tuple[str, ...] = ()
    waiting: tuple[str, ...] = ()  # a dialog or a menu that keys would answer
    shell: tuple[str, ...] = ()  # what is typed would be run
    vim: tuple[str, ...] = ()  # what is typed would be taken as editing commands


@dataclass(frozen=True, slots=True)
class Typing:
    """What is typed and how."""

    compact: str = ""  # empty: not known
    clear: str = ""
    before: str = ""  # keys to send before the text
    stash: str = ""  # puts a draft aside; empty: with a draft nothing is typed
    unstash: str = ""  # brings it back into an empty input
    stash_returns: bool = False  # it comes back by itself once something was sent
    pause_ns: int = 200 * MS  # between text and Enter
    enter: str = "\r"
    while_busy: WhileBusy = WhileBusy.REFUSED
    # Tell it of a tool that was shed, in words, as its user would. Not where what is typed is run as a command.
    tell: bool = False


@dataclass(frozen=True, slots=True)
class Confirm:
    """What shows that a command was accepted: any of what is given; nothing given: that the input is empty again."""

    within_ns: int = 50 * SECOND
    transcript: str = ""  # glob of the file that the session is appended to: "~/.tool/*/{session}.jsonl"
    compact_record: tuple[str, ...] = ()  # expressions over what was appended since
    clear_record: tuple[str, ...] = ()
    compact_screen: tuple[str, ...] = ()  # expressions over what is new on the screen
    clear_screen: tuple[str, ...] = ()
    clear_new_session: bool = False  # the session of the state file changes
    queued: tuple[str, ...] = ()  # on the screen: it waits for the end of the turn
    refused: tuple[str, ...] = ()  # new on the screen: it was not done


@dataclass(frozen=True, slots=True)
class Signals:
    """Signals that deliver; empty: none does."""

    compact: str = ""
    clear: str = ""
    terminate: str = "SIGTERM"


@dataclass(frozen=True, slots=True)
class Session:
    """What is to be archived, and how a session goes on.

    In the two argvs {session} stands for its id, and a word {options} for the options that are kept.
    """

    globs: tuple[str, ...] = ()
    compact_stopped: tuple[str, ...] = ()  # argv that compacts the session of an agent that does not run
    compact_refused: tuple[
        str, ...
    ] = ()  # expressions over what that says: it was not done, whatever its exit status
    resume: tuple[str, ...] = ()  # argv that goes on with it
    # Options of the command that `governor run` was given that a resumed agent is given again, each as the agent's
    # --help has it: "--model <name>" (kept_options.py). Not those that choose a session.
    keep_options: tuple[str, ...] = ()
    # What the agent holds at most once it was resumed compacted, and what compacting it takes, whichever is more; 0:
    # not known. Where it is, and compact frees nothing, an idle agent is recycled.
    resume_peak_bytes: int = 0
    # Said to a session that was resumed, if its turn was cut off; once for a session, empty: never.
    resubmit: str = ""
    # Globs of the names (as `ps -o comm`) of processes that outlive the agent, and are to be ended when the kernel's
    # OOM killer has ended it; after a termination all that descends from it is.
    sweep: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Efficacies:
    """What is known of how much memory a tier frees before it was ever tried here."""

    compact: Efficacy = Efficacy.UNKNOWN
    clear: Efficacy = Efficacy.UNKNOWN


@dataclass(frozen=True, slots=True)
class Profile:
    """One kind of agent."""

    name: str = "unnamed"
    standing: Standing = Standing.EXPERIMENTAL
    match: Match = field(default_factory=Match)
    state_file: StateFile = field(default_factory=StateFile)
    screen: Screen = field(default_factory=Screen)
    type: Typing = field(default_factory=Typing)
    confirm: Confirm = field(default_factory=Confirm)
    signals: Signals = field(default_factory=Signals)
    session: Session = field(default_factory=Session)
    efficacy: Efficacies = field(default_factory=Efficacies)

    def text(self, tier: Tier) -> str:
        """What is typed for a tier; "" where it is not known."""
        return {Tier.COMPACT: self.type.compact, Tier.CLEAR: self.type.clear}.get(tier, "")

    def signal(self, tier: Tier) -> str:
        """The signal for a tier, by name; "" where there is none."""
        return {Tier.COMPACT: self.signals.compact, Tier.CLEAR: self.signals.clear}.get(tier, "")
