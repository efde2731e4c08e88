"""A report as Markdown, for an issue or a chat: the same words, the timeline as a line of bars. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise

from governor.report_episodes import Episode
from governor.report_figures import clock, percent
from governor.report_words import Document, Told

_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 72
# Whatever may begin markup, an entity, a cell, a mention or a link; else it should read well as it is.
_MARKUP = re.compile(r"([\\`*_\[\]<>|~&@$]|#(?=\d)|:(?=//)|(?<=www)\.)", re.IGNORECASE)


def render(document: Document) -> str:
    """The whole text."""
    return "\n".join(_lines(document)) + "\n"


def _lines(document: Document) -> Iterator[str]:
    yield f"# governor report: {_plain(document.title)}"
    if document.span:
        yield f"\n{_plain(document.span)}"
    for remark in document.remarks:
        yield f"\n{_plain(remark)}"
    for told in document.episodes:
        yield from _episode(told)
    yield "\n## Facts\n"
    for name, value in document.facts:
        yield f"- **{_plain(name)}**: {_plain(value)}"
    changed = [f"{key} = {value}" for key, value, usual in document.policy if not usual]
    if document.policy:
        yield f"- **policy's values that are not the built-in ones**: {_plain('; '.join(changed) or 'none')}"


def _episode(told: Told) -> Iterator[str]:
    yield f"\n## {_plain(told.when)}: {_plain(told.headline)}"
    for answer in told.answers:
        yield f"\n**{_plain(answer.question)}** " + " ".join(map(_plain, answer.sentences))
        for command in answer.commands:
            fence = "`" * (3 + max(map(len, re.findall("`+", command)), default=0))
            yield f"\n{fence}\n{command}\n{fence}"
    if told.episode.looks:
        yield from ("", "```", *_bars(told.episode), "```")
    if told.freed:
        yield "\n| tier | when (UTC) | freed |\n| --- | --- | --- |"
        for row in told.freed:
            yield f"| {' | '.join(map(_plain, row))} |"
    yield "\n| at | what | rule | decided |\n| --- | --- | --- | --- |"
    for line in told.rows:
        what = f"{line.what}; {line.values}" if line.values else line.what
        yield f"| {' | '.join(map(_plain, (line.offset, what, line.rule, '; '.join(line.decided))))} |"
    if told.left_out:
        yield f"\n{told.left_out} lines in the middle are left out; the journal has them."


def _bars(episode: Episode) -> Iterator[str]:
    """The highest share of max in each piece of the time; an eighth of max a step."""
    looks = episode.looks
    from_ns, to_ns = looks[0].at_ns, max(looks[-1].at_ns, looks[0].at_ns + 1)
    highest = [0.0] * _WIDTH
    for one, other in pairwise((*looks, looks[-1])):
        at, until = (min(_WIDTH - 1, (look.at_ns - from_ns) * _WIDTH // (to_ns - from_ns)) for look in (one, other))
        first, last = one.memory.unreclaimable_ratio, other.memory.unreclaimable_ratio
        for cell in range(at, until + 1):  # straight from one look to the next
            highest[cell] = max(highest[cell], first + (last - first) * (cell - at) / max(1, until - at))
    yield "".join(_BARS[min(7, int(ratio * 8))] for ratio in highest)
    most = max(looks, key=lambda look: look.memory.unreclaimable_ratio)
    share = percent(most.memory.unreclaimable_ratio)
    yield f"{clock(from_ns)} to {clock(to_ns)} UTC, at most {share} of max at {clock(most.at_ns)}; max is {_BARS[-1]}"


def _plain(text: str) -> str:
    return _MARKUP.sub(r"\\\1", text)
