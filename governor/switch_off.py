"""`governor off`: the way out that always works, also after crashes and beside running instances."""

from __future__ import annotations

import os
import select
import signal
from contextlib import suppress

from governor import instance, pins
from governor.brake import KnobFile

_PATIENCE_S = 5.0


def switch_off() -> list[str]:
    """Stop every governor, restore every knob, remove every pin; what was done, in words."""
    done = []
    for pid in instance.holders():
        if pid != os.getpid() and _stop(pid):
            done.append(f"stopped process {pid}")
    for path in instance.knob_files():
        with suppress(OSError):
            done += KnobFile(str(path)).restore_all()
            path.unlink()
    for name in pins.instances():
        pins.unload(name)
        done.append(f"detached {name}")
    return done


def _stop(pid: int) -> bool:
    """SIGTERM, then SIGKILL; False when it was gone already."""
    try:
        fd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(OSError):
                signal.pidfd_send_signal(fd, number)
            if select.select([fd], [], [], _PATIENCE_S)[0]:
                break
    finally:
        os.close(fd)
    return True
