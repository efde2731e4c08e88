"""A disk with room for so much and no more: a write is cut short where it ends, and the next one fails."""

from __future__ import annotations

import errno
import os

import pytest


def fill(monkeypatch: pytest.MonkeyPatch, name: str, room_bytes: int) -> None:
    """From now on, for whoever writes by `os.NAME`: write or pwrite."""
    real, left = getattr(os, name), [room_bytes]

    def write(fd: int, data: bytes, *where: int) -> int:
        if left[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written: int = real(fd, data[: left[0]], *where)
        left[0] -= written
        return written

    monkeypatch.setattr(os, name, write)
