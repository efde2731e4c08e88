"""A report as JSON: one object. Times are UTC, `_ns` since the epoch, sizes bytes, ratios shares of max. Pure.

version     1; grows when a field goes or changes its meaning, not when one is added
target, span, remarks
episodes    newest first, of each:
    when, headline, from_ns, to_ns
    outcome     oom_killed, killed, terminated, shed, oom_kill, recycled, nothing_left, cleared, compacted, held or
                crossed: the gravest that happened
    dry_run     nothing of it was carried out
    answers     question, sentences, commands
    freed       tier, at_ns, bytes (null: unknown), is_use (null: not judged)
    restore     name, directory, base, files, command; null: there is nothing to restore
    looks       at_ns, memory (usage_bytes, max_bytes, anon_bytes, file_lru_bytes, slab_reclaimable_bytes),
                unreclaimable_ratio, agent_bytes
    crossings   at_ns, level (0 below, 1 compact, 2 arm, 3 brake, 4 last), rising, is_early, ratio,
                fill_rate_bytes, pid
    holds       from_ns, to_ns (null: not heard of), took_ns, memory, frozen, why_thawed ("not heard of": to_ns is the
                next brake or begin, the latest that it can have been)
    trace       at_ns, clock, offset, kind (signal, decision, done, grave), what, rule, values, decided, number
    left_out    lines of the trace
facts       by name
policy      by key, each as a policy file has it
"""

from __future__ import annotations

from typing import Any

import orjson

from governor.codec import plain
from governor.report_findings import of, restore_command
from governor.report_words import Document, Told

VERSION = 1


def render(document: Document) -> str:
    """The object, indented."""
    whole = {
        "version": VERSION,
        "target": document.title,
        "span": document.span,
        "remarks": document.remarks,
        "episodes": [_episode(told) for told in document.episodes],
        "facts": dict(document.facts),
        "policy": {key: value for key, value, _ in document.policy},
    }
    return orjson.dumps(whole, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE).decode()


def _episode(told: Told) -> dict[str, Any]:
    episode, findings = told.episode, of(told.episode)
    saved = findings.restore
    return {
        "when": told.when,
        "headline": told.headline,
        "from_ns": episode.from_ns,
        "to_ns": episode.to_ns,
        "outcome": findings.outcome.value,
        "dry_run": findings.dry_run,
        "answers": plain(told.answers),
        "freed": plain(findings.freed),
        "restore": saved
        and {
            "name": saved.name,
            "directory": saved.directory,
            "base": saved.base,
            "files": saved.files,
            "command": restore_command(saved),
        },
        "looks": [
            plain(look) | {"unreclaimable_ratio": round(look.memory.unreclaimable_ratio, 4)} for look in episode.looks
        ],
        "crossings": plain(episode.crossings),
        "holds": plain(episode.holds),
        "trace": plain(told.rows),
        "left_out": told.left_out,
    }
