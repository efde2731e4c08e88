"""reflex, of what needs no kernel; memcgs are directories of plain files."""

import gc
import socket
import weakref

import pytest
from test_sources import CALM, Node

from governor import link, record
from governor.brake import KnobFile
from governor.record import Record
from governor.reflex import Reflex


def test_what_the_programs_ask_of_reflex_alone_is_passed_on_to_nobody(tmp_path):
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reflex = Reflex(ours.fileno(), str(tmp_path / "knobs"), "psi")
    empty = Record._make([0] * len(Record._fields))
    for kind in (record.VERIFY, record.STALL, record.VERIFY):
        reflex._on_ring(empty._replace(kind=kind).encode())
    theirs.setblocking(False)
    assert link.decode_from_reflex(theirs.recv(1 << 12)).record.kind == record.STALL
    with pytest.raises(BlockingIOError):
        theirs.recv(1)
    theirs.close()
    ours.close()


def test_what_it_lets_go_of_needs_no_collection(tmp_path):
    node, knobs = Node(tmp_path / "agent", 50, 100), str(tmp_path / "knobs")
    KnobFile(knobs).adopt(0, str(node.path), node.path.stat().st_ino)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    reflex = Reflex(ours.fileno(), knobs, "psi")
    gc.disable()
    try:
        reflex._adopt(0, CALM)
        governed = weakref.ref(reflex._slots[0])
        reflex._release(reflex._slots[0])
        assert governed() is None
    finally:
        gc.enable()
        theirs.close()
        ours.close()
