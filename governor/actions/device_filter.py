"""What the processes of a cgroup may do with devices: what a runtime lets any container do, and nothing else.

A command in a container is not in the container's cgroup, where the runtime's own filter is, and governor's may use
every device. The container could make a node of the machine's disk, and have the command open it.
"""

from __future__ import annotations

import ctypes
import os
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
_BPF = {"x86_64": 321, "aarch64": 280}
_PROG_LOAD, _PROG_ATTACH = 5, 8  # enum bpf_cmd
_CGROUP_DEVICE_PROGRAM, _CGROUP_DEVICE, _ALLOW_MULTI = 15, 6, 2
_LOAD, _AND, _IF_EQUAL, _UNLESS_EQUAL, _SET, _EXIT = 0x61, 0x57, 0x15, 0x55, 0xB7, 0x95
_CHARACTER = 2  # BPF_DEVCG_DEV_CHAR
_PTS = 136
# Major to minors: null, zero, full, random, urandom; tty, ptmx. Beside the terminals of devpts.
_DEVICES = {1: (3, 5, 7, 8, 9), 5: (0, 2)}


def attach(cgroup: str) -> None:
    """Bound what is in a cgroup, until that is removed. Raises OSError."""
    program = _program()
    instructions = ctypes.create_string_buffer(program)
    license_ = ctypes.create_string_buffer(b"GPL")
    addresses = ctypes.addressof(instructions), ctypes.addressof(license_)
    loaded = _bpf(_PROG_LOAD, struct.pack("IIQQ", _CGROUP_DEVICE_PROGRAM, len(program) // 8, *addresses))
    try:
        directory = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _bpf(_PROG_ATTACH, struct.pack("IIII", directory, loaded, _CGROUP_DEVICE, _ALLOW_MULTI))
        finally:
            os.close(directory)
    finally:
        os.close(loaded)


def _program() -> bytes:
    """Reads struct bpf_cgroup_dev_ctx: access and type, major, minor; 1 allows it."""
    steps = [
        _step(_LOAD, 2, 1, 0),
        _step(_AND, 2, value=0xFFFF),
        _step(_LOAD, 3, 1, 4),
        _step(_LOAD, 4, 1, 8),
        _step(_SET, 0, value=0),
        _step(_IF_EQUAL, 2, offset=1, value=_CHARACTER),
        _step(_EXIT),
    ]
    allow = [_step(_SET, 0, value=1), _step(_EXIT)]
    steps += [_step(_UNLESS_EQUAL, 3, offset=len(allow), value=_PTS), *allow]
    for major, minor in ((major, minor) for major, minors in _DEVICES.items() for minor in minors):
        steps += [_step(_UNLESS_EQUAL, 3, offset=1 + len(allow), value=major)]
        steps += [_step(_UNLESS_EQUAL, 4, offset=len(allow), value=minor), *allow]
    return b"".join([*steps, _step(_EXIT)])


def _step(code: int, to: int = 0, source: int = 0, offset: int = 0, value: int = 0) -> bytes:
    """One struct bpf_insn."""
    return struct.pack("BBhi", code, to | source << 4, offset, value)


def _bpf(command: int, attributes: bytes) -> int:
    padded = ctypes.create_string_buffer(attributes, 128)
    result: int = _LIBC.syscall(_BPF.get(os.uname().machine, -1), command, padded, len(padded))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"bound the devices of a command: {os.strerror(code)}")
    return result
