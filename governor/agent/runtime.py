"""configure_runtime(): CPython's and glibc's settings that bear on memory, and what became of each.

Sets what has an effect in a process that runs, and says of the rest what must be in the environment before it
starts. The measured effects are those of `scripts/bench agent --here` (Python 3.11, glibc 2.36, 2 cores): compare,
the figures depend on the program.
"""

from __future__ import annotations

import ctypes
import gc
import os
import re
import threading
from dataclasses import dataclass

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_MMAP_THRESHOLD_MOST_BYTES = 32 << 20  # DEFAULT_MMAP_THRESHOLD_MAX where a long has 64 bits, mallopt(3)
_STACK_LEAST_BYTES = 32 << 10  # threading.stack_size() takes no less
_OTHER_ALLOCATORS = re.compile(rb"/lib(jemalloc|tcmalloc|mimalloc)[^/\n]*\.so")
_KIB = 1 << 10


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting: what it is now, and why; `effective` is False where nothing was changed, and `note` says why."""

    name: str
    value: str
    effective: bool
    note: str
    reason: str
    measured: str
    cost: str


@dataclass(frozen=True, slots=True)
class _About:
    reason: str
    measured: str
    cost: str


_ABOUT = {
    "gc thresholds": _About(
        "cycles (exceptions with their frames, tasks, parsed trees) hold memory until a collection finds them",
        "4 KB each in cycles: 3 MiB of garbage at its peak by 700, 20 MiB by 5,000, 198 MiB by 50,000",
        "many live containers take 1.6 times as long to build by 700 as by 5,000",
    ),
    "gc freeze": _About(
        "what was imported stays: a full collection, such as on critical, need not go through it",
        "a full collection over 1 million containers: 252 ms before, nothing after; a forked child that "
        "collects copies 0.1 MiB instead of 63",
        "cycles among what is frozen are never freed; call it when the program has been imported, not later",
    ),
    "glibc arenas": _About(
        "each arena keeps its own free pages, and there may be eight for each core",
        "16 threads, 3 MiB live among what they freed: 125 MiB stay by default (2 cores), 72 by two arenas",
        "threads wait for each other in malloc when more of them than arenas allocate outside Python's own heap",
    ),
    "glibc trim": _About(
        "once a large block was freed, glibc takes blocks up to its size, at most 32 MiB, from the heap, where a "
        "small one above them keeps them from going back",
        "200 blocks of 4 MiB among small ones, all of them freed: 164 MiB stay by default, 0.5 by 128 KiB",
        "such blocks take 2.5 times as long: each is mapped and faulted in anew",
    ),
    "thread stack": _About(
        "8 MiB are reserved for each thread, which counts where address space is limited or huge pages are always on",
        "100 threads of 256 KiB: 775 MiB of address space less; RSS the same, as only what is touched is there",
        "threads that recurse deeply, in C too, crash earlier",
    ),
}


def configure_runtime(
    *,
    gc_thresholds: tuple[int, int, int] | None = (700, 10, 10),
    gc_freeze: bool = False,
    arenas: int | None = 2,
    trim_threshold_bytes: int | None = 128 * _KIB,
    stack_bytes: int | None = None,
) -> list[Setting]:
    """Set what is not None or False, and report all of it. To be called when all is imported, before threads start.

    Raises ValueError for values that the runtime would refuse.
    """
    if arenas is not None and arenas < 1:
        raise ValueError(f"found arenas={arenas}, expected 1 or more")
    if trim_threshold_bytes is not None and not 0 <= trim_threshold_bytes <= _MMAP_THRESHOLD_MOST_BYTES:
        raise ValueError(f"found trim_threshold_bytes={trim_threshold_bytes}, expected 0 to 32 MiB")
    if stack_bytes is not None and stack_bytes < _STACK_LEAST_BYTES:
        raise ValueError(f"found stack_bytes={stack_bytes}, expected {_STACK_LEAST_BYTES} or more")
    return [
        _set_gc_thresholds(gc_thresholds),
        _freeze(gc_freeze),
        _set_arenas(arenas),
        _set_trim(trim_threshold_bytes),
        _set_stack(stack_bytes),
    ]


def environment(arenas: int = 2, trim_threshold_bytes: int = 128 * _KIB) -> dict[str, str]:
    """What to start a process with so that it has glibc's settings from its first allocation, as its children do."""
    threshold = str(trim_threshold_bytes)
    return {
        "MALLOC_ARENA_MAX": str(arenas),
        "MALLOC_TRIM_THRESHOLD_": threshold,
        "MALLOC_MMAP_THRESHOLD_": threshold,
    }


def _set_gc_thresholds(wanted: tuple[int, int, int] | None) -> Setting:
    found = gc.get_threshold()
    if wanted is None or found == wanted:
        return _said("gc thresholds", found, False, "not asked for" if wanted is None else "was so already")
    gc.set_threshold(*wanted)
    return _said("gc thresholds", gc.get_threshold(), True, f"was {found}")


def _freeze(wanted: bool) -> Setting:
    if not wanted:
        return _said("gc freeze", f"{gc.get_freeze_count()} objects", False, "not asked for")
    gc.collect()  # else garbage is frozen, too
    gc.freeze()
    return _said("gc freeze", f"{gc.get_freeze_count()} objects", True, "")


def _set_arenas(wanted: int | None) -> Setting:
    if wanted is None:
        return _said("glibc arenas", os.environ.get("MALLOC_ARENA_MAX", "8 for each core"), False, "not asked for")
    if why_not := _mallopt(_M_ARENA_MAX, wanted):
        return _said("glibc arenas", "unknown", False, why_not)
    threads = len(os.listdir("/proc/self/task"))  # noqa: PTH208
    late = f"{threads} threads run: arenas that they have stay; before the start: MALLOC_ARENA_MAX={wanted}"
    return _said("glibc arenas", wanted, True, late if threads > 1 else "")


def _set_trim(wanted_bytes: int | None) -> Setting:
    """Both: the thresholds that mmap and trim go by follow each other unless set (mallopt(3))."""
    if wanted_bytes is None:
        return _said("glibc trim", "128 KiB, growing", False, "not asked for")
    if why_not := _mallopt(_M_MMAP_THRESHOLD, wanted_bytes) or _mallopt(_M_TRIM_THRESHOLD, wanted_bytes):
        return _said("glibc trim", "unknown", False, why_not)
    return _said("glibc trim", f"{wanted_bytes} bytes", True, "")


def _set_stack(wanted_bytes: int | None) -> Setting:
    if wanted_bytes is None:
        return _said("thread stack", threading.stack_size() or "the system's", False, "not asked for")
    before = threading.stack_size(wanted_bytes)
    running = threading.active_count() - 1
    note = f"was {before or 'the system default'}" + (
        f"; {running} threads run with what they have" if running else ""
    )
    return _said("thread stack", f"{wanted_bytes} bytes", True, note)


def _said(name: str, value: object, effective: bool, note: str) -> Setting:
    about = _ABOUT[name]
    return Setting(name, str(value), effective, note, about.reason, about.measured, about.cost)


def _mallopt(parameter: int, value: int) -> str:
    """Why not, "" where it is set."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return "the C library is not glibc"
    with open("/proc/self/maps", "rb") as maps:  # noqa: PTH123  one read
        if other := _OTHER_ALLOCATORS.search(maps.read()):
            return f"lib{other[1].decode()} allocates in glibc's place"
    if libc.mallopt(parameter, value) != 1:
        return f"mallopt refused {value}"
    return ""
