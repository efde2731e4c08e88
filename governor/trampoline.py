"""A program of a few instructions that executes another one: what governor's child is, when a container's takes over.

`/proc/self/exe` means the program of whoever executes: a container that makes it its command, or its script's
interpreter, would be handed our own interpreter, and could write to that once nobody runs it (as CVE-2019-5736 did to
runc). So the child becomes this first: a sealed file in memory, with nothing in it that is ours.
"""

from __future__ import annotations

import fcntl
import os
import struct
from typing import NoReturn

_BASE, _HEADERS_BYTES = 0x400000, 120
_MFD_CLOEXEC, _MFD_ALLOW_SEALING, _MFD_EXEC = 1, 2, 0x10  # linux/memfd.h; the last since 6.3
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
# On the stack: argc, argv (its own name, the path, the arguments), NULL, the environment. Calls
# execve(argv[1], argv + 2, environment), and where that comes back exit_group(127).
_X86_64 = bytes.fromhex(
    "488b7c2410"  # mov rdi, [rsp + 16]
    "488d742418"  # lea rsi, [rsp + 24]
    "488b0424"  # mov rax, [rsp]
    "488d54c410"  # lea rdx, [rsp + 8 * rax + 16]
    "b83b0000000f05"  # execve
    "bf7f000000b8e70000000f05"  # exit_group(127)
)
_AARCH64 = struct.pack(
    "<10I",
    0xF9400BE0,  # ldr x0, [sp, #16]
    0x910063E1,  # add x1, sp, #24
    0xF94003E2,  # ldr x2, [sp]
    0x8B226FE2,  # add x2, sp, x2, uxtx #3
    0x91004042,  # add x2, x2, #16
    *(0xD2801BA8, 0xD4000001),  # execve
    *(0xD2800FE0, 0xD2800BC8, 0xD4000001),  # exit_group(127)
)
_MACHINES = {"x86_64": (62, _X86_64), "aarch64": (183, _AARCH64)}  # e_machine of elf.h


def open_trampoline() -> int:
    """A descriptor of it; raises OSError where there is none for this machine."""
    machine = os.uname().machine
    if machine not in _MACHINES:
        raise OSError(
            f"found machine {machine}, expected one of {', '.join(_MACHINES)} to run commands in containers"
        )
    program = _elf(*_MACHINES[machine])
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    try:
        fd = os.memfd_create("governor-exec", flags | _MFD_EXEC)
    except OSError:  # an older kernel: there all can be executed
        fd = os.memfd_create("governor-exec", flags)
    os.write(fd, program)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
    return fd


def jump(fd: int, path: str, argv: tuple[str, ...], environment: dict[str, str]) -> NoReturn:
    """Become the program at `path`, by way of the trampoline; exit status 127 where that cannot be executed."""
    os.execve(fd, ("governor-exec", path, *argv), environment)


def _elf(machine: int, code: bytes) -> bytes:
    """A static executable: ELF header, one segment, the code."""
    size_bytes = _HEADERS_BYTES + len(code)
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    header = struct.pack(
        "<HHIQQQIHHHHHH", 2, machine, 1, _BASE + _HEADERS_BYTES, 64, 0, 0, 64, 56, 1, 64, 0, 0
    )  # ET_EXEC, e_entry, e_phoff, ..., one program header
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size_bytes, size_bytes, 0x1000)  # PT_LOAD, r-x
    return ident + header + segment + code
