"""What an agent is doing, as its profile says how to tell: its process, its state file, its screen. Types nothing.

The state file and the screen are the agent's to write: bounded, no links followed below its home, a value of another
type than expected is no value.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import orjson

from governor import cgroup
from governor.profile import Profile, StateFile
from governor.profile_agent import Agent
from governor.session_files import find, parse_pattern
from governor.subtree import read_stat

_FILE_LIMIT_BYTES = 64 << 10
_SESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_TEXT_LIMIT = 80
SCREEN_LIMIT = 500  # lines, and characters of each


class State(Enum):
    """What an agent does; only in the first two may something be typed."""

    IDLE = "idle"
    BUSY = "busy"
    WAITING = "waiting"  # at a dialog, which keys would answer
    SHELL = "shell"  # its input goes to a shell
    VIM = "vim"  # its input takes editing commands
    STOPPED = "stopped"  # does not run, or not in its terminal's foreground
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Found:
    """A state and why it is believed, by one source."""

    state: State
    why: str


@dataclass(frozen=True, slots=True)
class FileState:
    """What the state file says; texts are "" where it does not say them."""

    state: State
    why: str
    session: str = ""
    cwd: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """All that was seen at one moment; `draft` is None where no input is on the screen."""

    state: State
    why: str
    session: str = ""
    cwd: str = ""
    draft: str | None = None
    text: str = ""  # of the screen

    @property
    def open(self) -> bool:
        """Whether it takes text now: in a state for it, with an input on the screen."""
        return self.state in (State.IDLE, State.BUSY) and self.draft is not None


def look(profile: Profile, agent: Agent, lines: list[str] | None) -> Seen:
    """Read everything; `lines` is the screen, None where there is none. What is worst counts."""
    process = read_process(agent)
    screen, draft, text = read_screen(profile, lines) if lines is not None else (None, None, "")
    file = read_state_file(profile.state_file, agent)  # last: it is the freshest
    known = [found for found in (process, screen, Found(file.state, file.why)) if found]
    worst = (State.STOPPED, State.WAITING, State.SHELL, State.VIM)
    chosen = next((found for state in worst for found in known if found.state is state), None)
    if chosen is None and profile.state_file.path and profile.state_file.required and file.state is State.UNKNOWN:
        chosen = Found(State.UNKNOWN, file.why)
    if chosen is None:  # the file says what is so, the screen what could be seen
        said = [
            found for found in (Found(file.state, file.why), screen) if found and found.state is not State.UNKNOWN
        ]
        chosen = said[0] if said else screen or Found(State.UNKNOWN, file.why)
    return Seen(chosen.state, chosen.why, file.session, file.cwd, draft, text)


def read_process(agent: Agent) -> Found | None:
    """Whether it runs, and in the foreground of its terminal: else what is typed there goes to somebody else."""
    stat = read_stat(agent.pid)
    if stat is None or stat.start_ticks != agent.start_ticks or stat.ended:
        return Found(State.STOPPED, f"process {agent.pid} has ended")
    if stat.state in "Tt":
        return Found(State.STOPPED, f"process {agent.pid} is stopped")
    if is_frozen(agent.pid):
        return Found(State.STOPPED, f"process {agent.pid} is frozen")
    if stat.terminal and stat.foreground_group > 0 and stat.foreground_group != stat.group:
        return Found(State.STOPPED, f"process {agent.pid} is not in the foreground of its terminal")
    return None


def is_frozen(pid: int) -> bool:
    """Whether its cgroup is frozen."""
    with suppress(OSError):
        if path := cgroup.memcg_of(pid):
            return cgroup.parse_flat_keyed(Path(path, "cgroup.events").read_bytes()).get(b"frozen") == 1
    return False


def read_screen(profile: Profile, lines: list[str]) -> tuple[Found, str | None, str]:
    """The state by the screen, what stands in the input (None: there is none), and the text that was looked at."""
    text = "\n".join(line[:SCREEN_LIMIT].rstrip() for line in lines[-SCREEN_LIMIT:])
    screen = profile.screen
    prompt = None
    if screen.prompt:
        for prompt in re.finditer(screen.prompt, text, re.MULTILINE):  # noqa: B007  the last one counts
            pass
    draft = None if prompt is None else _draft(prompt["draft"] or "", screen.placeholder)
    beside = text  # what scrolled by above an input asks nothing any more, unless it stands right above
    if prompt:
        above = "" if profile.state_file.path else text[: prompt.start()].rstrip("\n").rpartition("\n")[2]
        beside = f"{above}\n{text[prompt.end() :]}"
    for state, expressions, where in (
        (State.WAITING, screen.waiting, beside),
        (State.SHELL, screen.shell, beside),
        (State.VIM, screen.vim, beside),
        (State.BUSY, screen.busy, text),
    ):
        if match := first_match(expressions, where):
            return Found(state, f"the screen shows {shown(match)}"), draft, text
    if draft is None:
        return Found(State.UNKNOWN, "no input is on the screen"), None, text
    return Found(State.IDLE, "its input is on the screen"), draft, text


def _draft(text: str, placeholders: tuple[str, ...]) -> str:
    draft = "\n".join(line.strip() for line in text.split("\n")).strip()
    return "" if any(re.fullmatch(placeholder, draft) for placeholder in placeholders) else draft


def first_match(expressions: tuple[str, ...], text: str) -> str:
    """What the first of the expressions that is found matches; "" for none."""
    for expression in expressions:
        if match := re.search(expression, text, re.MULTILINE):
            return match[0].strip() or match[0]
    return ""


def shown(text: str) -> str:
    """A piece of the screen in a bounded space on one line."""
    line = " ".join(text.split())
    return repr(line if len(line) <= _TEXT_LIMIT else line[: _TEXT_LIMIT - 3] + "...")


def read_state_file(spec: StateFile, agent: Agent) -> FileState:
    """What the agent's state file says of this very process."""
    if not spec.path:
        return FileState(State.UNKNOWN, "it has no state file")
    told = _load(spec.path.replace("{pid}", str(agent.inner_pid)), agent)
    if isinstance(told, str):
        return FileState(State.UNKNOWN, told)

    def text(key: str) -> str:
        value = told.get(key) if key else None
        return value if isinstance(value, str) else str(value) if type(value) is int else ""

    if spec.start and text(spec.start) != str(agent.start_ticks):
        return FileState(State.UNKNOWN, "its state file is another process's, which had the same pid")
    session = text(spec.session) if _SESSION.fullmatch(text(spec.session)) else ""
    status, detail = text(spec.status), text(spec.detail)
    of = (session, text(spec.cwd))
    for state, names in ((State.WAITING, spec.waiting), (State.BUSY, spec.busy), (State.IDLE, spec.idle)):
        if status in names:
            return FileState(state, f"its state file says {status}" + (f": {shown(detail)}" if detail else ""), *of)
    known = ", ".join((*spec.idle, *spec.busy, *spec.waiting))
    return FileState(State.UNKNOWN, f"its state file says {shown(status)}, expected one of {known}", *of)


def _load(path: str, agent: Agent) -> dict[str, Any] | str:
    """The object in a file of the agent, or why there is none."""
    for found in find([parse_pattern(path, agent.home)]):
        if found.fd is None:
            return f"its state file {path} cannot be read: {found.skipped}"
        try:
            if os.fstat(found.fd).st_uid != agent.uid:
                return f"its state file {path} belongs to another user"
            data = os.read(found.fd, _FILE_LIMIT_BYTES + 1)
        except OSError as error:
            return f"its state file {path} cannot be read: {error.strerror}"
        finally:
            os.close(found.fd)
        if len(data) > _FILE_LIMIT_BYTES:
            return f"its state file {path} is larger than {_FILE_LIMIT_BYTES} bytes"
        try:
            told = orjson.loads(data)
        except ValueError:
            return f"its state file {path} is no JSON"
        return told if isinstance(told, dict) else f"its state file {path} holds no object"
    return f"it has no state file {path}"
