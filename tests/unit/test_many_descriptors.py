"""A node's daemon has more descriptors than select() knows, and more memcgs than its socket holds messages."""

import os
import resource
import socket
import time
from pathlib import Path

import pytest

from governor import link
from governor.children import Children, fork
from governor.poller import Poller
from governor.reflex_process import ReflexProcess

SECOND_NS = 1_000_000_000


@pytest.fixture
def high():
    """A descriptor above 4096, and all further ones above 1024."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 6000:
        pytest.skip("no more than 6000 descriptors may be had here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (6000, before[1]))
    taken = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC) for _ in range(1100)]
    yield os.dup2(taken[0], 5000, inheritable=False)
    for fd in (*taken, 5000):
        os.close(fd)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_child_ends_well_and_has_none_of_them(high):
    def work():
        open_fds = [fd for fd in range(4, 6000) if _is_open(fd)]
        return repr(open_fds).encode()

    poller, ended = Poller(), []
    children = Children(poller)
    children.start(fork(work, time.monotonic_ns() + 30 * SECOND_NS, "work"), ended.append)
    until = time.monotonic() + 30
    while not ended and time.monotonic() < until:
        poller.wait(SECOND_NS)
    assert ended[0].ok, ended
    assert ended[0].output == b"[]"
    assert children.are_none


def _is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_all_that_is_said_at_once_arrives_in_order():
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setblocking(False)
    theirs.setblocking(False)
    reflex = ReflexProcess(None, Path("knobs"))
    reflex.fd = ours.fileno()
    wanted = [link.encode_slot(link.AGENT, slot, slot) for slot in range(5000)]
    assert all(reflex.send(message) for message in wanted)
    heard = []
    while True:
        try:
            heard.append(theirs.recv(link.MESSAGE_BYTES))
        except BlockingIOError:
            break
    assert len(heard) < len(wanted)  # else the socket holds them all, and this shows nothing
    while len(heard) < len(wanted):
        theirs.send(link.Alive(1, 0).encode())
        assert reflex.receive() == link.Alive(1, 0)
        heard.append(theirs.recv(link.MESSAGE_BYTES))
        while True:
            try:
                heard.append(theirs.recv(link.MESSAGE_BYTES))
            except BlockingIOError:
                break
    assert heard == wanted
    ours.close()
    theirs.close()
