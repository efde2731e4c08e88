"""What was done to an agent's tools, where the agent's next tool can read it: `governor why`, or plain `cat`.

One text file a memcg in the run-time directory, `memcg-<cgroup id>.told`, the newest notice last, readable by all.
"""

from __future__ import annotations

import os
import re
from datetime import datetime
from pathlib import Path

from governor import instance
from governor.journal import printable
from governor.model import Growth, Shed

_KEEP = 20
_LIMIT_BYTES = 64 << 10
_TYPED_LIMIT = 500
_NAME_LIMIT = 15  # TASK_COMM_LEN less its end
_STRANGE = re.compile(r"[^A-Za-z0-9._+-]")  # in a process's name, which is for its container to choose


def path_for(cgroup_id: int, directory: Path | None = None) -> Path:
    """The file of a memcg, in the run-time directory if none is given."""
    return (directory or instance.run_directory()) / f"memcg-{cgroup_id}.told"


def of_a_shed(killed: list[str], growth: Growth | Shed | None, max_bytes: int, more: int = 0) -> str:
    """What an agent should know of a tool that was killed: who (and how many more), how fast it grew, what to do."""
    who = ", ".join(_STRANGE.sub("_", name)[:_NAME_LIMIT] or "_" for name in killed)
    who += f" and {more} more" if more else ""
    grew = ""
    if growth and growth.grown_bytes:
        took_s = growth.window_ns / 1e9
        rate = f" in {took_s:.1f} s ({growth.grown_bytes / took_s / (1 << 20):.0f} MiB/s)" if took_s >= 0.05 else ""
        grew = f": it grew by {growth.grown_bytes >> 20} MiB{rate}"
    limit = f" of the {max_bytes >> 20} MiB that all processes here share" if max_bytes > 0 else ""
    return (
        f"governor killed {who}{grew} and would have used up the memory{limit}. The session is unharmed. "
        "Try again with less at a time: fewer parallel jobs, smaller batches or inputs, streaming instead of loading."
    )


def typed(text: str) -> str:
    """The same as a line that an agent's input takes for nothing but words: no command, no shell, no file's name."""
    plain = "".join(char if " " <= char <= "~" else " " for char in text)
    return " ".join(plain.split()).lstrip("/!#@?&-\\ ")[:_TYPED_LIMIT].rstrip()


def write(cgroup_id: int, text: str) -> None:
    """Add a notice; raises OSError."""
    path = path_for(cgroup_id)
    notices = [
        *read(cgroup_id, path.parent),
        f"{datetime.now().astimezone().isoformat(timespec='seconds')} {printable(text)}",
    ]
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(fd, "w", encoding="utf-8") as file:
        file.write("".join(f"{notice}\n" for notice in notices[-_KEEP:]))
    beside.chmod(0o644)  # whatever the umask says
    path.parent.chmod(0o711)  # and they must get there
    beside.rename(path)


def read(cgroup_id: int, directory: Path) -> list[str]:
    """The notices, oldest first; none where there is no file."""
    try:
        with path_for(cgroup_id, directory).open(encoding="utf-8", errors="replace") as file:
            return file.read(_LIMIT_BYTES).splitlines()
    except OSError:
        return []
