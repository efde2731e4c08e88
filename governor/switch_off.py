"""`governor off`: the way out that always works, also after crashes and beside running instances.

What root's governors hold is root's to end; without root it is that user's own.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Collection
from contextlib import suppress

from governor import instance, leftovers, outside, pins
from governor.actions.commands import Commands
from governor.brake import KnobFile

_PATIENCE_S = 5.0
_ROUNDS = 3  # one that had to be killed may be started again, by `governor run`


def switch_off(only: Collection[str] = ()) -> list[str]:
    """Stop every governor, restore every knob, remove every pin and run-time file; what was done, in words.

    `only`: of those that hold locks of these names, and leave the others alone. What a tool was told of (`governor
    why`) stays. Raises OSError where there can be no run-time files.
    """
    done = []
    names = only or ("*",)
    for _ in range(_ROUNDS):
        pids = sorted({pid for name in names for pid in instance.holders(name)})
        stopped = [pid for pid in pids if pid != os.getpid() and _stop(pid)]
        done += [f"stopped process {pid}" for pid in stopped]
        if not stopped:
            break
    for path in (path for path in instance.knob_files() if not only or path.stem in only):
        with suppress(OSError):
            done += KnobFile(str(path)).restore_all()
    done += [f"removed {path}" for path in Commands().sweep()]
    done += [f"removed {path}" for name in names for path in outside.sweep(name)]
    if os.geteuid() == 0:
        done += [f"detached {name}" for name in (only or pins.instances()) if pins.unload(name)]
    for path in instance.run_directory().glob("memcg-*.hold"):
        with suppress(OSError):
            if not only or path.stem in only:
                path.unlink()
                done.append(f"ended a hold: {path.name}")
    if not only:
        leftovers.sweep(0)
    return done


def _stop(pid: int) -> bool:
    """SIGTERM, twice: do not wait for archives; then SIGKILL. False when it was gone already."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
            with suppress(OSError):
                signal.pidfd_send_signal(fd, number)
            if select.select([fd], [], [], _PATIENCE_S)[0]:
                break
    finally:
        os.close(fd)
    return True
