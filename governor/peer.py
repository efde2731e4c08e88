"""Who is at the other end of a Unix socket, as the kernel says: SO_PEERCRED. Imports what `governor run` may keep."""

from __future__ import annotations

import socket
import struct
from typing import NamedTuple

_UCRED = struct.Struct("=iII")  # struct ucred: pid, uid, gid


class Peer(NamedTuple):
    """When it connected or began to listen; `pid` is as our PID namespace has it, 0: it is outside of that."""

    pid: int
    uid: int


def peer_of(connection: socket.socket) -> Peer:
    """Raises OSError."""
    pid, uid, _ = _UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return Peer(pid, uid)
