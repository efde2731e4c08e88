"""Reads a profile from TOML: one of the package or a file; every fault at once, with its line."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from governor import kept_options
from governor.kept_options import PLACE, Takes
from governor.policy_keys import (
    NAME,
    Unexpected,
    build_from,
    check_exec,
    check_globs,
    check_name,
    check_signal,
    flatten,
    keys_of,
    toml_text,
    written,
)
from governor.profile import Profile
from governor.session_files import parse_pattern
from governor.toml_file import Fault, FileError, given_values, line_of, read_named, read_tree

_PROFILES = Path(__file__).parent / "profiles"
_FIELD = re.compile(r"\{([^{}]*)\}")
_NAME_LIMIT = 255  # of a file name
ProfileError = FileError  # a profile that cannot be used


def _check_expression(text: str) -> None:
    try:
        re.compile(text, re.MULTILINE)
    except (re.error, RecursionError, OverflowError) as error:
        raise Unexpected(f"a regular expression ({error})") from None


def _check_expressions(texts: tuple[str, ...]) -> None:
    for text in texts:
        _check_expression(text)
        if re.search(text, ""):
            raise Unexpected(f"expressions that an empty screen does not match; found {toml_text(text)}")


def _check_prompt(text: str) -> None:
    if text:
        _check_expression(text)
        if "draft" not in re.compile(text).groupindex:
            raise Unexpected('a regular expression with a group "(?P<draft>...)" for what stands in the input')


def _check_path(text: str, known: tuple[str, ...]) -> None:
    if text:
        _check_fields((text,), known)
        try:
            parse_pattern(_FIELD.sub("x", text), "/")
        except ValueError:
            raise Unexpected("a path that begins with / or ~/ and is without '..'") from None


def _check_state_path(text: str) -> None:
    _check_path(text, ("pid",))
    if any(char in text for char in "*?["):
        raise Unexpected("a path without wildcards: {pid} stands for the agent's process")


def _check_transcript(text: str) -> None:
    _check_path(text, ("session",))


def _check_command(command: tuple[str, ...]) -> None:
    check_exec(command)
    _check_fields(command, ("session", "options"))
    if sum(word.count(PLACE) for word in command) > command[1:].count(PLACE) or command.count(PLACE) > 1:
        raise Unexpected(f'"{PLACE}" once, as a word of its own behind the program')


def _check_options(options: tuple[str, ...]) -> None:
    try:
        kept_options.parse(options)
    except ValueError as error:
        raise Unexpected(
            'options as --help has them, each name once: "--verbose", "--model <name>", "--add-dir <path...>", '
            f'"-d, --debug [filter]"; found {toml_text(str(error))}'
        ) from None


def _check_fields(texts: tuple[str, ...], known: tuple[str, ...]) -> None:
    for text in texts:
        for name in _FIELD.findall(text):
            if name not in known:
                raise Unexpected(f"no other field than {', '.join(f'{{{each}}}' for each in known)}")


def _check_names(names: tuple[str, ...]) -> None:
    for name in names:
        if not name or "/" in name or len(name) > _NAME_LIMIT:
            raise Unexpected(f'names of programs, such as "node" or "agent-*"; found {toml_text(name)}')


def _check_statuses(statuses: tuple[str, ...]) -> None:
    if "" in statuses:
        raise Unexpected("statuses that are not empty")


def _check_signal(name: str) -> None:
    check_signal(name)
    if name in ("SIGSEGV", "SIGBUS", "SIGILL", "SIGFPE"):
        raise Unexpected('a signal that means something to the agent, such as "SIGUSR1"')


def _check_line(text: str) -> None:
    if any(not char.isprintable() for char in text):
        raise Unexpected("one line of text; the keys around it have keys of their own: before, enter")


def _check_words(text: str) -> None:
    _check_line(text)
    if text and (text[0] in "/!#@?" or text != text.strip()):
        raise Unexpected("words that are no command: not beginning with / ! # @ ? or a space")


KEYS = keys_of(
    Profile(),
    {
        "name": check_name,
        "match.process": _check_names,
        "state_file.path": _check_state_path,
        **{f"state_file.{status}": _check_statuses for status in ("idle", "busy", "waiting")},
        "screen.prompt": _check_prompt,
        **{f"screen.{state}": _check_expressions for state in ("placeholder", "busy", "waiting", "shell", "vim")},
        "type.compact": _check_line,
        "type.clear": _check_line,
        "confirm.transcript": _check_transcript,
        **{f"confirm.{tier}_record": _check_expressions for tier in ("compact", "clear")},
        **{f"confirm.{tier}_screen": _check_expressions for tier in ("compact", "clear")},
        "confirm.queued": _check_expressions,
        "confirm.refused": _check_expressions,
        **{f"signals.{what}": _check_signal for what in ("compact", "clear", "terminate")},
        "session.globs": check_globs,
        "session.compact_stopped": _check_command,
        "session.compact_refused": _check_expressions,
        "session.resume": _check_command,
        "session.keep_options": _check_options,
        "session.resubmit": _check_words,
        "session.sweep": _check_names,
    },
)


@dataclass(frozen=True, slots=True)
class Loaded:
    """A profile, and for every key that the file gives its line."""

    profile: Profile
    lines: dict[str, int]


def profiles() -> dict[str, Path]:
    """The profiles that come with the package, by name."""
    return {path.stem: path for path in sorted(_PROFILES.glob("*.toml"))}


def load(name_or_path: str) -> Loaded:
    """A profile of the package by its name or a file by its path; raises ProfileError."""
    return parse(read_named(name_or_path, profiles(), "profile"), name_or_path)


def parse(data: bytes, where: str) -> Loaded:
    """The profile that a file's bytes say; `where` is the file's name; raises ProfileError."""
    tree, lines = read_tree(data, where)
    faults: list[Fault] = []
    given = given_values(tree, lines, KEYS, (), "a profile", faults)
    values = flatten(Profile(), KEYS) | given
    stem = Path(where).stem
    if "name" not in given and NAME.fullmatch(stem):
        values["name"] = stem
    faulty = {fault.key for fault in faults}
    faults += _between(values, {path for path in given if path not in faulty}, faulty, lines)
    if faults:
        raise ProfileError(where, sorted(faults, key=lambda fault: fault.line))
    return Loaded(build_from(Profile(), values, KEYS), {path: line_of(lines, path) for path in given})


# What a key is good for only beside another; ("given", "needed").
_NEEDS = (
    *((f"state_file.{key}", "state_file.path") for key in ("session", "cwd", "start", "status", "detail")),
    *((f"state_file.{state}", "state_file.status") for state in ("idle", "busy", "waiting")),
    ("state_file.detail", "state_file.status"),
    ("screen.placeholder", "screen.prompt"),
    ("type.compact", "screen.prompt"),  # what is typed is looked for there before Enter
    ("type.clear", "screen.prompt"),
    ("type.tell", "screen.prompt"),
    ("type.stash", "screen.prompt"),
    ("type.unstash", "type.stash"),
    ("type.stash_returns", "type.stash"),
    ("session.compact_stopped", "session.resume"),
    ("session.keep_options", "session.resume"),
    ("session.resume_peak", "session.compact_stopped"),
    ("session.compact_refused", "session.compact_stopped"),
    ("confirm.compact_record", "confirm.transcript"),
    ("confirm.clear_record", "confirm.transcript"),
    ("confirm.clear_new_session", "state_file.session"),
    ("session.resubmit", "session.resume"),
    ("session.resubmit", "state_file.session"),  # only an agent that says that it was busy was cut off at something
    ("session.resubmit", "state_file.busy"),
    ("session.resubmit", "screen.prompt"),
)


def _between(values: dict[str, Any], given: set[str], faulty: set[str], lines: Any) -> list[Fault]:
    """Faults between keys, each said of the key that the file gives; one that is faulty itself is passed over."""

    def fault(path: str, expected: str) -> Fault:
        return Fault(line_of(lines, path), path, written(KEYS[path], values[path]), expected)

    faults = [
        fault(path, f"{needed} beside it")
        for path, needed in _NEEDS
        if path in given and values[path] and not values[needed] and needed not in faulty
    ]
    for path in ("session.compact_stopped", "session.resume", "confirm.transcript"):
        asks = "{session}" in "\n".join([values[path]] if isinstance(values[path], str) else values[path])
        if path in given and asks and not values["state_file.session"] and "state_file.session" not in faulty:
            faults.append(fault(path, "state_file.session beside it, which tells the {session}"))
    if (
        not any(values[f"{way}.{tier}"] for way in ("type", "signals") for tier in ("compact", "clear"))
        and not faulty
    ):
        faults.append(Fault(0, "", "no way to compact or clear", "a [type] or [signals] with compact or clear"))
    if not {"session.resume", "session.compact_stopped", "session.keep_options"} & faulty:
        faults += [fault(path, expected) for path, expected in _options_out_of_place(values) if path in given]
    for tier in ("compact", "clear"):
        typed, signalled = f"type.{tier}", f"signals.{tier}"
        if {typed, signalled} <= given and values[typed] and values[signalled]:
            faults.append(fault(signalled, f"only one of {typed} and {signalled}"))
    for status in _repeated(values, faulty):
        faults.append(fault(status, "each status in one list only"))
    if "confirm.within" in given and not values["confirm.within"]:
        faults.append(fault("confirm.within", "more than 0"))
    return faults


def _options_out_of_place(values: dict[str, Any]) -> list[tuple[str, str]]:
    """What is wrong with the options that are kept and where they go: the key, and what was expected."""
    options, resume = values["session.keep_options"], values["session.resume"]
    takes = kept_options.parse(options)
    found = []
    if options and resume and PLACE not in resume:
        found.append(("session.keep_options", f'a word "{PLACE}" in session.resume, where they go'))
    for path in ("session.resume", "session.compact_stopped"):
        words = values[path]
        if PLACE in words and not options:
            found.append((path, f'session.keep_options beside it, which says what "{PLACE}" stands for'))
        if own := [name for name in takes if name in words]:
            found.append(("session.keep_options", f"none that {path} gives itself, as {own[0]}"))
        after = words[words.index(PLACE) + 1 :] if PLACE in words else ()
        if after and not after[0].startswith("-") and {Takes.MANY, Takes.MAYBE} & set(takes.values()):
            found.append((path, f'an option after "{PLACE}", whose last one would take {toml_text(after[0])}'))
    return found


def _repeated(values: dict[str, Any], faulty: set[str]) -> list[str]:
    """The lists of statuses that repeat what an earlier one says."""
    seen: set[str] = set()
    found = []
    for state in ("idle", "busy", "waiting"):
        path = f"state_file.{state}"
        if path in faulty:
            continue
        if seen & set(values[path]):
            found.append(path)
        seen |= set(values[path])
    return found
