"""MemoryEvents: which files it has open; that it hears the kernel is in tests/kernel/test_agent_pressure.py."""

import os
import resource
from contextlib import suppress

import pytest

from governor.agent.memory_events import MemoryEvents

WAITED_FOR = "/proc/self/mounts"  # says by EPOLLPRI that it changed, as memory.events does


@pytest.fixture
def events():
    made = MemoryEvents()
    yield made
    made.close()
    assert opened() == 0


def opened():
    """Descriptors of this process on what is waited for."""
    found = 0
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{name}").endswith("/mounts")
    return found


def test_what_is_not_there_yet_is_opened_when_it_is(events, tmp_path):
    path = tmp_path / "memory.events"
    events.follow([str(path)])
    assert opened() == 0
    path.symlink_to(WAITED_FOR)
    for _ in range(2):  # once
        events.follow([str(path)])
        assert opened() == 1


def test_what_no_descriptor_was_left_for_is_opened_later(events):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        events.follow([WAITED_FOR])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert opened() == 0
    events.follow([WAITED_FOR])
    assert opened() == 1


def test_what_it_is_moved_away_from_is_closed(events, tmp_path):
    first, second = (tmp_path / name for name in ("first", "second"))
    for path in (first, second):
        path.symlink_to(WAITED_FOR)
    events.follow([str(first), str(second)])
    assert opened() == 2
    events.follow([str(second)])
    assert opened() == 1


def test_what_cannot_be_waited_for_is_left_out_and_closed(events, tmp_path):
    plain = tmp_path / "mounts"
    plain.touch()
    events.follow([str(plain), WAITED_FOR])
    assert opened() == 1
