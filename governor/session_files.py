"""Finds and opens an agent's session files without following anything that the agent could have put in the way.

Every component below a pattern's fixed part is opened relative to its parent with O_NOFOLLOW, so that no symbolic
link, swapped in at any moment, leads elsewhere. Only regular files come out; the rest is reported as skipped.
"""

from __future__ import annotations

import errno
import fnmatch
import os
import pwd
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from governor.subtree import shares_namespace

_OPEN_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # NONBLOCK: a FIFO must not hang us
_WILD = "*?["
_ENVIRONMENT_BYTES = 1 << 20
# Never archived unless asked for: who may read an archive is not always who may use the account. By file name and not
# by "*token*" anywhere in a path, which would leave out the sessions of a project that is called tokenizer.
CREDENTIALS = (
    *("**/.credentials*", "**/credentials", "**/credentials.*", "**/*auth.json", "**/oauth*.json", "**/*token"),
    *("**/*token.json", "**/*tokens.json", "**/*token.txt", "**/*secret.json", "**/*secrets.json"),
    *("**/*secret", "**/*secrets", "**/client_secret*"),
    *("**/*.pem", "**/*.key", "**/*.p12", "**/*.pfx", "**/*.jks", "**/*.kdbx", "**/id_rsa*", "**/id_dsa*"),
    *("**/id_ecdsa*", "**/id_ed25519*", "**/.env", "**/.env.*", "**/*.env", "**/.envrc", "**/.netrc"),
    *("**/.git-credentials", "**/.npmrc", "**/.pypirc", "**/.pgpass", "**/.claude.json", "**/.ssh/**"),
    *("**/.gnupg/**", "**/.aws/**", "**/.kube/**", "**/.docker/config.json", "**/gh/hosts.yml"),
)
Reopen = Callable[[int, int], int]  # a descriptor that was only looked at, and flags, to one that can be read
_Take = Callable[[int, str, str], Iterator["Found"]]  # a directory, a name in it, its path, to what became of it
MAX_DEPTH = 32  # directories below the fixed part of a pattern


@dataclass(frozen=True, slots=True)
class Pattern:
    """A glob: the fixed part, resolved when the policy was read, and the components after it (`**`: any depth)."""

    fixed: str
    wild: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """An open regular file (`fd` is the taker's to close) or, with `fd` None, why a match was skipped.

    `is_cut_short`: nothing comes after it, although there may be more.
    """

    path: str
    fd: int | None
    skipped: str = ""
    is_cut_short: bool = False


def parse_pattern(glob: str, home: str) -> Pattern:
    """Split a glob, `~` standing for `home`; raises ValueError for one that is not absolute."""
    trusted = -1
    if glob.startswith("~/"):
        trusted = len([part for part in home.split("/") if part])  # what is below the home is the agent's own
        glob = home + glob[1:]
    if not glob.startswith("/"):
        raise ValueError(f"found archive pattern {glob!r}, expected one that begins with / or ~/")
    parts = [part for part in glob.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise ValueError(f"found archive pattern {glob!r}, expected one without '..'")
    if not parts:
        raise ValueError(f"found archive pattern {glob!r}, expected one that names files")
    count = next((i for i, part in enumerate(parts) if any(c in part for c in _WILD)), len(parts) - 1)
    count = min(count, trusted) if trusted >= 0 else count
    return Pattern(os.path.realpath("/" + "/".join(parts[:count])), tuple(parts[count:]))


def home_of(pid: int) -> str:
    """HOME as a process was started with, where it may choose that; else its user's, "/" where that is not known.

    It may name a directory of its user's; any where it is as governor is, same user and same mounts: a container's
    volumes are often root's.
    """
    try:
        uid = Path(f"/proc/{pid}").stat().st_uid
        named = environment_of(pid, "HOME")
        home = os.path.realpath(named)  # once: what was looked at is what will be read
        is_a_place = named.startswith("/") and not home.startswith("/proc/")
        if is_a_place and (Path(home).stat().st_uid == uid or _is_as_we_are(pid, uid)):
            return home
    except (OSError, ValueError):  # it has ended, or there is no such directory
        pass
    return home_of_user(pid)


def home_of_user(pid: int) -> str:
    """The home of the user that a process runs as, "/" where that is not known."""
    try:
        return pwd.getpwuid(Path(f"/proc/{pid}").stat().st_uid).pw_dir
    except (OSError, KeyError):
        return "/"


def _is_as_we_are(pid: int, uid: int) -> bool:
    return uid == os.geteuid() and shares_namespace(pid, "mnt")


def environment_of(pid: int, name: str) -> str:
    """A variable of the environment that a process was started with; "" where it cannot be known."""
    prefix = name.encode() + b"="
    try:
        with Path(f"/proc/{pid}/environ").open("rb") as file:
            entries = file.read(_ENVIRONMENT_BYTES).split(b"\0")
    except OSError:
        return ""
    return next((os.fsdecode(entry[len(prefix) :]) for entry in entries if entry.startswith(prefix)), "")


def excluded(path: str, exclude: tuple[str, ...]) -> bool:
    """Whether an absolute path matches one of the globs (`**`: any number of directories); case does not matter."""
    names, others = _compiled(exclude)
    parts = path.lower().split("/")
    return bool(names.match(parts[-1])) or any(_matches(parts, glob) for glob in others)


@lru_cache
def _compiled(exclude: tuple[str, ...]) -> tuple[re.Pattern[str], list[list[str]]]:
    """The globs that only ask for a file's name as one expression, since every file is asked; the others apart."""
    globs = [glob.lower().split("/") for glob in exclude]
    by_name = [glob for glob in globs if glob == ["**", glob[-1]] != ["**", "**"]]
    others = [glob for glob in globs if glob not in by_name]
    names = [glob[-1] for glob in by_name]
    return re.compile("|".join(map(fnmatch.translate, names)) or "(?!)"), others


def _matches(parts: list[str], globs: list[str]) -> bool:
    if not globs or not parts:
        return not parts and not [glob for glob in globs if glob != "**"]
    if globs[0] == "**":
        rest = globs[1:]
        left = range(len(parts) + 1) if "**" in rest else [len(rest)]  # components that the rest may take
        return any(_matches(parts[len(parts) - n :], rest) for n in left if n <= len(parts))
    return fnmatch.fnmatchcase(parts[0], globs[0]) and _matches(parts[1:], globs[1:])


def reopen_by_proc(seen: int, flags: int) -> int:
    """Open in earnest what was looked at."""
    return os.open(f"/proc/self/fd/{seen}", flags)


def find(patterns: list[Pattern], exclude: tuple[str, ...] = (), reopen: Reopen = reopen_by_proc) -> Iterator[Found]:
    """Every match once, each open; a file whose path is excluded comes as skipped.

    A link to a credential under another name is not known for one. `reopen` as in open_regular.
    """
    for found in _find(patterns, reopen):
        if found.fd is not None and excluded(found.path, exclude):
            os.close(found.fd)
            yield Found(found.path, None, "excluded")
        else:
            yield found


def _find(patterns: list[Pattern], reopen: Reopen) -> Iterator[Found]:
    take = partial(_file, set(), reopen)
    for pattern in patterns:
        try:
            root = open_directory(pattern.fixed)
        except FileNotFoundError:
            continue
        except OSError as error:
            yield Found(pattern.fixed, None, error.strerror or str(error))
            continue
        try:
            yield from _walk(root, pattern.fixed, pattern.wild, 0, take)
        finally:
            os.close(root)


def open_directory(path: str) -> int:
    """Open a path that had no links when the pattern was read; a link that came since raises OSError."""
    fd = os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    for part in path.split("/"):
        if part:
            outer = fd
            try:
                fd = os.open(part, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=outer)
            finally:
                os.close(outer)
    return fd


def _text(path: str) -> str:
    """A path as UTF-8 can hold it: file names are bytes."""
    return os.fsencode(path).decode(errors="backslashreplace")


def _walk(directory: int, path: str, wild: tuple[str, ...], depth: int, take: _Take) -> Iterator[Found]:
    part, rest = wild[0], wild[1:]
    if part == "**":
        yield from _walk(directory, path, rest or ("*",), depth, take)
    try:
        names = sorted(os.listdir(directory))
    except OSError as error:
        yield Found(path, None, error.strerror or str(error))
        return
    for name in names:
        inner = f"{path.rstrip('/')}/{_text(name)}"
        if part == "**":
            yield from _descend(directory, name, inner, wild, depth, take)
        elif fnmatch.fnmatchcase(name, part):
            if rest:
                yield from _descend(directory, name, inner, rest, depth, take)
            else:
                yield from take(directory, name, inner)


def _descend(directory: int, name: str, path: str, wild: tuple[str, ...], depth: int, take: _Take) -> Iterator[Found]:
    try:
        child = os.open(name, _OPEN_FLAGS | os.O_DIRECTORY, dir_fd=directory)
    except OSError:
        return  # a file, a link, or gone: nothing to descend into
    try:
        if depth >= MAX_DEPTH:
            yield Found(path, None, f"more than {MAX_DEPTH} directories deep")
        else:
            yield from _walk(child, path, wild, depth + 1, take)
    finally:
        os.close(child)


def _file(seen: set[tuple[int, int]], reopen: Reopen, directory: int, name: str, path: str) -> Iterator[Found]:
    try:
        fd = open_regular(name, os.O_RDONLY, directory, reopen)
    except IsADirectoryError:
        return
    except OSError as error:
        yield Found(path, None, "a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error))
        return
    status = os.fstat(fd)
    if (status.st_dev, status.st_ino) in seen:
        os.close(fd)
        return
    seen.add((status.st_dev, status.st_ino))
    yield Found(path, fd)


def open_regular(name: str, flags: int, directory: int, reopen: Reopen = reopen_by_proc) -> int:
    """Open a regular file that lies directly in an open directory; nothing else is ever opened.

    Looked at through O_PATH first: to open a device can be to use it (a watchdog, a tape). Raises OSError: ELOOP for
    a symbolic link, EISDIR for a directory, EINVAL for what else there is. `reopen` opens in earnest what was looked
    at, given by descriptor: where /proc is not ours that takes another way.
    """
    seen = os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory)
    try:
        mode = os.fstat(seen).st_mode
        if stat.S_ISLNK(mode):
            raise OSError(errno.ELOOP, "a symbolic link")
        if stat.S_ISDIR(mode):
            raise OSError(errno.EISDIR, "a directory")
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, "not a regular file")
        return reopen(seen, flags | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(seen)
