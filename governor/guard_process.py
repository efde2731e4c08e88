"""The process of `governor guard`, which becomes it by exec: a loop with one target.

So the command line's imports do not stay resident.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from pathlib import Path

import orjson

from governor import background, pins, real_time
from governor.actions.processes import GUARD_COMM
from governor.guard import Guard, read_policy, read_profile
from governor.journal import say
from governor.loop import Loop
from governor.toml_file import FileError


def guard_one(guard: Guard) -> Loop:
    """A loop with one target; raises OSError or FileError."""
    profile = read_profile(guard)
    wanted = read_policy(guard, profile)
    loop = Loop(guard.instance, guard.knob_path, wanted.signals.source, guard.bpf_refused)
    loop.unload_at_end = guard.unload_at_end
    target = loop.add(guard, 0, wanted, profile)
    loop.note = target.note
    ready_fd = guard.ready_fd

    def protected() -> None:
        nonlocal ready_fd
        ready_fd = background.ready(ready_fd)

    def reload() -> None:
        try:
            again = read_policy(guard, profile)
        except (FileError, OSError) as error:
            target.note("policy_refused", f"the policy stays as it was: {error}")
        else:
            target.policy_again(again)

    loop.protected, loop.reload = protected, reload
    return loop


def main() -> int:
    """Entry point: a JSON object with the fields of Guard as the only argument."""
    with suppress(OSError):  # no /proc. A governor outside looks for the agent beside it
        Path("/proc/self/comm").write_text(GUARD_COMM)
    guard = Guard(**orjson.loads(sys.argv[1]))
    if guard.ready_fd >= 0:
        os.set_inheritable(guard.ready_fd, False)
    try:
        loop = guard_one(guard)
    except (OSError, FileError) as error:
        why = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else error
        say(f"cannot guard {guard.cgroup}: {why}")
        if guard.unload_at_end:
            pins.unload(guard.instance)
        return 1
    real_time.become_prompt()
    loop.run()
    return loop.status


if __name__ == "__main__":
    sys.exit(main())
