"""What makes a process prompt: priority, locked memory, and being spared by the OOM killer."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from contextlib import suppress

_PRIORITY = 10
_BEFORE_ALL = -20  # niceness
_MLOCK = 1 | 2 | 4  # MCL_CURRENT | MCL_FUTURE | MCL_ONFAULT


def become_real_time() -> None:
    """For reflex: SCHED_FIFO, locked memory, spared by the OOM killer: each where the kernel lets us."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO | os.SCHED_RESET_ON_FORK, os.sched_param(_PRIORITY))
        # A loop gone wild must not take a CPU away: after 0.2 s without sleeping, SIGXCPU makes us normal.
        signal.signal(signal.SIGXCPU, lambda *_: os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0)))
        resource.setrlimit(resource.RLIMIT_RTTIME, (200_000, 1_000_000))
    except OSError:
        pass  # an ordinary container may not; the brake is slower under load, as the README says
    _lock_memory()
    try:
        with open("/proc/self/oom_score_adj", "w") as adjust:  # noqa: PTH123  no pathlib here
            adjust.write("-900")
    except OSError:
        pass  # lowering it wants CAP_SYS_RESOURCE


def become_prompt() -> None:
    """For governor, where the kernel lets us: before all others that are not real-time, and locked memory.

    Thirty agents that burst at once take a CPU of its own from whoever decides about them, and its code from memory.
    """
    with suppress(OSError):  # wants CAP_SYS_NICE
        os.setpriority(os.PRIO_PROCESS, 0, _BEFORE_ALL)
    _lock_memory()


def become_ordinary() -> None:
    """For what is executed and is not governor's."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    if os.getpriority(os.PRIO_PROCESS, 0) < 0:
        os.setpriority(os.PRIO_PROCESS, 0, 0)


def _lock_memory() -> None:
    try:  # under a finite one, memory that is mapped later might be refused
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ctypes.CDLL(None).mlockall(_MLOCK)
    except (OSError, ValueError):
        pass  # raising it wants CAP_SYS_RESOURCE
