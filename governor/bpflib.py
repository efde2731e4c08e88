"""libbpf through ctypes: what the resident processes need to read pinned maps and rings, and nothing else.

The library comes with BCC (`libbpf.so.1`, older systems `libbpf.so.0`). Imports ctypes only, since the real-time
process uses it.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable

_RECORD_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_BPF_ANY = 0


def open_libbpf() -> ctypes.CDLL:
    """libbpf; raises OSError when neither libbpf.so.1 nor libbpf.so.0 is installed."""
    for name in ("libbpf.so.1", "libbpf.so.0"):
        try:
            lib = ctypes.CDLL(name, use_errno=True)
        except OSError:
            continue
        lib.ring_buffer__new.restype = ctypes.c_void_p
        lib.ring_buffer__new.argtypes = [ctypes.c_int, _RECORD_CALLBACK, ctypes.c_void_p, ctypes.c_void_p]
        lib.ring_buffer__add.argtypes = [ctypes.c_void_p, ctypes.c_int, _RECORD_CALLBACK, ctypes.c_void_p]
        for function in ("ring_buffer__consume", "ring_buffer__epoll_fd", "ring_buffer__free"):
            getattr(lib, function).argtypes = [ctypes.c_void_p]
        return lib
    raise OSError("libbpf is missing: install libbpf1 (it comes with python3-bpfcc)")


def _check(status: int, what: str) -> int:
    if status < 0:
        code = ctypes.get_errno() or -status
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return status


class PinnedMap:
    """A pinned BPF map of fixed-size keys and values, both given and returned as bytes."""

    def __init__(self, lib: ctypes.CDLL, path: str) -> None:
        """Raises OSError when there is no pin at `path` or it may not be opened."""
        self._lib = lib
        self._path = path
        self.fd = _check(lib.bpf_obj_get(path.encode()), f"open pinned map {path}")

    def update(self, key: bytes, value: bytes) -> None:
        """Write one element; raises OSError."""
        _check(self._lib.bpf_map_update_elem(self.fd, key, value, _BPF_ANY), f"write to {self._path}")

    def lookup(self, key: bytes, value_size: int) -> bytes | None:
        """One element of `value_size` bytes (per-CPU maps: of all CPUs), None when absent."""
        value = ctypes.create_string_buffer(value_size)
        if self._lib.bpf_map_lookup_elem(self.fd, key, value) < 0:
            return None
        return value.raw

    def delete(self, key: bytes) -> None:
        """Remove one element, present or not."""
        self._lib.bpf_map_delete_elem(self.fd, key)

    def close(self) -> None:
        """Close the descriptor; the pin stays."""
        os.close(self.fd)


class Rings:
    """All rings of one instance behind one epoll descriptor (`fd`). A ring has one reader."""

    def __init__(self, lib: ctypes.CDLL, rings: list[PinnedMap], on_record: Callable[[bytes], None]) -> None:
        """`on_record` gets a copy of each record; what it raises is raised again from drain()."""
        self._lib = lib
        self._raised: list[BaseException] = []

        def call(_context: int, data: int, size: int) -> int:
            try:
                on_record(ctypes.string_at(data, size))
            except BaseException as error:  # noqa: BLE001  ctypes would swallow it: drain() raises it
                self._raised.append(error)
            return 0

        self._call = _RECORD_CALLBACK(call)  # libbpf keeps a pointer to it
        self._rings = lib.ring_buffer__new(rings[0].fd, self._call, None, None)
        if not self._rings:
            raise OSError(ctypes.get_errno(), "open the ring: " + os.strerror(ctypes.get_errno()))
        for ring in rings[1:]:
            _check(lib.ring_buffer__add(self._rings, ring.fd, self._call, None), "open a further ring")
        self.fd: int = lib.ring_buffer__epoll_fd(self._rings)

    def drain(self) -> int:
        """Hand over all records that wait; returns how many."""
        count: int = self._lib.ring_buffer__consume(self._rings)
        if self._raised:
            raise self._raised.pop()
        return count

    def close(self) -> None:
        """Free the rings; records not drained stay for the next reader."""
        self._lib.ring_buffer__free(self._rings)


def possible_cpus() -> int:
    """How many values an element of a per-CPU map has."""
    with open("/sys/devices/system/cpu/possible") as listed:  # noqa: PTH123  pathlib costs the real-time process 2 MiB
        return int(listed.read().strip().replace("-", ",").split(",")[-1]) + 1
