"""A process whose memory map is locked for ever: who reads its arguments or environment waits.

The kernel reads no page of a file there (since 4.17), but takes the lock of the map. The process holds that as it
maps over a page of a FUSE file that it has written to, and whoever serves the file never takes what was written
(fuse_vma_close of fs/fuse/file.c). It has mounts of its own, as a container's has. Who waits cannot always be killed
while the server lives: so close() ends that first, and it ends by itself in a while, whatever becomes of the test.
"""

import ctypes
import mmap
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

from governor import subtree

SERVER_S = 30
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_CLONE_NEWNS, _MS_REC_PRIVATE = 0x20000, 0x44000
_SHARED, _PRIVATE_FIXED_ANONYMOUS, _READ_WRITE = 0x1, 0x32, 0x3
_LOOKUP, _FORGET, _GETATTR, _OPEN, _READ, _WRITE, _INIT, _INTERRUPT, _FORGETS = 1, 2, 3, 14, 15, 16, 26, 36, 42
_ENOSYS = 38


class LockedMap:
    """Such a process, from lock() on; `file` is its file, as others reach it: who writes to that waits for ever."""

    def __init__(self, directory):
        directory.mkdir()
        command = [sys.executable, "-m", "tests.fakes.locked_map", str(directory)]
        pipes = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
        self._process = subprocess.Popen(command, **pipes)
        self.pid = self._process.pid
        self._server_pid = int(self._process.stdout.readline())
        self.file = Path(f"/proc/{self.pid}/root{directory}/file")

    @property
    def start_ticks(self):
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[19])

    def lock(self):
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()
        self.await_write()

    def await_write(self):
        """Until somebody waits."""
        assert self._process.stdout.readline() == b"written\n"

    @property
    def is_served(self):
        """Whether whoever waits still does."""
        return subtree.comm_of(self._server_pid) != "" and not subtree.read_stat(self._server_pid).ended

    def close(self):
        if self.is_served:
            os.kill(self._server_pid, signal.SIGKILL)
        self._process.kill()
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


def _serve(device, said):
    """Answer whatever is asked, but take nothing that is written."""
    signal.alarm(SERVER_S)
    while True:
        request = os.read(device, 1 << 18)
        _, opcode, unique, node = struct.unpack_from("<IIQQ", request)
        if opcode == _WRITE:
            os.write(said, b"written\n")
        if opcode in (_FORGET, _WRITE, _INTERRUPT, _FORGETS):
            continue
        mode = 0o40755 if node == 1 and opcode != _LOOKUP else 0o100644
        attributes = struct.pack("<6Q10I", 2, mmap.PAGESIZE, 8, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 0, 0)
        answers = {
            _INIT: struct.pack("<IIIIHHIIHHI28x", 7, 31, 1 << 17, 0, 12, 9, 1 << 16, 1, 0, 0, 0),
            _LOOKUP: struct.pack("<4Q2I", 2, 0, 1000, 1000, 0, 0) + attributes,
            _GETATTR: struct.pack("<Q2I", 1000, 0, 0) + attributes,
            _OPEN: struct.pack("<Q2I", 1, 0, 0),
            _READ: bytes(mmap.PAGESIZE),
        }
        answer = answers.get(opcode, b"")
        error = 0 if answer else -_ENOSYS
        os.write(device, struct.pack("<IiQ", 16 + len(answer), error, unique) + answer)


def _checked(result):
    if result in (-1, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def _main(directory):
    device = os.open("/dev/fuse", os.O_RDWR)
    _LIBC.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    _checked(_LIBC.unshare(_CLONE_NEWNS))
    _checked(_LIBC.mount(None, b"/", None, _MS_REC_PRIVATE, None))
    options = f"fd={device},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
    _checked(_LIBC.mount(b"stuck", directory.encode(), b"fuse", 0, options))
    server = os.fork()
    if server == 0:
        _serve(device, 1)
    os.close(device)  # the server's is the last: with it ends whoever waits
    file = os.open(f"{directory}/file", os.O_RDWR)
    print(server, flush=True)
    sys.stdin.readline()
    page = _checked(_LIBC.mmap(None, mmap.PAGESIZE, _READ_WRITE, _SHARED, file, 0))
    ctypes.memset(page, 1, 1)
    _LIBC.mmap(page, mmap.PAGESIZE, _READ_WRITE, _PRIVATE_FIXED_ANONYMOUS, -1, 0)


if __name__ == "__main__":
    _main(sys.argv[1])
