"""The picture of `governor watch`: data in, lines of rich text out, each as wide as was asked for. Pure.

Everything is said by words or shapes as well as by colour: NO_COLOR and colour-blind people lose nothing. The only
module of watch that imports rich; nothing here is markup, so no name can be any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from governor.journal import printable
from governor.record import LEVEL_NAMES
from governor.watch_all import Row
from governor.watch_lines import clock, entry_words, level_of_row, state_words
from governor.watch_model import LEVEL_WORDS, Entry, Picture, short_bytes, short_time
from governor.watch_overview import Overview
from governor.watch_sample import Sample

_MIB = 1 << 20
_COLOURS = {"below": "green", "compact": "yellow", "arm": "yellow", "brake": "red", "last": "bold red"}
_LABEL = 9  # cells before what a line says
_LEAST_LOG = 3
_ROOMY = 28  # lines, from which on parts are set apart by empty ones
_NAME = 60  # cells of a name in a table, at most
_ID = re.compile(r"(?:.*-)?[0-9a-f]{32,}(?:\.scope)?")  # a container's, which TARGET takes by how it begins
_LOUD = frozenset({"braked", "terminating", "killed", "oom_kill", "oom_kills", "nothing_left", "shed"})
KEYS_ONE = "space hold   b back   q quit"
KEYS_MANY = "space hold   s sort   up/down, enter open   q quit"
Lines = list[Text]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What bars are made of: anon, kernel, cache, free; a level's mark; the steps of a sparkline; who is chosen."""

    bar: str
    mark: str
    steps: str
    chosen: str


BLOCKS = Glyphs("█▓░·", "▲", "▁▂▃▄▅▆▇█", "▶")
ASCII = Glyphs("#=-.", "^", "_.-:=+*#", ">")


def one(picture: Picture, width: int, height: int, glyphs: Glyphs, can_go_back: bool = False) -> Lines:
    """One memcg, at most `height` lines."""
    lines = [_header(picture.name, picture.source, picture.time_s, picture.holds, width)]
    lines.append(Text(_cut(printable(picture.cgroup), width), "dim"))
    if picture.sample is None:
        lines += [Text(), Text("the memcg is gone", "bold"), Text()]
        lines += _log(picture.log, max(0, height - len(lines) - 1), width)  # why, if it was told
        return _closed(lines, _keys(can_go_back), width, height)
    gap = [Text()] if height >= _ROOMY else []
    lines += [*gap, _fit(_amounts(picture), width), *_bar(picture, picture.sample, width, glyphs)]
    lines += [*gap, *_figures(picture, picture.sample, width, glyphs)]
    lines += [*gap, *_governed(picture, width)]
    room = height - len(lines) - 1 - 2 * len(gap)  # for the processes and the log; the keys are the last line
    processes = min(len(picture.processes), max(1, room // 2 - 1))
    if picture.processes and room >= 3:
        lines += [*gap, *_processes(picture, processes, width)]
    if picture.log and (room := height - len(lines) - 1 - len(gap)) > 0:
        lines += [*gap, *_log(picture.log, room, width)]
    return _closed(lines, _keys(can_go_back), width, height)


def many(overview: Overview, width: int, height: int, glyphs: Glyphs) -> Lines:
    """A table, and what happened below it; at most `height` lines."""
    shown, log = rows_and_log(height, len(overview.log))
    title = f"{printable(overview.title)}: {overview.count}"
    lines = [_header(title, overview.source, overview.time_s, overview.holds, width), Text()]
    name_cells = max(10, min(_NAME, width - 2 - 9 - 9 - 7 - 9 - 18))
    head = f"  {'':{name_cells}}{'usage':>9}{'max':>9}{'%':>7}{'MiB/s':>9}  state"
    lines.append(Text(_cut(head, width), "dim"))
    first = max(0, min(overview.selected - shown + 1, len(overview.rows) - shown))
    for number, row in enumerate(overview.rows[first : first + shown], first):
        lines.append(_row(row, number == overview.selected, name_cells, width, glyphs))
    if log:
        lines += [Text(), *_log(overview.log, log, width)]
    return _closed(lines, f"{KEYS_MANY}   by {overview.sort}", width, height)


def rows_and_log(height: int, entries: int) -> tuple[int, int]:
    """How many lines a table and the log below it get."""
    room = max(1, height - 5)
    log = min(entries, max(_LEAST_LOG, room // 4)) if room > 8 else 0
    return room - log - (1 if log else 0), log


# Parts of one memcg's picture


def _header(name: str, source: str, time_s: float, holds: bool, width: int) -> Text:
    at = f"{'HELD  ' if holds else ''}{clock(time_s)}"
    room = width - cell_len(at) - 2
    left = _cut(printable(name), max(10, room - 20))
    by = _cut(f"  by {printable(source)}", max(0, room - cell_len(left)))
    header = Text.assemble((left, "bold"), (by, "dim"))
    header.append(" " * max(1, width - header.cell_len - cell_len(at)))
    header.append(at, "reverse" if holds else "")
    return header


def _amounts(picture: Picture) -> Text:
    sample = picture.sample
    assert sample
    memory = sample.memory
    colour = _COLOURS[picture.level]
    text = Text("unreclaimable ")
    held = short_bytes(memory.unreclaimable_bytes)
    if memory.max_bytes > 0:
        whole = short_bytes(memory.max_bytes)
        held = held.partition(" ")[0] if held.split()[1] == whole.split()[1] else held
        text.append(f"{held} of {whole}, {100 * memory.unreclaimable_ratio:.1f} %", colour)
    else:
        text.append(f"{held}, no limit", colour)
    text.append(f"   {picture.fill_rate_bytes / _MIB:+.1f} MiB/s")
    if picture.time_to_max_s is not None and picture.time_to_max_s < 3600:
        near = picture.time_to_max_s < 10
        text.append(f"   max in {short_time(picture.time_to_max_s)}", "bold red" if near else "")
    if sample.frozen:
        text.append("   FROZEN", "bold cyan")
    return text


def _bar(picture: Picture, sample: Sample, width: int, glyphs: Glyphs) -> Lines:
    memory = sample.memory
    whole = max(memory.max_bytes, memory.usage_bytes, 1) if memory.max_bytes > 0 else max(memory.usage_bytes, 1)
    kinds = [sample.anon_bytes, sample.kernel_bytes, sample.cache_bytes]
    colours = [_COLOURS[picture.level], "magenta", "blue", "dim"]
    bar, done, upto = Text(), 0, 0
    for size, glyph, colour in zip(kinds, glyphs.bar, colours, strict=False):
        upto += size
        cells = round(width * upto / whole) - done
        bar.append(glyph * cells, colour)
        done += cells
    bar.append(glyphs.bar[3] * (width - done), "dim")
    lines = [bar]
    if memory.max_bytes > 0:
        lines.append(_marks(picture.levels, width, glyphs))
    sizes = {"anon": kinds[0], "kernel": kinds[1], "file": kinds[2]}
    if memory.max_bytes > 0:
        sizes["free to max"] = sample.free_bytes
    lines.append(_legend(sizes, colours, width, glyphs))
    if memory.max_bytes > 0 and sample.limit != "its own limit":
        lines.append(Text(_cut(printable(f"limit: {sample.limit}"), width), "dim"))
    return lines


def _legend(sizes: Mapping[str, int], colours: list[str], width: int, glyphs: Glyphs) -> Text:
    """What the bar is made of; closer together where there is little room."""
    parts = [
        Text.assemble((f"{glyph} ", colour), f"{name} {short_bytes(size)}")
        for (name, size), glyph, colour in zip(sizes.items(), glyphs.bar, colours, strict=False)
    ]
    whole = (Text(gap).join(parts) for gap in ("   ", "  ", " "))
    return next((each for each in whole if each.cell_len <= width), _fit(Text(" ").join(parts), width))


def _marks(levels: Mapping[str, float], width: int, glyphs: Glyphs) -> Text:
    """A mark below the cell where each level engages, with its name to the left of it where there is room."""
    cells = [" "] * width
    free_from = 0
    for name in LEVEL_NAMES[1:]:
        share = levels.get(name)
        if share is None or share > 1:
            continue
        at = min(width - 1, round(width * share) - 1)
        word, figure = LEVEL_WORDS[name], f"{100 * share:.0f}"
        labels = (each for each in (f"{word} {figure}", figure, word) if at - len(each) - 1 >= free_from)
        label = next(labels, "")
        if at < free_from:
            continue
        for offset, character in enumerate(label):
            cells[at - len(label) + offset] = character
        cells[at] = glyphs.mark
        free_from = at + 1
    return Text("".join(cells).rstrip(), "dim")


def _figures(picture: Picture, sample: Sample, width: int, glyphs: Glyphs) -> Lines:
    lines = []
    room = width - _LABEL
    if picture.history:
        spark = _spark(picture.history[-room:], glyphs)
        lines.append(_labelled(f"{min(room, len(picture.history))} s", Text(spark, _COLOURS[picture.level])))
    if sample.stalls:
        some, full = picture.stalled_usec
        text = Text()
        text.append(
            f"some {100 * sample.stalls.some_ratio:.1f} %", "yellow" if sample.stalls.some_ratio >= 0.1 else ""
        )
        text.append(
            f"  full {100 * sample.stalls.full_ratio:.1f} %", "red" if sample.stalls.full_ratio >= 0.1 else ""
        )
        text.append(f"  of 10 s;  in the last second {some // 1000} ms, {full // 1000} ms")
        lines.append(_fit(_labelled("stalls", text), width))
    if picture.changes:
        text = Text()
        for change in picture.changes:
            text.append(f"{change.name} {change.count}")
            if change.lately:
                text.append(f" +{change.lately}", "bold red" if change.name.startswith("oom") else "bold yellow")
            text.append("   ")
        text.rstrip()
        lines.append(_fit(_labelled("events", text), width))
    return lines


def _governed(picture: Picture, width: int) -> Lines:
    standing = picture.standing
    lines = []
    if standing:
        state = state_words(standing, bool(picture.sample and picture.sample.frozen))
        held = standing.get("frozen_for_ms") is not None or standing.get("phase") not in ("watching", None)
        text = Text(printable(state), "bold cyan" if held else "")
        for key in ("policy", "agent_pid", "source", "brake"):
            told = f"   {key.removesuffix('_pid')} {printable(str(standing.get(key) or '-'))}"
            if _LABEL + text.cell_len + cell_len(told) <= width:
                text.append(told)
        lines.append(_fit(_labelled("state", text), width))
        tiers = standing.get("tiers") or {}
        known = [
            f"{printable(str(tier))} {printable(str(status))}" for tier, status in tiers.items() if status != "none"
        ]
        if known:
            lines.append(_fit(_labelled("tiers", Text("   ".join(known))), width))
        if decided := standing.get("decided"):
            ago = short_time(decided["ago_s"]) if decided["ago_s"] else "now"
            ago = f"{ago} ago" if decided["ago_s"] else ago
            words = f"{decided['what']}, {ago}: {decided['reason']}"
            lines += _wrapped("decided", printable(words), width)
        if freed := {tier: size for tier, size in (standing.get("freed_bytes") or {}).items() if size}:
            words = "   ".join(f"{printable(str(tier))} {short_bytes(size)}" for tier, size in freed.items())
            lines.append(_fit(_labelled("freed", Text(words, "green")), width))
    return [*lines, *_wrapped("next", printable(picture.next), width)]


def _processes(picture: Picture, count: int, width: int) -> Lines:
    lines = [Text(_cut(f"{'PID':>8}  {'process':22}{'holds':>13}{'grows':>14}", width), "dim")]
    for number, process in enumerate(picture.processes[:count]):
        who = "agent" if process.is_agent else "tool" if process.of_agent else ""
        grows = process.growth_bytes >= _MIB
        text = Text(f"{process.pid:>8}  ")
        text.append(set_cell_size(printable(process.comm), 16), "bold" if grows and not number else "")
        text.append(f"{who:6}{short_bytes(process.held_bytes):>13}")
        text.append(f"{process.growth_bytes / _MIB:+10.1f} MiB/s", "red" if grows else "")
        if grows and not number:
            text.append("  bursts", "bold red")
        lines.append(_fit(text, width))
    return lines


# Parts of the table


def _row(row: Row, is_selected: bool, name_cells: int, width: int, glyphs: Glyphs) -> Text:
    memory, level = row.memory, level_of_row(row)
    told = (row.standing or {}).get("memory")
    max_bytes = told["max_bytes"] if told else memory.max_bytes if memory else -1
    state = state_words(row.standing, False) if row.standing else "-"
    if (row.standing or {}).get("frozen_for_ms") is not None:
        state = state.partition(", ")[2]  # the phase says less
    name = printable(row.target.name)
    if cell_len(name) > name_cells - 1:  # the end says more than the beginning, but of an id
        name = _cut(name, name_cells - 1) if _ID.fullmatch(name) else "..." + name[-(name_cells - 4) :]
    text = Text(f"{glyphs.chosen if is_selected else ' '} ")
    text.append(set_cell_size(name, name_cells), "bold" if is_selected else "")
    text.append(f"{row.usage_bytes / _MIB:9.1f}{_limit(max_bytes):>9}")
    text.append(f"{100 * row.ratio:7.1f}" if row.ratio else f"{'-':>7}", _COLOURS[level] if row.ratio else "dim")
    text.append(f"{row.growth_bytes / _MIB:+9.1f}", "red" if row.growth_bytes >= 64 * _MIB else "")
    text.append(f"  {state}", "" if row.standing else "dim")
    return _fit(text, width)


def _limit(max_bytes: int) -> str:
    return f"{max_bytes / _MIB:.0f}" if max_bytes > 0 else "-"


# Small parts


def _log(log: tuple[Entry, ...], room: int, width: int) -> Lines:
    """The last of it, in so many lines; none begins in its middle."""
    lines: Lines = []
    for entry in reversed(log):
        loud = entry.kind in _LOUD
        label = f"{clock(entry.time_s)} "
        told = _wrapped(label, entry_words(entry), width, "bold red" if loud else "")
        if len(told) + len(lines) > room:
            return lines or told[:room]
        lines = [*told, *lines]
    return lines


def _labelled(label: str, text: Text) -> Text:
    return Text.assemble((f"{label:{_LABEL}}", "dim"), text)


def _wrapped(label: str, words: str, width: int, style: str = "") -> Lines:
    """At most two lines, broken between words."""
    room = max(10, width - _LABEL)
    first, rest = words, ""
    if cell_len(words) > room:
        at = words.rfind(" ", 0, room)
        at = at if at > room // 2 else room
        first, rest = words[:at], words[at:].strip()
    lines = [_fit(_labelled(label, Text(first, style)), width)]
    return [*lines, _labelled("", Text(_cut(rest, room), style))] if rest else lines


def _spark(history: Iterable[float], glyphs: Glyphs) -> str:
    top = len(glyphs.steps) - 1
    return "".join(glyphs.steps[min(top, max(0, int(share * (top + 1))))] for share in history)


def _keys(can_go_back: bool) -> str:
    return KEYS_ONE if can_go_back else KEYS_ONE.replace("b back   ", "")


def _closed(lines: Lines, keys: str, width: int, height: int) -> Lines:
    """With the keys in the last line, whatever has to give way for them."""
    lines = lines[: max(1, height - 1)]
    filled = [*lines, *[Text()] * (height - 1 - len(lines)), Text(keys, "dim")]
    return [_fit(line, width) for line in filled[:height]]


def _cut(text: str, cells: int) -> str:
    return text if cell_len(text) <= cells else set_cell_size(text, max(0, cells - 3)) + "..."[: max(0, cells)]


def _fit(text: Text, width: int) -> Text:
    text.truncate(width, overflow="crop")
    return text
