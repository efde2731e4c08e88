"""The timeline of an episode as data for an SVG: memory by kind against the levels, what was done. Pure.

The lower areas are what cannot be reclaimed, which is what levels are about; the pale ones above are not counted.
Between two looks everything is drawn straight.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from governor import record
from governor.cgroup import MemoryState
from governor.policy import SECOND, Policy, levels
from governor.report_chart import Chart, Flag, Label, Mark, Scale, Shape, x_ticks, y_ticks
from governor.report_episodes import Episode
from governor.report_figures import clock, duration, percent, size, times
from governor.report_read import Crossed, History, Hold, Look
from governor.report_trace import Row, in_use

_Drawn = TypeVar("_Drawn", Crossed, Hold)
WIDE, NARROW = (940, 380), (380, 340)
_MARGIN = 0.04  # of the time that is shown, before and after
_SHORTEST_NS = SECOND // 5
_ZOOM_BELOW = 1 / 3  # a burst that takes less of the whole is drawn again by itself
_ZOOM_JOINS_NS = SECOND  # holds that follow each other so soon are one burst
_POINTS_LIMIT, _MARKS_LIMIT = 700, 200
_LABEL_HEIGHT, _DIGIT_WIDTH, _FLAG_WIDTH = 15, 7.5, 12


def _all_bytes(memory: MemoryState) -> int:
    """Usage; by its parts, which were read a moment later."""
    return max(memory.usage_bytes, memory.unreclaimable_bytes + memory.slab_reclaimable_bytes)


KINDS: tuple[tuple[str, str, Callable[[MemoryState], int]], ...] = (  # from below: class, name, up to here
    ("anon", "anonymous", lambda memory: min(memory.anon_bytes, memory.unreclaimable_bytes)),
    ("kernel", "tmpfs, shared and kernel", lambda memory: memory.unreclaimable_bytes),
    ("slab", "reclaimable slab", lambda memory: memory.unreclaimable_bytes + memory.slab_reclaimable_bytes),
    ("file", "file cache", _all_bytes),
)


def of_episode(episode: Episode, rows: Iterable[Row], is_narrow: bool) -> Chart | None:
    """The whole episode; None where nothing was looked at."""
    if not episode.looks:
        return None
    marks = [row.at_ns for row in rows if row.number]
    to_ns = max(episode.looks[-1].at_ns, *marks, *(one.at_ns for one in episode.crossings), episode.from_ns)
    return _chart(episode, episode.looks[0].at_ns, to_ns, list(rows), is_narrow)


def of_the_burst(episode: Episode, rows: Iterable[Row], is_narrow: bool) -> Chart | None:
    """From where memory began to grow to the end of the first brake; None where the whole shows it well enough."""
    if not episode.holds or not episode.looks:
        return None
    first = episode.holds[0]
    until_ns = first.to_ns or first.from_ns
    for hold in episode.holds[1:]:
        if hold.from_ns - until_ns > _ZOOM_JOINS_NS:
            break
        until_ns = hold.to_ns or hold.from_ns
    crossed_ns = min((one.at_ns for one in episode.crossings), default=first.from_ns)
    from_ns = max(first.from_ns - SECOND, min(crossed_ns, first.from_ns) - SECOND // 10)
    to_ns = until_ns + max(SECOND // 5, (until_ns - from_ns) // 3)
    if to_ns - from_ns >= _ZOOM_BELOW * (episode.looks[-1].at_ns - episode.looks[0].at_ns):
        return None
    return _chart(episode, from_ns, to_ns, list(rows), is_narrow)


def of_history(history: History, policy: Policy | None, is_narrow: bool) -> Chart | None:
    """Everything that was looked at, where nothing happened."""
    if len(history.looks) < 2:
        return None
    whole = Episode(
        history.target, history.looks[0].at_ns, history.last_ns, None, tuple(history.looks), (), (), (), (), (), None
    )
    return _chart(whole, whole.from_ns, history.looks[-1].at_ns, [], is_narrow, policy)


def _chart(
    episode: Episode, from_ns: int, to_ns: int, rows: list[Row], is_narrow: bool, policy: Policy | None = None
) -> Chart:
    policy = policy or episode.policy
    width, height = NARROW if is_narrow else WIDE
    margin_ns = int(max(_SHORTEST_NS / 2, _MARGIN * (to_ns - from_ns)))
    from_ns, to_ns = from_ns - margin_ns, to_ns + margin_ns
    looks = _thinned(_with_brakes(episode, from_ns, to_ns))
    top_bytes = max(1.0, *(1.04 * max(look.memory.max_bytes, _shown_bytes(look)) for look in looks))
    right = width - (112 if is_narrow else 118)
    scale = Scale(from_ns, to_ns, top_bytes, 62, right, 44, height - 30)
    drawn_levels = tuple(_levels(policy))
    holds = [hold for hold in episode.holds if _overlaps(hold, from_ns, to_ns)]
    crossings = [one for one in episode.crossings if from_ns <= one.at_ns <= to_ns]
    return Chart(
        css="narrow" if is_narrow else "wide",
        width=width,
        height=height,
        scale=scale,
        description=_description(episode, looks),
        areas=tuple(_areas(looks, scale)),
        counted=_line(((look.at_ns, look.memory.unreclaimable_bytes) for look in looks), scale),
        levels=tuple(_level(name, ratio, looks, scale) for name, ratio in drawn_levels),
        level_labels=_level_labels(drawn_levels, looks, scale, is_narrow),
        holds=tuple(_held(hold, scale, episode) for hold in _few(holds)),
        crossings=tuple(_crossing(one, looks, scale) for one in _few(crossings)),
        flags=_flags([row for row in rows if row.number and from_ns <= row.at_ns <= to_ns], scale),
        x_ticks=tuple(x_ticks(episode.from_ns, scale, 4 if is_narrow else 8)),
        y_ticks=tuple(y_ticks(scale)),
    )


# What was looked at


def _with_brakes(episode: Episode, from_ns: int, to_ns: int) -> list[Look]:
    """The looks of the time that is shown, one before and one after it, and what the brakes saw."""
    looks = [
        *episode.looks,
        *(Look(hold.from_ns, hold.memory) for hold in episode.holds if hold.memory.max_bytes > 0),
    ]
    looks.sort(key=lambda look: look.at_ns)
    before = [look for look in looks if look.at_ns < from_ns][-1:]
    after = [look for look in looks if look.at_ns > to_ns][:1]
    within = [look for look in looks if from_ns <= look.at_ns <= to_ns]
    ends = [*(_between(before[0], within[0], from_ns) if before and within else [])]
    ends_after = [*(_between(within[-1], after[0], to_ns) if after and within else [])]
    return [*ends, *within, *ends_after] or [*before, *after]


def _between(first: Look, second: Look, at_ns: int) -> list[Look]:
    """The look that a straight line puts there."""
    share = (at_ns - first.at_ns) / max(1, second.at_ns - first.at_ns)
    pairs = zip(first.memory, second.memory, strict=True)
    return [Look(at_ns, MemoryState(*(int(one + share * (other - one)) for one, other in pairs)))]


def _thinned(looks: list[Look]) -> list[Look]:
    """Of neighbours that no picture could tell apart the highest, and always the ends."""
    step = len(looks) // _POINTS_LIMIT + 1
    if step == 1:
        return looks
    groups = (looks[at : at + step] for at in range(0, len(looks), step))
    kept = [max(group, key=lambda look: look.memory.unreclaimable_bytes) for group in groups]
    return [looks[0], *kept[1:-1], looks[-1]]


def _shown_bytes(look: Look) -> int:
    return KINDS[-1][2](look.memory)


def _areas(looks: list[Look], scale: Scale) -> Iterable[Shape]:
    below = [(look.at_ns, 0) for look in looks]
    for css, name, up_to in KINDS:
        edge = [(look.at_ns, up_to(look.memory)) for look in looks]
        most = max(top - bottom for (_, top), (_, bottom) in zip(edge, below, strict=True))
        path = f"{_line(edge, scale)} {_line(reversed(below), scale).replace('M', 'L', 1)} Z"
        yield Shape(css, f"{name}: at most {size(most)}", path)
        below = edge


def _line(points: Iterable[tuple[int, float]], scale: Scale) -> str:
    return "M " + " L ".join(f"{scale.x(at_ns)} {scale.y(size_bytes)}" for at_ns, size_bytes in points)


def _description(episode: Episode, looks: list[Look]) -> str:
    first, last = looks[0], looks[-1]
    most = max(looks, key=lambda look: look.memory.unreclaimable_ratio)
    return (
        f"Memory over {duration(last.at_ns - first.at_ns)} from {clock(first.at_ns)} UTC: first "
        f"{in_use(first.memory)}, "
        f"at most {in_use(most.memory)} at {clock(most.at_ns)}, last {in_use(last.memory)}. "
        f"Held {times(len(episode.holds))}. The trace below tells what the numbers are."
    )


# Levels


def _levels(policy: Policy) -> Iterable[tuple[str, float]]:
    yield "max", 1.0
    engage_ppm = levels(policy).engage_ppm
    for level in range(record.LEVELS, 0, -1):
        if engage_ppm[level - 1] <= record.PPM:  # a policy without a brake has its levels above max
            yield record.LEVEL_NAMES[level], engage_ppm[level - 1] / record.PPM


def _level(name: str, ratio: float, looks: list[Look], scale: Scale) -> Shape:
    """Follows max, which may be changed."""
    points: list[tuple[int, float]] = []
    for look in looks:
        size_bytes = ratio * look.memory.max_bytes
        if points and points[-1][1] != size_bytes:
            points.append((look.at_ns, points[-1][1]))
        points.append((look.at_ns, size_bytes))
    points = [(scale.from_ns, points[0][1]), *_corners(points), (scale.to_ns, points[-1][1])]
    return Shape(f"level-{name}", f"{name}: {percent(ratio)} of max", _line(points, scale))


def _corners(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Without those that lie on a level stretch."""
    inner = zip(points, points[1:], points[2:], strict=False)
    return [points[0], *(here for one, here, other in inner if not one[1] == here[1] == other[1]), points[-1]]


def _level_labels(
    drawn: Iterable[tuple[str, float]], looks: list[Look], scale: Scale, is_narrow: bool
) -> tuple[Label, ...]:
    """At the right of each line, moved down where the one above is too near."""
    placed: list[Label] = []
    max_bytes = looks[-1].memory.max_bytes
    for name, ratio in drawn:
        line = scale.y(ratio * max_bytes)
        y = max(line, placed[-1].y + _LABEL_HEIGHT) if placed else line
        words = f"max {size(max_bytes)}" if name == "max" and not is_narrow else name
        text = words if name == "max" else f"{name} {100 * ratio:g} %"
        placed.append(Label(scale.right + 12, y, text, f"level-{name}", line))
    return tuple(placed)


# What happened


def _few(marks: list[_Drawn]) -> list[_Drawn]:
    """Of more than could be told apart every second one, third ..."""
    return marks[:: len(marks) // _MARKS_LIMIT + 1]


def _overlaps(hold: Hold, from_ns: int, to_ns: int) -> bool:
    return hold.from_ns <= to_ns and (hold.to_ns or to_ns) >= from_ns


def _held(hold: Hold, scale: Scale, episode: Episode) -> Shape:
    until_ns = episode.until_ns(hold)
    x = scale.x(hold.from_ns)
    how = ("held" if hold.frozen else "could not be held") + ("" if hold.is_heard else " at most")
    title = f"{how} for {duration(until_ns - hold.from_ns)} from {clock(hold.from_ns)}"
    return Shape("hold" if hold.frozen else "not-held", title, x=x, width=max(1.5, scale.x(until_ns) - x))


def _crossing(one: Crossed, looks: list[Look], scale: Scale) -> Mark:
    near = min(looks, key=lambda look: abs(look.at_ns - one.at_ns))
    name = "max is near" if one.is_early and one.rising else record.LEVEL_NAMES[one.level]
    title = f"{clock(one.at_ns)} {'rising' if one.rising else 'falling'}: {name}, at most {percent(one.ratio)}"
    return Mark(scale.x(one.at_ns), scale.y(one.ratio * near.memory.max_bytes), one.rising, title)


def _flags(rows: list[Row], scale: Scale) -> tuple[Flag, ...]:
    """The numbers of the trace above the picture; where they would overlap, one flag from first to last."""
    flags: list[Flag] = []
    groups: list[list[Row]] = []
    for row in rows:
        groups.append([row])
        flags.append(_flag([row], scale))
        while len(flags) > 1 and flags[-2].x + flags[-2].width + 3 > flags[-1].x:
            later = groups.pop()
            groups[-1] += later
            flags[-2:] = [_flag(groups[-1], scale)]
    return tuple(flags)


def _flag(rows: list[Row], scale: Scale) -> Flag:
    lines = tuple(scale.x(row.at_ns) for row in rows)
    text = str(rows[0].number) if len(rows) == 1 else f"{rows[0].number}-{rows[-1].number}"
    width = _FLAG_WIDTH + _DIGIT_WIDTH * len(text)
    x = min(max((lines[0] + lines[-1] - width) / 2, scale.left), scale.right + 12 - width)
    css = "grave" if any(row.kind == "grave" for row in rows) else "usual"
    title = "; ".join(f"{row.number}: {row.clock} {row.what}" for row in rows[:8])
    return Flag(round(x, 1), width, text, css, title, tuple(dict.fromkeys(lines)))
