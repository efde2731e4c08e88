"""Finds and opens session files where a process of a container lives, for an archive that is written on the host.

A child goes through the door: the process's mounts, its root, its user, no capability. It opens what the patterns
name, by its own rights, and each open file is taken over from it. It stays in governor's PID namespace, where the
container sees nobody. Whatever it touches may hang it (FUSE, NFS): then it is killed, and what has come is archived.
"""

from __future__ import annotations

import ctypes
import os
import resource
import select
import signal
import socket
import stat
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

from governor.children import close_all_but, memory_bound
from governor.inside import Door, home, identity, move_in, who
from governor.session_files import Found, Reopen, find, open_directory, open_regular, parse_pattern

_WHOLE_S = 20.0  # as long as an archive is filled
_SILENCE_S = 6.0  # that all waiting for the child may take together: the archive's own deadline is 30 s
_DEATH_S = 0.5  # after SIGKILL; one that a file system holds in the kernel takes longer, and stays behind
_MESSAGE_BYTES = 64 << 10
_MEMORY_BYTES = 32 << 20  # for the names of one directory, beside what governor has: a hundred thousand long ones
_PASSWD_BYTES = 1 << 20
_FILE, _SKIPPED, _END = b"f", b"s", b"e"
_PIDFD_GETFD = 438  # on every architecture
_LIBC = ctypes.CDLL(None, use_errno=True)
_OVERLAY = 0x794C7630
# Of linux/magic.h: file systems that live on the machine. Not procfs, sysfs and such, whose files are no files; nor
# FUSE, NFS, CIFS, 9p: whoever serves those can let a reader wait for ever.
_LOCAL = {
    *(0xEF53, 0x58465342, 0x9123683E, 0xF2F52010, 0x2FC12FC1, 0xCA451A4E, 0x3153464A, 0x52654973),
    *(0x01021994, 0x858458F6, _OVERLAY, 0x73717368, 0xE0F5E1E2, 0x4D44, 0x2011BAB0, 0x9660),
}


def find_inside(door: Door, globs: tuple[str, ...], exclude: tuple[str, ...]) -> Iterator[Found]:
    """As session_files.find, for globs of the process: `~` is its home, and its links lead where they lead for it.

    To be called in a child: it waits. What cuts it short is the last that comes.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid == 0:
        _visit(theirs, door, globs, exclude)
    theirs.close()
    pidfd = os.pidfd_open(pid)
    try:
        why = yield from _received(ours, pidfd, identity(door.root_fd)[:8])
    finally:
        ours.close()
        os.kill(pid, signal.SIGKILL)  # our child, not waited for yet: the pid is still its own
        if select.select([pidfd], [], [], _DEATH_S)[0]:
            os.waitpid(pid, 0)
        os.close(pidfd)
    if why:
        yield Found("/", None, f"the search inside the container was cut short: {why}", is_cut_short=True)


def _received(ours: socket.socket, pidfd: int, root_device: bytes) -> Generator[Found, None, str]:
    """What the child has to tell; returns why it was cut short, "" if it was not."""
    until, patience_s = time.monotonic() + _WHOLE_S, _SILENCE_S
    while True:
        began = time.monotonic()
        ready = select.select([ours], [], [], max(0.0, min(until - began, patience_s)))[0]
        patience_s -= time.monotonic() - began
        if not ready:
            return f"nothing was heard for {_SILENCE_S:.0f} s" if patience_s <= 0 else f"over {_WHOLE_S:.0f} s"
        try:
            message = ours.recv(_MESSAGE_BYTES)
        except ConnectionResetError:  # it had not read our last word
            message = b""
        kind, (path, _, text) = message[:1], message[1:].decode(errors="backslashreplace").partition("\0")
        if kind == _FILE and _is_plain(path):
            found = _fetched(path, text, pidfd, root_device)
            with suppress(OSError):  # killed since: the next look says so
                ours.send(b"taken")
            yield found
        elif kind == _SKIPPED:
            yield Found(path, None, text)
        else:
            return text if kind == _END else "whoever searched there was killed"


def _fetched(path: str, number: str, pidfd: int, root_device: bytes) -> Found:
    """A file that the child has open, unless it is none to be read: it may not be itself any more.

    Not sent as SCM_RIGHTS: how many descriptors are on their way is limited per user (too_many_unix_fds), and every
    container's user 0 is the same one.
    """
    fd = _LIBC.syscall(_PIDFD_GETFD, pidfd, int(number), 0) if number.isdecimal() and len(number) < 7 else -1
    if fd < 0:
        return Found(path, None, f"it cannot be taken over: {os.strerror(ctypes.get_errno())}")
    # The file system first: to ask FUSE for a file's type is to wait for its server.
    why = _not_local(fd) or _not_plain(fd, root_device)
    if why:
        os.close(fd)
        return Found(path, None, why)
    return Found(path, fd)


def _not_plain(fd: int, root_device: bytes) -> str:
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        return "not a regular file"
    # Whoever has a user namespace may mount one over FUSE. Of the runtime's own the layers are on one file system,
    # so that its files have its device number (ovl_map_dev_ino).
    if _kind(fd) == _OVERLAY and identity(fd)[:8] != root_device:
        return "on an overlay that is not the container's root"
    return ""


def _is_plain(path: str) -> bool:
    """Whether a path is one that an archive can hold."""
    parts = path.split("/")
    return not parts[0] and all(parts[1:]) and not {".", ".."} & set(parts)


def _not_local(fd: int) -> str:
    kind = _kind(fd)
    if kind < 0:
        return os.strerror(ctypes.get_errno())
    return "" if kind in _LOCAL else f"on a file system that is not the machine's own (type {kind:#x})"


def _kind(fd: int) -> int:
    """Of the file system, as in linux/magic.h; -1: it cannot be asked."""
    buffer = ctypes.create_string_buffer(256)  # struct statfs: 120 bytes, f_type first
    if _LIBC.fstatfs(fd, buffer) < 0:
        return -1
    return int.from_bytes(buffer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)


# In the child


def _visit(theirs: socket.socket, door: Door, globs: tuple[str, ...], exclude: tuple[str, ...]) -> NoReturn:
    """Go there, search, and never come back."""
    why = b"it was ended"
    try:
        close_all_but({theirs.fileno(), *door.fds})
        _bound()
        sys.meta_path.clear()  # a module that is imported from now on would be the container's
        inhabitant, named = who(door), home(door)
        _search(theirs, move_in(door, inhabitant), named, inhabitant.inner_uid, globs, exclude)
        why = b""
    except BaseException as error:  # noqa: BLE001  there is nobody above: whoever waits is told
        why = (str(error) or type(error).__name__).encode(errors="backslashreplace")
    finally:
        with suppress(OSError):
            theirs.send(_END + b"\0" + why[: _MESSAGE_BYTES // 2])
        os._exit(0)


def _bound() -> None:
    """In memory: a directory may have more names than governor's own limit has room for."""
    resource.setrlimit(resource.RLIMIT_AS, memory_bound(_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError):  # an ordinary user's, whose /proc/self is root's since hide()
        Path("/proc/self/oom_score_adj").write_text("1000")  # whatever else is in governor's memcg stays


def _search(
    theirs: socket.socket, open_there: Reopen, named: str, uid: int, globs: tuple[str, ...], exclude: tuple[str, ...]
) -> None:
    def reopen(seen: int, flags: int) -> int:
        if why := _not_local(seen):
            raise OSError(0, why)
        return open_there(seen, flags)

    own = os.path.realpath(named or _home(uid, reopen))
    patterns = []
    for glob in globs:
        try:
            patterns.append(parse_pattern(glob, own))
        except (OSError, ValueError) as error:  # a link in its fixed part that leads to nobody
            theirs.send(_SKIPPED + glob.encode() + b"\0" + (getattr(error, "strerror", "") or str(error)).encode())
    for found in find(patterns, exclude, reopen):
        path = found.path.encode(errors="backslashreplace")[: _MESSAGE_BYTES // 2]
        if found.fd is None:
            theirs.send(_SKIPPED + path + b"\0" + found.skipped.encode(errors="backslashreplace"))
            continue
        theirs.send(_FILE + path + b"\0%d" % found.fd)
        theirs.recv(_MESSAGE_BYTES)
        os.close(found.fd)


def _home(uid: int, reopen: Reopen) -> str:
    """What the container's /etc/passwd has for a user.

    Read here and not by getpwuid, which may load the container's libraries (nsswitch.conf).
    """
    with suppress(OSError, ValueError):
        directory = open_directory("/etc")
        fd = open_regular("passwd", os.O_RDONLY, directory, reopen)
        for line in os.read(fd, _PASSWD_BYTES).splitlines():
            fields = line.split(b":")
            if len(fields) == 7 and fields[2] == b"%d" % uid and fields[5].startswith(b"/"):
                return os.fsdecode(fields[5])
    return "/"
