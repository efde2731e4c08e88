"""Watches a cgroup tree for containers that come and go: inotify where they appear, and a slow rescan for the rest.

mkdir and rmdir in cgroupfs are seen by inotify (vfs_mkdir and vfs_rmdir tell fsnotify), but a watch on a cgroup that
was removed stays, and takes part of the limit of watches for ever: kernfs tells it neither IN_DELETE_SELF nor
IN_IGNORED (seen on 6.18). So a watch is taken back when the directory above says that it is gone.

Watched are the kubelets' roots, their QoS classes, their pods, and what leads to a root; nothing inside a container.
A kubelet that comes later is found by a rescan. Whose a container is, `pods.py` says; reads nothing but directories.
"""

from __future__ import annotations

import ctypes
import os
import struct
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from governor.pods import Place, holds_containers, is_root, place_of

RESCAN_NS = 30_000_000_000
BLIND_RESCAN_NS = 1_000_000_000  # while something cannot be watched
SEARCH_DEPTH = 8  # directories above a kubelet's root: rootless kind has 7
SEARCH_MAX = 4096  # directories looked into for a kubelet's root: containers outside of pods may make any number
_BUFFER_BYTES = 64 << 10
_HEADER = struct.Struct("iIII")  # struct inotify_event: wd, mask, cookie, len
# From linux/inotify.h.
_MOVED_FROM, _MOVED_TO, _CREATE, _DELETE = 0x40, 0x80, 0x100, 0x200
_Q_OVERFLOW, _IGNORED, _IS_DIRECTORY = 0x4000, 0x8000, 0x40000000
_ONLY_DIRECTORY, _NO_FOLLOW = 0x01000000, 0x02000000
_WATCHED = _CREATE | _DELETE | _MOVED_FROM | _MOVED_TO | _ONLY_DIRECTORY | _NO_FOLLOW


@dataclass(frozen=True, slots=True)
class Appeared:
    """A container's cgroup is there; `path` is its directory."""

    path: str
    place: Place


@dataclass(frozen=True, slots=True)
class Gone:
    """One that had appeared is not there any more."""

    path: str


class Inotify:
    """One inotify descriptor; paths in, (watch, mask, name) out."""

    def __init__(self) -> None:
        """Raises OSError (EMFILE: fs.inotify.max_user_instances)."""
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), f"inotify_init1: {os.strerror(ctypes.get_errno())}")

    def add(self, path: str) -> int:
        """Watch a directory; returns the watch. Raises OSError (ENOSPC: fs.inotify.max_user_watches)."""
        watch: int = self._libc.inotify_add_watch(self.fd, os.fsencode(path), _WATCHED)
        if watch < 0:
            raise OSError(ctypes.get_errno(), f"inotify_add_watch: {os.strerror(ctypes.get_errno())}", path)
        return watch

    def remove(self, watch: int) -> None:
        """Watch no longer, whether the kernel has dropped it already or not."""
        self._libc.inotify_rm_watch(self.fd, watch)

    def read(self) -> list[tuple[int, int, str]]:
        """What has come, oldest first; at most one buffer of it."""
        try:
            data = os.read(self.fd, _BUFFER_BYTES)
        except BlockingIOError:
            return []
        found, at = [], 0
        while at < len(data):
            watch, mask, _, size = _HEADER.unpack_from(data, at)
            at += _HEADER.size + size
            found.append((watch, mask, os.fsdecode(data[at - size : at].rstrip(b"\0"))))
        return found

    def close(self) -> None:
        """Close the descriptor; its watches go with it."""
        os.close(self.fd)


class Discovery:
    """The containers below one cgroup root, at any moment.

    `fd` is to be polled for reading (-1 where inotify is not to be had), and drain() called when it is ready and at
    `due_ns`. A container that went and came again under one path is told of as gone and appeared. `blind` says what
    cannot be watched and why, "" while all is: containers are then seen by rescans, within a second.
    """

    def __init__(self, root: str, now_ns: int) -> None:
        """`root`: the mount of cgroup v2, or of v1's memory controller. Raises OSError when it is no directory."""
        self._root = root.rstrip("/") or "/"
        self.due_ns = now_ns
        self.blind = ""
        self._ids: dict[str, int] = {}  # of the containers' directories
        self._watches: dict[str, int] = {}
        self._paths: dict[int, str] = {}
        self._inside: dict[str, dict[str, None]] = {}  # of each directory those inside that are watched or containers
        self._events: list[Appeared | Gone] = []
        self._inotify: Inotify | None = None
        self._no_inotify = ""
        os.close(os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            self._inotify = Inotify()
        except OSError as error:
            self._no_inotify = f"{error.strerror}; see fs.inotify.max_user_instances"

    @property
    def fd(self) -> int:
        """To be polled for reading."""
        return self._inotify.fd if self._inotify else -1

    @property
    def watches(self) -> int:
        """How many directories are watched."""
        return len(self._watches)

    def drain(self, now_ns: int) -> list[Appeared | Gone]:
        """What has changed since the last call, oldest first; rescans when that is due or records were lost."""
        overflown = False
        while self._inotify and (records := self._inotify.read()):
            for watch, mask, name in records:
                overflown = overflown or bool(mask & _Q_OVERFLOW)
                self._heed(watch, mask, name)
        if overflown or now_ns >= self.due_ns:
            self._rescan()
            self.due_ns = now_ns + (BLIND_RESCAN_NS if self.blind else RESCAN_NS)
        events, self._events = self._events, []
        return events

    def close(self) -> None:
        """Watch no longer."""
        if self._inotify:
            self._inotify.close()
            self._inotify = None

    def _heed(self, watch: int, mask: int, name: str) -> None:
        above = self._paths.get(watch)
        if above is None:
            return  # of one that is gone, told before that was
        if mask & _IGNORED:  # the kernel dropped it: on other file systems than kernfs, or a file system unmounted
            self._paths.pop(watch)
            self._watches.pop(above)
        elif mask & _IS_DIRECTORY:
            path = f"{above.rstrip('/')}/{name}"
            if mask & (_DELETE | _MOVED_FROM):
                self._drop(path)
            else:
                self._take(path)

    def _below(self, path: str) -> str:
        return path[len(self._root) :].lstrip("/")

    def _take(self, path: str) -> None:
        """A directory that is there: a container, or what leads to one."""
        below = self._below(path)
        place = place_of(below)
        if place:
            self._take_container(path, place)
        elif holds_containers(below):
            self._take_level(path)

    def _take_container(self, path: str, place: Place) -> None:
        found = _id_of(path)
        if found is None or self._ids.get(path) == found:
            return
        if path in self._ids:
            self._events.append(Gone(path))
        self._ids[path] = found
        self._inside.setdefault(_above(path), {})[path] = None
        self._events.append(Appeared(path, place))

    def _take_level(self, path: str) -> None:
        """Watch first, list then: what is made in between comes twice, and is known the second time."""
        levels = deque([path])
        while levels:
            level = levels.popleft()
            self._watch(level)
            for name in _directories(level):
                inner = f"{level.rstrip('/')}/{name}"
                if inner in self._ids:
                    continue
                below = self._below(inner)
                if place := place_of(below):
                    self._take_container(inner, place)
                elif holds_containers(below):
                    levels.append(inner)

    def _watch(self, path: str) -> None:
        if not self._inotify:
            return
        try:
            watch = self._inotify.add(path)
        except (FileNotFoundError, NotADirectoryError):
            return  # gone meanwhile
        except OSError as error:
            self.blind = f"{path}: {error.strerror}; see fs.inotify.max_user_watches"
            self.due_ns = 0
            return
        before = self._watches.get(path)
        if before is not None and before != watch:  # another directory under its name
            self._forget(path, before)
        self._watches[path] = watch
        self._paths[watch] = path
        self._inside.setdefault(_above(path), {})[path] = None

    def _forget(self, path: str, watch: int) -> None:
        del self._watches[path]
        if self._paths.get(watch) == path:
            del self._paths[watch]
            if self._inotify:
                self._inotify.remove(watch)

    def _drop(self, path: str) -> None:
        """A directory that is gone, with all that was below it."""
        if self._ids.pop(path, None) is not None:
            self._events.append(Gone(path))
        for inner in self._inside.pop(
            path, {}
        ):  # also where the kernel has dropped the watch: it may have been listed
            self._drop(inner)
        if path in self._watches:
            self._forget(path, self._watches[path])
        self._inside.get(_above(path), {}).pop(path, None)

    def _rescan(self) -> None:
        """Compare with what is there: lost records, new kubelets, directories replaced."""
        self.blind = self._no_inotify
        for path, known in list(self._ids.items()):
            if _id_of(path) != known:
                self._drop(path)
        for path in [level for level in self._watches if _id_of(level) is None]:
            if path in self._watches:
                self._drop(path)
        for path in self._kubelets():
            self._take_level(path)

    def _kubelets(self) -> list[str]:
        """The kubelets' roots, uppermost first; what leads to them is watched."""
        found = []
        self._watch(self._root)
        to_look = deque([(self._root, 0)])
        looked = 0
        while to_look and looked < SEARCH_MAX:
            directory, depth = to_look.popleft()
            looked += 1
            for name in _directories(directory):
                inner = f"{directory.rstrip('/')}/{name}"
                if is_root(name) and _is_made_here(inner):
                    found.append(inner)
                elif depth < SEARCH_DEPTH and not _is_leaf(inner):
                    to_look.append((inner, depth + 1))
        for above in {str(parent) for path in found for parent in Path(path).parents}:
            if above.startswith(f"{self._root.rstrip('/')}/"):
                self._watch(above)
        return found


def _is_made_here(path: str) -> bool:
    """Whether root made it, or we did: whoever has a cgroup of his own may call one there as he likes."""
    try:
        return os.lstat(path).st_uid in (0, os.geteuid())
    except OSError:
        return False


def _above(path: str) -> str:
    return path.rpartition("/")[0] or "/"


def _id_of(path: str) -> int | None:
    """A directory's inode number, which is a cgroup's id; None when it is gone."""
    with suppress(OSError):
        return os.lstat(path).st_ino
    return None


def _is_leaf(path: str) -> bool:
    """Whether nothing is below: a cgroup's links are its children and two more (kernfs_refresh_inode)."""
    with suppress(OSError):
        return os.lstat(path).st_nlink == 2
    return True


def _directories(path: str) -> list[str]:
    if _is_leaf(path):
        return []  # without a look at its 70 files
    try:
        with os.scandir(path) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except OSError:  # gone meanwhile
        return []
