"""What a running governor answers to who asks how things stand: a page of its targets at a time.

A request of the subscribers' protocol (see subscribers): {"type": "status", "after": SLOT}, 0 or less to begin. For
each of the next targets, and then of the governor:

    {"type": "target", ...}       the fields of standing.as_json
    {"type": "status", "pid": PID, "version": TEXT, "resident_bytes": N, "reflex_pid": PID,
     "reflex_resident_bytes": N, "targets": N, "faults": [TEXT], "next": SLOT}
                                  faults: as /healthz has them; next: what to ask for next, null at the end
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence

from governor import __version__
from governor.standing import Standing, as_json

NODE_SOCKET = "node.sock"  # of a node's daemon, in the run-time directory; a guard's is its memcg's
PAGE_TARGETS = 50  # so that one answer fits what a subscriber may leave unread
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")

Line = tuple[str, Mapping[str, object]]  # its type, and the other fields


def page(
    standing_of: Mapping[int, Callable[[], Standing]],
    after: int,
    reflex_pid: int,
    boottime_ns: int,
    faults: Sequence[str] = (),
) -> Iterator[Line]:
    """The answer; `standing_of` by slot."""
    slots = sorted(slot for slot in standing_of if slot > after)
    for slot in slots[:PAGE_TARGETS]:
        yield "target", as_json(standing_of[slot](), boottime_ns)
    yield (
        "status",
        {
            "pid": os.getpid(),
            "version": __version__,
            "resident_bytes": resident_bytes("self"),
            "reflex_pid": reflex_pid,
            "reflex_resident_bytes": resident_bytes(reflex_pid) if reflex_pid else 0,
            "targets": len(standing_of),
            "faults": list(faults),
            "next": slots[PAGE_TARGETS - 1] if len(slots) > PAGE_TARGETS else None,
        },
    )


def resident_bytes(pid: int | str) -> int:
    """Of a process; 0 when it is gone."""
    try:
        with open(f"/proc/{pid}/statm", "rb") as listed:  # noqa: PTH123
            return int(listed.read().split()[1]) * _PAGE_BYTES
    except (OSError, ValueError, IndexError):
        return 0
