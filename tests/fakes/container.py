"""A container as a runtime makes one, by unshare: its own mounts, pids, network, and a root in memory."""

import ctypes
import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path

AGENT_UID = 12345
_LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS = 0x20000

_SETUP = r"""
set -e
mount -t tmpfs -o mode=755 root "$1"
cd "$1"
mkdir -p usr proc dev etc tmp old home/agent var/lib
mount --bind -o ro /usr usr
for link in bin lib lib64 sbin; do [ -e "/usr/$link" ] && ln -s "usr/$link" "$link"; done
for device in null zero full urandom; do touch "dev/$device"; mount --bind "/dev/$device" "dev/$device"; done
echo "agent:x:$2:$2::/home/agent:/bin/sh" > etc/passwd
chmod 1777 tmp
chown -R "$2:$2" home/agent
mount -t proc proc proc
hostname inside || true
pivot_root . old
umount -l old
rmdir old
eval "$4"
exec env -i HOME="$3" PATH=/usr/bin:/bin WHERE=inside setpriv --reuid "$2" --regid "$2" --groups 4242,"$2" \
    --bounding-set -sys_module sh -c "$5"
"""


class Container:
    """Runs until close(); `pid` is its first process, as the host sees it."""

    def __init__(self, uid=AGENT_UID, home="/home/agent", setup=":", program="sleep 1000", users=False):
        self._root = Path(tempfile.mkdtemp(dir="/tmp"))
        self._root.chmod(0o755)
        unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--net", "--ipc", "--uts"]
        script = ["sh", "-c", _SETUP, "sh", str(self._root), str(uid), home, setup, f"echo ready; exec {program}"]
        self._users = self._user_namespace() if users else None
        enter = ["nsenter", "-t", str(self._users.pid), "--user", "-S", "0", "-G", "0"] if users else []
        pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
        self._process = subprocess.Popen([*enter, *unshare, *script], **pipes)
        if self._process.stdout.readline() != b"ready\n":
            self._process.kill()
            self._root.rmdir()
            raise AssertionError(self._process.stderr.read().decode())
        outer = self._process.pid
        self.pid = int(Path(f"/proc/{outer}/task/{outer}/children").read_text())
        until = time.monotonic() + 5
        while Path(f"/proc/{self.pid}/comm").read_text() in ("sh\n", "setpriv\n") and time.monotonic() < until:
            time.sleep(0.01)

    def _user_namespace(self):
        """Who holds one, mapped as newuidmap does it."""
        holder = subprocess.Popen(["unshare", "--user", "sleep", "1000"])
        own = Path("/proc/self/ns/user").readlink()
        while Path(f"/proc/{holder.pid}/ns/user").readlink() == own:
            time.sleep(0.01)
        for kind in ("uid", "gid"):
            Path(f"/proc/{holder.pid}/{kind}_map").write_text("0 100000 65536\n")
        return holder

    @property
    def start_ticks(self):
        return int(Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[19])

    def path(self, inside):
        """A path of the container as the host reaches it."""
        return Path(f"/proc/{self.pid}/root") / inside.lstrip("/")

    def write(self, inside, content, uid=AGENT_UID):
        path = self.path(inside)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        for each in (path, path.parent):
            os.chown(each, uid, uid)
        return path

    def mount_fuse(self, inside):
        """A FUSE mount of which nobody ever answers; the descriptor, whose closing ends it."""
        self.path(inside).mkdir()
        fd = os.open("/dev/fuse", os.O_RDWR)
        mounts = os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY)
        pid = os.fork()
        if pid == 0:
            options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,allow_other".encode()
            _LIBC.setns(mounts, CLONE_NEWNS)
            os._exit(_LIBC.mount(b"stuck", inside.encode(), b"fuse", 0, options) != 0)
        os.close(mounts)
        assert os.waitpid(pid, 0)[1] == 0, "no FUSE mount"
        return fd

    def end(self):
        os.kill(self.pid, signal.SIGKILL)
        self._process.wait()

    def close(self):
        self._process.kill()
        self._process.wait()
        if self._users:
            self._users.kill()
            self._users.wait()
        self._process.stdout.close()
        self._process.stderr.close()
        self._root.rmdir()


def why_none():
    """Why no container can be made here; "" where one can."""
    if os.geteuid():
        return "not root"
    asked = subprocess.run(["unshare", "--mount", "--pid", "--fork", "--net", "true"], capture_output=True)
    return asked.stderr.decode()
