"""The terminal of a tmux pane, by the server's socket and the pane.

The server is the agent's: hostile. It may ask the client to run programs and to open files, and is handed the
client's environment and terminal. So the client runs as the agent's user, whoever owns the socket, in a session
without a terminal, with no configuration file, a bare environment, nothing on standard input, at most CALL_S and
4 MiB for each call. The pane must be the agent's terminal: a target that names another's is refused. Agents in other
namespaces than ours are not for this channel: the client would run outside of theirs.
"""

from __future__ import annotations

import os
import pwd
import select
import stat
import subprocess
import time
from pathlib import Path

from governor.channels.terminal import ChannelError, down_to
from governor.journal import printable

CALL_S = 5.0  # a machine that is short of memory is slow
_OUTPUT_LIMIT_BYTES = 4 << 20  # 500 lines of 500 characters, and room for UTF-8
_KEYS_PER_CALL = 256
_REASON_LIMIT = 200
_CLIENTS = 8  # are told at most
_PATH = "/usr/local/bin:/usr/bin:/bin"


class TmuxTerminal:
    """A pane; `agent_uid` owns the agent, `agent_terminal` is the device number of its terminal, 0 if it has none."""

    def __init__(self, socket: str, target: str, agent_uid: int, agent_terminal: int) -> None:
        """Nothing is asked yet."""
        self._socket, self._target = socket, target
        self._agent_uid, self._agent_terminal = agent_uid, agent_terminal
        self._pane = ""

    def screen(self) -> list[str]:
        """What the pane shows, or would show if nobody scrolled back in it; raises ChannelError."""
        pane = self._own_pane()
        told = self._tmux("display-message", "-p", "-t", pane, "#{cursor_y}", ";", "capture-pane", "-p", "-t", pane)
        row, *lines = told.removesuffix("\n").split("\n")
        return down_to(lines, int(row) if row.isdecimal() else 0)

    def type(self, keys: bytes) -> None:
        """Leave copy mode if need be, then send the bytes as they are; raises ChannelError."""
        pane = self._own_pane()
        modes = self._tmux("display-message", "-p", "-t", pane, "#{pane_in_mode} #{pane_synchronized}").split()
        if modes[1:] == ["1"]:
            raise ChannelError("what is typed in this pane goes to others as well (synchronize-panes)")
        if modes[:1] != ["0"]:
            self._tmux("send-keys", "-t", pane, "-X", "cancel")
        for text, is_plain in _runs(keys):
            if is_plain:
                self._tmux("send-keys", "-t", pane, "-l", "--", _unended(text))
            else:
                for at in range(0, len(text), _KEYS_PER_CALL):
                    codes = [f"{ord(char):x}" for char in text[at : at + _KEYS_PER_CALL]]
                    self._tmux("send-keys", "-t", pane, "-H", *codes)

    def tell(self, text: str, for_ms: int) -> int:
        """Show a line to everybody who is attached to a session with the pane; how many. Raises ChannelError.

        On their status lines, until a key is pressed (which goes where it went), at most so long.
        """
        pane = self._own_pane()
        found = self._tmux("list-panes", "-a", "-F", "#{pane_id} #{session_id}").splitlines()
        sessions = {line.partition(" ")[2] for line in found if line.partition(" ")[0] == pane}
        attached = [
            line.partition(" ")
            for line in self._tmux("list-clients", "-F", "#{session_id} #{client_name}").splitlines()
        ]
        clients = [name for session, _, name in attached if session in sessions][:_CLIENTS]
        if not clients:
            raise ChannelError("nobody is attached to its tmux session")
        literal = text.replace("#", "##").replace("%", "%%")  # formats and times would be expanded
        for client in clients:
            self._tmux("display-message", "-c", client, "-d", str(for_ms), "--", _unended(literal))
        return len(clients)

    def _own_pane(self) -> str:
        """The id of the pane, which another pane never gets, once it is known to be the agent's terminal."""
        if self._pane:
            return self._pane
        wanted = "#{pane_id}\t#{pane_tty}\t#{pane_dead}"
        fields = self._tmux("display-message", "-p", "-t", self._target, wanted).strip().split("\t")
        if len(fields) != 3 or not fields[0].startswith("%") or not fields[0][1:].isdecimal():
            raise ChannelError(f"tmux knows no pane {printable(self._target)}")
        pane, terminal, is_dead = fields
        if is_dead != "0":
            raise ChannelError(f"nothing runs in pane {pane} any more")
        if self._agent_terminal != _device(terminal):
            raise ChannelError(f"pane {pane} is {printable(terminal)[:80]}, which is not the agent's terminal")
        self._pane = pane
        return pane

    def _tmux(self, *arguments: str) -> str:
        """What a tmux command prints; raises ChannelError."""
        self._check_socket()
        uid = self._agent_uid
        become: dict[str, object] = {}
        if os.geteuid() == 0 and uid != 0:
            become = {"user": uid, "group": _group(uid), "extra_groups": []}
        argv = ["tmux", "-f", "/dev/null", "-S", self._socket, *arguments]
        environment = {"PATH": _PATH, "LC_ALL": "C.UTF-8", "TERM": "dumb"}
        try:
            client = subprocess.Popen(  # type: ignore[call-overload]  # become
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=environment,
                cwd="/",
                start_new_session=True,  # our terminal would be its to type in
                **become,
            )
        except FileNotFoundError:
            raise ChannelError("tmux is not installed") from None
        except (OSError, subprocess.SubprocessError) as error:
            raise ChannelError(f"tmux cannot be run: {error}") from None
        with client:
            try:
                output, errors = _bounded(client)
                status = client.wait(CALL_S)
            except (TimeoutError, subprocess.TimeoutExpired):
                raise ChannelError(f"tmux did not answer within {CALL_S:g} s") from None
            finally:
                client.kill()
        if status:
            said = errors[:_REASON_LIMIT].decode(errors="replace").strip()
            raise ChannelError(f"tmux: {printable(said) or f'status {status}'}")
        return output.decode(errors="replace")

    def _check_socket(self) -> None:
        """Raises ChannelError where there is no socket of the agent's user: for its text, not for safety."""
        try:
            status = os.lstat(self._socket)  # a link could lead to another's
        except OSError as error:
            raise ChannelError(f"no tmux server at {printable(self._socket)}: {error.strerror}") from None
        if not stat.S_ISSOCK(status.st_mode):
            raise ChannelError(f"{printable(self._socket)} is no socket")
        if status.st_uid != self._agent_uid:
            raise ChannelError(f"{printable(self._socket)} belongs to another user ({status.st_uid})")
        if os.geteuid() == 0 and self._agent_uid == 0:  # then our client is root's: nobody may lead it elsewhere
            self._socket = os.path.realpath(self._socket)
            for above in Path(self._socket).parents:
                found = above.lstat()
                others_write = found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX
                if found.st_uid != 0 or others_write:
                    raise ChannelError(f"others than root may change {printable(str(above))}: not asked as root")


def _bounded(client: subprocess.Popen[bytes]) -> tuple[bytes, bytes]:
    """All that it prints, up to a limit; raises TimeoutError, and ChannelError for more."""
    assert client.stdout
    assert client.stderr
    printed = {client.stdout.fileno(): bytearray(), client.stderr.fileno(): bytearray()}
    open_fds = list(printed)
    deadline = time.monotonic() + CALL_S
    while open_fds:
        ready = select.select(open_fds, [], [], max(0.0, deadline - time.monotonic()))[0]
        if not ready:
            raise TimeoutError
        for fd in ready:
            data = os.read(fd, 65536)
            printed[fd] += data
            if not data:
                open_fds.remove(fd)
            if len(printed[fd]) > _OUTPUT_LIMIT_BYTES:
                raise ChannelError("tmux printed too much")
    output, errors = printed.values()
    return bytes(output), bytes(errors)


def _runs(keys: bytes) -> list[tuple[str, bool]]:
    """The keys in pieces that are plain text, or nothing but control characters."""
    runs: list[tuple[str, bool]] = []
    for char in keys.decode(errors="replace"):
        is_plain = char.isprintable()
        if runs and runs[-1][1] == is_plain:
            runs[-1] = (runs[-1][0] + char, is_plain)
        else:
            runs.append((char, is_plain))
    return runs


def _unended(text: str) -> str:
    """An argument that tmux does not take for the end of the command."""
    return text[:-1] + "\\;" if text.endswith(";") else text


def _device(path: str) -> int:
    """The device number of a terminal; -1 for what is none."""
    try:
        status = Path(path).stat()
    except (OSError, ValueError):
        return -1
    return status.st_rdev if stat.S_ISCHR(status.st_mode) else -1


def _group(uid: int) -> int:
    """The user's own group; the number of the user where the machine does not know it."""
    try:
        return pwd.getpwuid(uid).pw_gid
    except KeyError:
        return uid
