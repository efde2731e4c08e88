"""A report as one HTML file: nothing in it runs, and nothing in it is loaded from anywhere.

The template escapes everything (autoescape); should that ever fail, the page's own policy forbids scripts, and every
style but the one sheet, which it names by its hash.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from pathlib import Path

import jinja2

from governor.report_chart import Chart
from governor.report_figures import clock, size
from governor.report_timeline import KINDS, of_episode, of_history, of_the_burst
from governor.report_words import Document, Told

_TEMPLATE = "report.html.jinja"
_SHEET = "report.css"
_FIGURES_LIMIT = 200  # looks in the table of an episode
_HERE = Path(__file__).parent


def render(document: Document) -> str:
    """The whole page."""
    sheet = (_HERE / _SHEET).read_text()
    sheet_hash = base64.b64encode(hashlib.sha256(sheet.encode()).digest()).decode()
    return _template().render(
        document=document,
        sheet=sheet,
        sheet_hash=sheet_hash,
        kinds=[(css, name) for css, name, _ in KINDS],
        charts={told.number: _charts(told) for told in document.episodes},
        calm=_calm(document),
        figures={told.number: _figures(told) for told in document.episodes},
        clock=clock,
        size=size,
    )


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE)


def _charts(told: Told) -> list[tuple[str, list[Chart]]]:
    """What each picture shows, and the picture for a wide and for a narrow window."""
    pictures = (("The burst", of_the_burst), ("The whole episode", of_episode))
    drawn = [
        (name, [draw(told.episode, told.rows, is_narrow) for is_narrow in (False, True)]) for name, draw in pictures
    ]
    return [(name, [chart for chart in charts if chart]) for name, charts in drawn if any(charts)]


def _calm(document: Document) -> list[Chart]:
    """Where nothing happened: all that was looked at."""
    history = document.history
    if document.episodes or history is None:
        return []
    policy = history.begun[-1].policy if history.begun else None
    charts = (of_history(history, policy, is_narrow) for is_narrow in (False, True))
    return [chart for chart in charts if chart]


def _figures(told: Told) -> list[tuple[str, ...]]:
    """The looks as a table, thinned evenly."""
    looks = told.episode.looks
    step = len(looks) // _FIGURES_LIMIT + 1
    return [
        (
            clock(look.at_ns),
            f"{100 * look.memory.unreclaimable_ratio:.1f}",
            *(size(value) for value in (look.memory.usage_bytes, look.memory.max_bytes, look.memory.anon_bytes)),
            size(look.memory.file_lru_bytes),
            size(look.memory.slab_reclaimable_bytes),
            size(look.agent_bytes) if look.agent_bytes else "",
        )
        for look in looks[::step]
    ]
