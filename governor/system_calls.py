"""System calls that a command in a container has no use for, and that make it no safer: forbidden to it by seccomp.

A container's own filter and security label are not on what enters from outside. This is not the same, and less: it
keeps the parts of the kernel closed that a process without capabilities opens by a user namespace of its own.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

_LIBC = ctypes.CDLL(None, use_errno=True)
_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER = 22, 2  # linux/prctl.h, linux/seccomp.h
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06  # linux/bpf_common.h
_NUMBER_AT, _MACHINE_AT, _FIRST_ARGUMENT_AT = 0, 4, 16  # of struct seccomp_data; both machines are little-endian
_CLONE_NEW_ANYTHING = 0x7E020000  # of linux/sched.h: CLONE_NEWNS to CLONE_NEWNET
_X32 = 0x40000000
_JOIN_SESSION_KEYRING = 1  # linux/keyctl.h
# AUDIT_ARCH of linux/audit.h; clone; keyctl; and those forbidden: unshare, setns, mount, umount2, pivot_root, ptrace,
# bpf, perf_event_open, userfaultfd, add_key, request_key, keyctl, io_uring_setup, open_tree, move_mount, fsopen,
# mount_setattr, process_vm_readv, process_vm_writev.
_X86_64 = (0xC000003E, 56, 250, (272, 308, 165, 166, 155, 101, 321, 298, 323, 248, 249, 250))
_AARCH64 = (0xC00000B7, 220, 219, (97, 268, 40, 39, 41, 117, 280, 241, 282, 217, 218, 219))
_EVERYWHERE = (425, 428, 429, 430, 442)  # numbers from 424 on are the same
_VM = {"x86_64": (310, 311), "aarch64": (270, 271)}
_CLONE3 = 435
_MACHINES = {"x86_64": _X86_64, "aarch64": _AARCH64}


def new_session_keyring() -> None:
    """Keys of whoever started governor are nobody else's. Raises OSError."""
    if _LIBC.syscall(_machine()[2], _JOIN_SESSION_KEYRING, None) < 0 and ctypes.get_errno() != errno.ENOSYS:
        raise OSError(ctypes.get_errno(), "leave the session's keys behind")


def restrict() -> None:
    """Forbid them to this process and to all that it will be or start; it must have no_new_privs. Raises OSError."""
    machine, clone, _, forbidden = _machine()
    numbers = (*forbidden, *_VM[os.uname().machine], *_EVERYWHERE)
    program = [
        _step(_LOAD, _MACHINE_AT),
        _step(_IF_EQUAL, machine, 1, 0),
        _step(_RETURN, _KILL),
        _step(_LOAD, _NUMBER_AT),
        _step(_IF_AT_LEAST, _X32, 0, 1),
        _step(_RETURN, _ERRNO | errno.ENOSYS),
    ]
    for number in numbers:
        program += [_step(_IF_EQUAL, number, 0, 1), _step(_RETURN, _ERRNO | errno.EPERM)]
    program += [_step(_IF_EQUAL, _CLONE3, 0, 1), _step(_RETURN, _ERRNO | errno.ENOSYS)]  # its flags cannot be seen
    program += [
        _step(_IF_EQUAL, clone, 1, 0),
        _step(_RETURN, _ALLOW),
        _step(_LOAD, _FIRST_ARGUMENT_AT),
        _step(_IF_ANY_BIT, _CLONE_NEW_ANYTHING, 0, 1),
        _step(_RETURN, _ERRNO | errno.EPERM),
        _step(_RETURN, _ALLOW),
    ]
    steps = ctypes.create_string_buffer(b"".join(program))
    described = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(program), ctypes.addressof(steps)))
    if _LIBC.prctl(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, described, 0, 0) < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"restrict its system calls: {os.strerror(code)}")


def _step(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One struct sock_filter."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def _machine() -> tuple[int, int, int, tuple[int, ...]]:
    return _MACHINES[os.uname().machine]
