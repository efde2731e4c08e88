"""Whether a command was accepted, by what it leaves: a record in the transcript, text on the screen, a new session.

All of it is written by the agent: read in bounded pieces, believed for no more than the outcome of a delivery.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

from governor.model import Tier
from governor.profile import Profile
from governor.profile_agent import Agent
from governor.profile_state import Seen, State, first_match, shown
from governor.session_files import find, parse_pattern

_READ_LIMIT_BYTES = 4 << 20
_FILES_LIMIT = 16


@dataclass(frozen=True, slots=True)
class Verdict:
    """`accepted` and `refused` say what shows it, "" where nothing does; `queued`: it waits for the turn's end."""

    accepted: str = ""
    refused: str = ""
    queued: bool = False


def stands(draft: str | None, text: str) -> bool:
    """Whether a text, and nothing else, stands in the input; one of words on however many lines it is shown there."""
    return draft == text or (draft is not None and " " in text and before_text(draft, text) == "")


def before_text(draft: str, text: str) -> str | None:
    """What stands in the input before a text at its end, without spaces; None where that is not at its end."""
    shown, wanted = "".join(draft.split()), "".join(text.split())
    return shown[: len(shown) - len(wanted)] if shown.endswith(wanted) else None


class Gone:
    """Of a line that leaves nothing but its place in the input: it was accepted once it stands there no more."""

    def __init__(self, text: str) -> None:
        self._text = text

    def judge(self, now: Seen) -> Verdict:
        """What is known by now, some time after Enter."""
        if now.draft is None or stands(now.draft, self._text):
            return Verdict()
        return Verdict(accepted=f"taken while it was {now.state.value}")


class Evidence:
    """What was there before a command, to tell what came after it."""

    def __init__(self, profile: Profile, tier: Tier, agent: Agent, before: Seen) -> None:
        """`before`: what was seen before anything was typed."""
        self._confirm, self._agent, self._before = profile.confirm, agent, before
        is_compact = tier is Tier.COMPACT
        self._records = self._confirm.compact_record if is_compact else self._confirm.clear_record
        self._shown = self._confirm.compact_screen if is_compact else self._confirm.clear_screen
        self._new_session = self._confirm.clear_new_session and not is_compact
        self._text = profile.text(tier)
        self._read_to: dict[tuple[int, int], int] = {}  # by device and inode
        self._search_transcript(is_first=True)

    def judge(self, now: Seen) -> Verdict:
        """What is known by now, some time after Enter."""
        queued = bool(first_match(self._confirm.queued, now.text))
        if refusal := self._new_on_screen(self._confirm.refused, now):
            return Verdict(refused=f"the screen shows {shown(refusal)}")
        if record := self._search_transcript():
            return Verdict(accepted=f"its transcript has {shown(record)}")
        if self._new_session and now.session and self._before.session not in ("", now.session):
            return Verdict(accepted=f"it has a new session, {now.session}")
        if match := self._new_on_screen(self._shown, now):
            return Verdict(accepted=f"the screen shows {shown(match)}")
        asks_for_nothing = not (self._records or self._shown or self._new_session)
        if asks_for_nothing and now.state is State.IDLE and now.draft == "":
            return Verdict(accepted="its input is empty again")
        return Verdict(queued=queued)

    def _new_on_screen(self, expressions: tuple[str, ...], now: Seen) -> str:
        """A match that was not there before: one more than there were, or one below the command's newest echo."""
        before = self._before.text
        for expression in expressions:
            found = list(re.finditer(expression, now.text, re.MULTILINE))
            if len(found) > sum(1 for _ in re.finditer(expression, before, re.MULTILINE)):
                return found[-1][0]
        echoes = [match.end() for match in self._echoes(now.text)]
        if len(echoes) > len(list(self._echoes(before))):
            return first_match(expressions, now.text[echoes[-1] :])
        return ""

    def _echoes(self, text: str) -> list[re.Match[str]]:
        return list(re.finditer(rf"{re.escape(self._text)}[ \u00a0]*$", text, re.MULTILINE))

    def _search_transcript(self, is_first: bool = False) -> str:
        """What of the records was appended since; at first only how long the files are."""
        session = self._before.session
        if not self._records or not self._confirm.transcript or not session:
            return ""
        pattern = parse_pattern(self._confirm.transcript.replace("{session}", session), self._agent.home)
        for number, found in enumerate(find([pattern])):
            if found.fd is None:
                continue
            try:
                if number < _FILES_LIMIT and (record := self._search(found.fd, is_first)):
                    return record
            finally:
                os.close(found.fd)
        return ""

    def _search(self, fd: int, is_first: bool) -> str:
        status = os.fstat(fd)
        file = status.st_dev, status.st_ino
        start = self._read_to.get(file, 0)
        if is_first or status.st_uid != self._agent.uid:
            self._read_to[file] = status.st_size
            return ""
        start = max(start, status.st_size - _READ_LIMIT_BYTES)
        data = os.pread(fd, _READ_LIMIT_BYTES, start)
        self._read_to[file] = start + data.rfind(b"\n") + 1  # a line that is not whole is read again
        return first_match(self._records, data.decode(errors="replace"))
