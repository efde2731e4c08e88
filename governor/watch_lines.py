"""What `governor watch` prints where no picture is drawn: a line a second for people, or with --json for programs.

--json, one object a line; fields are only ever added. Each has `type`, `time` (ISO 8601, UTC) and `target`: an object
of name, cgroup, namespace, pod and container, names escaped, "" unknown. By type:

source     source: by what it is seen: "governor PID", "bpf (fentry), ...", "psi", "poll" ...
sample     once a second, of each memcg that is watched:
             memory           usage_bytes, max_bytes (-1: no limit), high_bytes (-1: none), anon_bytes (with shmem),
                              kernel_bytes, cache_bytes, headroom_bytes, unreclaimable_bytes, unreclaimable_ratio
                              (0-1 of max), limit (whose, in words)
             level            below, compact, arm (clear), brake or last (kill); levels: where each of them is
             fill_rate_bytes  growth per second; time_to_max_s: null where it does not grow
             stalls           some_ratio, full_ratio (0-1, of ten seconds), some_usec, full_usec (of the last second);
                              null where the kernel does not tell
             events           memory.events: for each its count, and `since`: since watch began
             frozen           whether the memcg is frozen
             processes        the ten that grew most: pid, comm, held_bytes, growth_bytes (per second), is_agent,
                              of_agent (descends from it)
             governor         as in `governor status --json`; null: nobody governs it, or tells
             next             in words, what is done next if it goes on like this
crossing   level, rising, unreclaimable_bytes, max_bytes, text; pid where it is known
event      kind, text: what a governor did (kinds as in the journal), and decided, oom_kill, gone, governor_gone
end        seconds, samples, first_bytes, last_bytes, peak_bytes, max_bytes, peak_ratio, worst_rate_bytes, crossings,
           events, changes, freed_bytes, grew_most: what there was to be seen

Of many memcgs (no TARGET, or a pod of several containers) a sample has only memory (null where it was not looked at
closely), level, fill_rate_bytes (of the usage) and governor; there is no line of type end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

import orjson

from governor.journal import printable
from governor.watch_all import Row
from governor.watch_model import (
    DEFAULT_LEVELS,
    LEVEL_WORDS,
    Entry,
    Picture,
    Summary,
    level_of,
    short_bytes,
    short_time,
)
from governor.watch_sample import Sample
from governor.watch_target import Target

PROCESSES = 10
_MIB = 1 << 20

Fields = dict[str, Any]


def encode(kind: str, target: Target | None, time_s: float, fields: Mapping[str, Any]) -> str:
    """One line of --json, without its end."""
    about = (
        {
            "name": printable(target.name),
            "cgroup": printable(target.path),
            "namespace": printable(target.namespace),
            "pod": printable(target.pod),
            "container": printable(target.container),
        }
        if target
        else None
    )
    at = datetime.fromtimestamp(time_s, UTC).isoformat(timespec="milliseconds")
    return orjson.dumps({"type": kind, "time": at, "target": about, **fields}, default=str).decode()


def sample_fields(picture: Picture) -> Fields:
    """Of a line of type sample."""
    sample, stalled = picture.sample, picture.stalled_usec
    assert sample, "what is gone has no sample"
    stalls = sample.stalls
    return {
        "memory": {
            **memory_fields(sample),
            "high_bytes": sample.high_bytes,
            "limit": printable(sample.limit),
        },
        "level": picture.level,
        "levels": dict(picture.levels),
        "fill_rate_bytes": picture.fill_rate_bytes,
        "time_to_max_s": None if picture.time_to_max_s is None else round(picture.time_to_max_s, 3),
        "stalls": stalls
        and {
            "some_ratio": stalls.some_ratio,
            "full_ratio": stalls.full_ratio,
            "some_usec": stalled[0],
            "full_usec": stalled[1],
        },
        "events": {change.name: {"count": change.count, "since": change.since} for change in picture.changes},
        "frozen": sample.frozen,
        "processes": [
            {**asdict(process), "comm": printable(process.comm)} for process in picture.processes[:PROCESSES]
        ],
        "governor": picture.standing,
        "next": picture.next,
    }


def memory_fields(sample: Sample) -> Fields:
    """What it holds."""
    memory = sample.memory
    return {
        "usage_bytes": memory.usage_bytes,
        "max_bytes": memory.max_bytes,
        "anon_bytes": sample.anon_bytes,
        "kernel_bytes": sample.kernel_bytes,
        "cache_bytes": sample.cache_bytes,
        "headroom_bytes": sample.headroom_bytes,
        "unreclaimable_bytes": memory.unreclaimable_bytes,
        "unreclaimable_ratio": round(memory.unreclaimable_ratio, 4),
    }


def row_fields(row: Row) -> Fields:
    """Of a line of type sample, of one of many."""
    memory = None if row.memory is None else memory_fields(Sample(0, row.memory))
    return {
        "memory": memory,
        "level": level_of_row(row),
        "fill_rate_bytes": row.growth_bytes,
        "governor": row.standing,
    }


def level_of_row(row: Row) -> str:
    """The highest level that it has reached."""
    return level_of((row.standing or {}).get("levels") or DEFAULT_LEVELS, row.ratio)


def entry_fields(entry: Entry) -> tuple[str, Fields]:
    """The type of its line, and the fields."""
    text = printable(entry.text)
    if entry.kind == "source":
        return "source", {"source": text}
    if entry.kind == "crossing":
        return "crossing", {**entry.fields, "text": text}
    return "event", {"kind": printable(entry.kind), "text": text, **entry.fields}


# For people


def clock(time_s: float) -> str:
    """Of the day, here."""
    return time.strftime("%H:%M:%S", time.localtime(time_s))


def sample_text(picture: Picture) -> str:
    """One line."""
    sample = picture.sample
    assert sample, "what is gone has no line"
    memory = sample.memory
    parts = [f"unreclaimable {_mib(memory.unreclaimable_bytes)}"]
    if memory.max_bytes > 0:
        parts[0] += f" of {_mib(memory.max_bytes)} MiB ({100 * memory.unreclaimable_ratio:5.1f} %)"
    parts += [
        f"anon {_mib(sample.anon_bytes)}",
        f"kernel {_mib(sample.kernel_bytes)}",
        f"file {_mib(sample.cache_bytes)}",
        f"{picture.fill_rate_bytes / _MIB:+8.1f} MiB/s",
    ]
    if picture.time_to_max_s is not None and picture.time_to_max_s < 3600:
        parts.append(f"max in {short_time(picture.time_to_max_s)}")
    if sample.stalls and (sample.stalls.some_ratio or sample.stalls.full_ratio):
        parts.append(f"stalls {100 * sample.stalls.some_ratio:.0f}/{100 * sample.stalls.full_ratio:.0f} %")
    if picture.level != "below":
        parts.append(LEVEL_WORDS[picture.level])
    if state := state_words(picture.standing, sample.frozen):
        parts.append(state)
    if picture.processes and picture.processes[0].growth_bytes >= _MIB:
        first = picture.processes[0]
        parts.append(f"{printable(first.comm)} ({first.pid}) {first.growth_bytes / _MIB:+.1f} MiB/s")
    return f"{clock(picture.time_s)}  {'  '.join(parts)}"


def row_text(row: Row, time_s: float) -> str:
    """One line, of one of many."""
    memory = row.memory
    held = "" if memory is None else f"unreclaimable {_mib(memory.unreclaimable_bytes)}"
    if memory and memory.max_bytes > 0:
        held += f" of {_mib(memory.max_bytes)} MiB ({100 * row.ratio:5.1f} %)"
    state = state_words(row.standing, False) or ("" if row.standing else "not governed")
    name = printable(row.target.name)
    growth = f"{row.growth_bytes / _MIB:+.1f} MiB/s"
    return f"{clock(time_s)}  {name}  usage {_mib(row.usage_bytes)} MiB  {held}  {growth}  {state}".rstrip()


def state_words(standing: Mapping[str, Any] | None, frozen: bool) -> str:
    """The phase, and what of it a person has to know; "" where there is nothing to say."""
    if standing is None:
        return "frozen" if frozen else ""
    state = str(standing.get("phase", ""))
    if standing.get("frozen_for_ms") is not None:
        how = "stopped" if standing.get("brake") == "stop" else "frozen"
        state += f", {how} {short_time(standing['frozen_for_ms'] / 1000)}"
    elif frozen:
        state += ", frozen"
    if state == "watching" and standing.get("in_episode"):
        state = "in episode"
    return f"{state}, dry run" if standing.get("dry_run") else state


def entry_text(entry: Entry) -> str:
    """One line, marked."""
    return f"{clock(entry.time_s)}  * {entry_words(entry)}"


def entry_words(entry: Entry) -> str:
    """The same without the time."""
    says_it = entry.text.startswith(entry.kind) or not entry.text
    return printable((entry.text or entry.kind) if says_it else f"{entry.kind}: {entry.text}")


def summary_text(summary: Summary) -> list[str]:
    """What there was to be seen, in a few lines."""
    changed = summary.last_bytes - summary.first_bytes
    lines = [
        f"{printable(summary.name)}: watched for {short_time(summary.seconds)}, {summary.samples} looks; "
        f"{short_bytes(summary.first_bytes)} at first, {short_bytes(summary.last_bytes)} at last "
        f"({'+' if changed >= 0 else '-'}{short_bytes(abs(changed))})"
    ]
    peak = f"peak {short_bytes(summary.peak_bytes)}"
    if summary.peak_ratio:
        peak += f", {100 * summary.peak_ratio:.1f} % of max"
    lines.append(f"{peak}; grew at most by {short_bytes(summary.worst_rate_bytes)} in a second")
    if summary.grew_most:
        lines[-1] += f", {printable(summary.grew_most)} most"
    found = [f"{summary.crossings} crossing{'s' * (summary.crossings != 1)} upwards"]
    found += [f"{printable(kind)} {count}" for kind, count in summary.events.items()]
    lines.append("; ".join(found))
    if summary.changes:
        lines.append("memory.events: " + ", ".join(f"{name} +{count}" for name, count in summary.changes.items()))
    if summary.freed_bytes:
        freed = ", ".join(f"{printable(tier)} {short_bytes(size)}" for tier, size in summary.freed_bytes.items())
        lines.append(f"freed: {freed}")
    return lines


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / _MIB:7.1f}"
