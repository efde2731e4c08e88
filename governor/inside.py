"""A door to where a process of a container lives, and the way through it with nothing but that process's rights.

The door is opened once and holds by descriptors: no recycled pid is ever entered, and what a container wrote before
its end can still be read after it. Whoever goes through is a forked child that never comes back. Does not decide what
is done inside: `inside_read` and `inside_run` do.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from governor.subtree import parse_stat

_LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000  # linux/sched.h
_CLONE_THE_REST = 0x02000000 | 0x04000000 | 0x08000000 | 0x20000000 | 0x40000000  # cgroup, uts, ipc, pid, net
_PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 4, 24, 38, 47  # linux/prctl.h
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAPABILITY_VERSION_3 = 0x20080522  # linux/capability.h
_CAPABILITIES = 64  # more than any kernel has
_FIRST_FD = 16  # out of the way of those that children give their own meaning
_DIRECTORY = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
_READ_LIMIT_BYTES = 1 << 20
_AT_EMPTY_PATH, _AT_STATX_DONT_SYNC, _STATX_INO = 0x1000, 0x4000, 0x100  # linux/fcntl.h, linux/stat.h


@dataclass(frozen=True, slots=True)
class Who:
    """Whom a process runs as: ids as governor sees them, and as its own user namespace has them."""

    uid: int
    gid: int
    groups: tuple[int, ...]
    inner_uid: int
    inner_gid: int
    inner_pid: int


@dataclass(frozen=True, slots=True)
class Door:
    """A process, verified, and where it lives, all as open descriptors."""

    proc_fd: int  # its /proc directory: ESRCH once it is gone, whoever has its pid then
    pidfd: int
    mounts_fd: int
    root_fd: int  # it may have changed its root below that of its mount namespace
    remembered: Who  # as it was when the door was opened
    home: str = ""  # as home() had it when that was asked last

    @property
    def fds(self) -> tuple[int, ...]:
        """What a child that goes through has to keep."""
        return self.proc_fd, self.pidfd, self.mounts_fd, self.root_fd

    def close(self) -> None:
        """Let go: as long as it is open, the mounts of a container that has ended stay."""
        for fd in self.fds:
            os.close(fd)


def door_to(pid: int, start_ticks: int) -> Door | None:
    """A door to where a process lives; None where that is where governor lives, or where it may not be known.

    Raises OSError: it has ended (ProcessLookupError), or lives elsewhere and may not be visited.
    """
    opened: list[int] = []
    gone = ProcessLookupError(f"process {pid} has ended")
    try:
        proc_fd = _opened(opened, f"/proc/{pid}", _DIRECTORY)
        opened.append(_moved(os.pidfd_open(pid)))
        # Read through the directory, it is of the process that had the pid when that was opened; alive now, it has
        # had the pid all along: the pidfd is its own too.
        found = parse_stat(pid, _read(proc_fd, "stat"))
        if not found or found.ended or found.start_ticks != start_ticks:
            raise gone  # noqa: TRY301  what is open is closed below
        try:
            mounts_fd = _opened(opened, "ns/mnt", os.O_RDONLY | os.O_CLOEXEC, proc_fd)
        except PermissionError:  # not ours to look at: an agent beside an ordinary user's governor
            mounts_fd = -1
        if mounts_fd < 0 or os.path.sameopenfile(mounts_fd, _own_mounts(opened)):
            _close(opened)
            return None
        root_fd = _opened(opened, "root", _DIRECTORY, proc_fd)
        door = Door(proc_fd, opened[1], mounts_fd, root_fd, _who(proc_fd))
    except FileNotFoundError:  # it is ending: it has neither namespaces nor a root any more
        _close(opened)
        raise gone from None
    except BaseException:
        _close(opened)
        raise
    os.close(opened.pop(3))
    return door


def kept_open(door: Door) -> Door:
    """The same door by descriptors of its own, for a search that may begin after the agent's end; raises OSError."""
    opened: list[int] = []
    try:
        for fd in door.fds:
            opened.append(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD))
    except OSError:
        _close(opened)
        raise
    proc_fd, pidfd, mounts_fd, root_fd = opened
    return Door(proc_fd, pidfd, mounts_fd, root_fd, door.remembered, door.home)


def leads_there(door: Door) -> bool:
    """Whether the process lives where the door leads, or has ended.

    Asks no file system of the container, whose answer may never come.
    """
    try:
        mounts = os.stat("ns/mnt", dir_fd=door.proc_fd)
        return _is_root(door, "root", door.proc_fd) and os.path.samestat(mounts, os.fstat(door.mounts_fd))
    except OSError:
        return True


def is_at_the_machines_root(door: Door) -> bool:
    """Whether its root is governor's own or process 1's: where a runtime is before it has made a container."""
    for path in ("/", "/proc/1/root"):  # the second is the machine's, for a governor in a pod with the machine's pids
        with suppress(OSError):
            if _is_root(door, path):
                return True
    return False


def _is_root(door: Door, path: str, directory: int | None = None) -> bool:
    fd = os.open(path, _DIRECTORY, dir_fd=directory)
    try:
        return identity(fd) == identity(door.root_fd)
    finally:
        os.close(fd)


def identity(fd: int) -> bytes:
    """Device (8 bytes) and inode of what is open, as the kernel knows them: asks no file system. Raises OSError."""
    found = ctypes.create_string_buffer(256)  # struct statx: stx_ino at 32, stx_dev_major and stx_dev_minor at 136
    if _LIBC.statx(fd, b"", _AT_EMPTY_PATH | _AT_STATX_DONT_SYNC, _STATX_INO, found) < 0:
        raise _error("statx")
    return found.raw[136:144] + found.raw[32:40]


def who(door: Door) -> Who:
    """Whom the process runs as by now, or ran as at last: the entrypoint of a container often changes its user."""
    try:
        return _who(door.proc_fd)
    except OSError:
        return door.remembered


def environment(door: Door) -> dict[str, str]:
    """The environment that the process was started with; raises OSError when it has ended.

    To be called in a child, as home() is: the process may let whoever reads it wait (agent_look).
    """
    entries = (os.fsdecode(entry).partition("=") for entry in _read(door.proc_fd, "environ").split(b"\0"))
    return {name: value for name, sign, value in entries if name and sign}


def home(door: Door) -> str:
    """HOME as the process was started with, or was seen to be at last; "" if it names no place."""
    entries: list[bytes] = []
    with suppress(OSError):
        entries = [entry for entry in _read(door.proc_fd, "environ").split(b"\0") if entry]
    if not entries:  # it has ended, or may not be looked into
        return door.home
    return os.fsdecode(next((entry[5:] for entry in entries if entry.startswith(b"HOME=/")), b""))


def hide() -> None:
    """Let nobody look into this process, who runs as the same user, or has become it."""
    _prctl(_PR_SET_DUMPABLE, 0)


def move_in(door: Door, inhabitant: Who) -> Callable[[int, int], int]:
    """Be where it lives, as its user and for good; the door is closed. It stays in governor's PID namespace.

    Returns session_files.Reopen: /proc there may be anything, and has no entry for us. Raises OSError.
    """
    hide()
    own_fds = os.open("/proc/self/fd", _DIRECTORY)  # while that still is ours
    enter_mounts(door)
    become(inhabitant.uid, inhabitant.gid, inhabitant.groups)
    door.close()
    return lambda seen, flags: os.open(str(seen), flags, dir_fd=own_fds)


def enter_mounts(door: Door) -> None:
    """Its mounts and its root; everything else stays. Raises OSError."""
    _setns(door.mounts_fd, CLONE_NEWNS)
    _enter_root(door)


def enter_all(door: Door) -> None:
    """All of its namespaces and its root; what is forked from now on is in its PID namespace. Raises OSError.

    The user namespace comes last: whoever is in it has no rights over one that belongs to the machine. Groups come
    before it: it may forbid to set them (/proc/PID/setgroups).
    """
    os.setgroups(who(door).groups)
    _setns(door.pidfd, CLONE_NEWNS | _CLONE_THE_REST)
    _enter_root(door)


def _enter_root(door: Door) -> None:
    os.fchdir(door.root_fd)
    os.chroot(".")
    os.chdir("/")


def is_of_our_users(door: Door) -> bool:
    """Whether it is in the user namespace that governor is in; to be asked before entering. Raises OSError."""
    theirs = os.stat("ns/user", dir_fd=door.proc_fd)
    return os.path.samestat(theirs, os.stat("/proc/self/ns/user"))  # noqa: PTH116  beside one that pathlib cannot do


def enter_users(door: Door) -> None:
    """Its user namespace. Raises OSError."""
    _setns(door.pidfd, CLONE_NEWUSER)


def become(uid: int, gid: int, groups: tuple[int, ...] | None) -> None:
    """Be this user for good: no capability in any set, none to be had by exec. None: the groups are set.

    The bounding set first, while that is still allowed; a user namespace that was entered has filled it anew
    (set_cred_user_ns of kernel/user_namespace.c). Raises OSError.
    """
    hide()
    for capability in range(_CAPABILITIES):
        if _LIBC.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            if ctypes.get_errno() != 22 or capability == 0:  # EINVAL: the kernel knows no more of them
                raise _error("drop a capability")
            break
    if groups is not None:
        os.setgroups(groups)
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    if _LIBC.capset(header, (ctypes.c_uint32 * 6)()) < 0:  # user 0 has kept them
        raise _error("drop all capabilities")
    _prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    hide()  # a change of user sets it anew (commit_creds)


def _who(proc_fd: int) -> Who:
    """From /proc/PID/status; the effective ids: with them it reaches its files."""
    lines = _read(proc_fd, "status").splitlines()
    status = {name: value.split() for name, _, value in (line.partition(b":") for line in lines)}
    uid, gid = int(status[b"Uid"][1]), int(status[b"Gid"][1])
    groups = tuple(map(int, status[b"Groups"]))
    inner_uid = _inner(_read(proc_fd, "uid_map"), uid)
    inner_gid = _inner(_read(proc_fd, "gid_map"), gid)
    return Who(uid, gid, groups, inner_uid, inner_gid, int(status[b"NSpid"][-1]))


def _inner(id_map: bytes, outer: int) -> int:
    """An id of ours as the user namespace with this map has it, -1 where it has none for it."""
    for line in id_map.splitlines():
        first, lower, count = map(int, line.split())
        if lower <= outer < lower + count:
            return first + outer - lower
    return -1


def _read(proc_fd: int, name: str) -> bytes:
    """A file of a process, bounded; raises OSError: ESRCH when it is gone."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=proc_fd)
    try:
        data = b""
        while len(data) < _READ_LIMIT_BYTES and (chunk := os.read(fd, _READ_LIMIT_BYTES - len(data))):
            data += chunk
    finally:
        os.close(fd)
    return data


def _own_mounts(opened: list[int]) -> int:
    return _opened(opened, "/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def _opened(opened: list[int], path: str, flags: int, directory: int | None = None) -> int:
    opened.append(_moved(os.open(path, flags, dir_fd=directory)))
    return opened[-1]


def _moved(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_FD)
    finally:
        os.close(fd)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def _setns(fd: int, flags: int) -> None:
    if _LIBC.setns(fd, flags) < 0:
        raise _error("enter the namespaces")


def _prctl(option: int, value: int) -> None:
    if _LIBC.prctl(option, value, 0, 0, 0) < 0:
        raise _error(f"prctl {option}")


def _error(what: str) -> OSError:
    code = ctypes.get_errno()
    return OSError(code, f"{what}: {os.strerror(code)}")
