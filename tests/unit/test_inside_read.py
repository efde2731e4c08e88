"""Files of a container that is hostile ground, by real namespaces: what is read, and what leads nowhere."""

import contextlib
import os

import pytest

from governor import inside, inside_read
from tests.fakes import container as containers

pytestmark = pytest.mark.skipif(bool(containers.why_none()), reason=f"no containers here: {containers.why_none()}")
GLOBS = ("~/**/*.jsonl",)


@pytest.fixture
def container(tmp_path):
    made = containers.Container(tmp_path)
    made.write("/home/agent/one.jsonl", b"one\n")
    yield made
    made.close()


@contextlib.contextmanager
def door_to(container):
    door = inside.door_to(container.pid, container.start_ticks)
    yield door
    door.close()


def read(container, *globs, exclude=()):
    """Path to content, path to why not, and whether it was cut short."""
    files, skipped, cut_short = {}, {}, False
    with door_to(container) as door:
        for found in inside_read.find_inside(door, globs or GLOBS, exclude):
            cut_short |= found.is_cut_short
            if found.fd is None:
                skipped[found.path] = found.skipped
                continue
            files[found.path] = os.pread(found.fd, 1 << 16, 0)
            os.close(found.fd)
    return files, skipped, cut_short


def test_a_session_is_read_where_the_container_has_it(container):
    container.write("/home/agent/deep/two.jsonl", b"two\n")
    files, skipped, cut_short = read(container)
    assert files == {"/home/agent/one.jsonl": b"one\n", "/home/agent/deep/two.jsonl": b"two\n"}
    assert (skipped, cut_short) == ({}, False)
