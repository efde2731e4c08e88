"""The knobs of a memcg that governor may turn, a record of each turn that survives a crash, and their undoing.

Every governed memcg has a slot in a file on tmpfs, shared by both processes. A turn is written down before it is
made, so whoever survives (or `governor off`, or the next start) can undo exactly what governor did and nothing
else: a memcg that somebody else froze is not thawed, a `memory.high` that somebody else set is not touched. Where the
memcg may not be frozen, the agent's own processes are stopped, each written down as well.
Imported by the real-time process.
"""

from __future__ import annotations

import mmap
import os
import signal
import struct
from collections.abc import Iterator
from contextlib import suppress

from governor import subtree
from governor.cgroup import UNLIMITED, Memcg, is_inside, memcg_of, parse_limit
from governor.record import PAGE_BYTES

SLOT_BYTES = 16384
SQUEEZE_S = 0.05
_SLOTS_MORE = 64  # that the file grows by
_MAGIC = b"GOVKNOB1"
# What holds the agent
FREEZE, STOP, NONE = 1, 2, 3
BRAKE_NAMES = {FREEZE: "freeze", STOP: "stop", NONE: "none"}
# magic, cgroup id, in use, held by us (FREEZE, STOP or 0), memory.high set by us, memory.high as we set it, length of
# the path
_SLOT = struct.Struct("=8sQBBBxxxxxqH")
_OFF_USED, _OFF_FROZEN, _OFF_HIGH_SET, _OFF_HIGH = 16, 17, 18, 24
_OFF_STOPPED = 4096  # how many processes are stopped by us, and each one's pid and start ticks
_STOPPED_COUNT, _STOPPED = struct.Struct("=I"), struct.Struct("=IQ")
_STOPPED_LIMIT = (SLOT_BYTES - _OFF_STOPPED - _STOPPED_COUNT.size) // _STOPPED.size
_PATH_LIMIT = _OFF_STOPPED - _SLOT.size


class KnobFile:
    """The slots of one instance, memory-mapped. Both processes may open it; the one that adopts writes a slot."""

    def __init__(self, path: str, slots: int = 1) -> None:
        """Open or make the file with room for at least so many slots; raises OSError."""
        self.path = path
        self._full_below = 0  # slots that are in use, all of them, as far as this process has freed none
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            size_bytes = os.fstat(fd).st_size
            if size_bytes < slots * SLOT_BYTES:  # another process may have made it larger, and use that
                size_bytes = slots * SLOT_BYTES
                os.ftruncate(fd, size_bytes)
            self.memory = mmap.mmap(fd, size_bytes)
        finally:
            os.close(fd)

    def free_slot(self) -> int:
        """A slot that is not in use; the file grows where there is none."""
        count, memory = len(self.memory) // SLOT_BYTES, self.memory
        maybe = range(self._full_below, count)
        slot = self._full_below = next((slot for slot in maybe if not memory[slot * SLOT_BYTES + _OFF_USED]), count)
        if (slot + 1) * SLOT_BYTES > len(self.memory):
            self._grow((slot + _SLOTS_MORE) * SLOT_BYTES)
        return slot

    def _grow(self, size_bytes: int) -> None:
        self.memory.resize(size_bytes)  # the file as well

    def release(self, slot: int) -> None:
        """Forget whose knobs a slot holds, once reflex let go of it. Who was stopped goes on, wherever it is now."""
        start = slot * SLOT_BYTES
        _let_go_on(self.memory, start)
        self.memory[start : start + _SLOT.size] = bytes(_SLOT.size)
        self._full_below = min(self._full_below, slot)

    def adopt(self, slot: int, path: str, cgroup_id: int) -> None:
        """Write down whose knobs the slot holds; nothing is turned yet. Raises ValueError for a path too long."""
        encoded = path.encode()
        if len(encoded) > _PATH_LIMIT:
            raise ValueError(f"found a cgroup path of {len(encoded)} bytes, expected at most {_PATH_LIMIT}")
        start = slot * SLOT_BYTES
        if self.slot_path(slot) is not None:
            _let_go_on(self.memory, start)  # of a memcg that is gone; its processes may have moved on
        self.memory[start + _SLOT.size : start + _SLOT.size + len(encoded)] = encoded
        _SLOT.pack_into(self.memory, start, _MAGIC, cgroup_id, 1, 0, 0, UNLIMITED, len(encoded))

    def slot_path(self, slot: int) -> str | None:
        """The memcg of a slot, None where the slot is free."""
        start = slot * SLOT_BYTES
        if start >= len(self.memory) and start < (size_bytes := os.stat(self.path).st_size):  # noqa: PTH116
            self._grow(size_bytes)
        if start >= len(self.memory):
            return None
        magic, _, used, _, _, _, length = _SLOT.unpack_from(self.memory, start)
        if magic != _MAGIC or not used:
            return None
        return self.memory[start + _SLOT.size : start + _SLOT.size + length].decode()

    def slots(self) -> Iterator[int]:
        """The slots in use."""
        return (slot for slot in range(len(self.memory) // SLOT_BYTES) if self.slot_path(slot) is not None)

    def knobs(self, slot: int) -> Knobs | None:
        """The knobs of a slot; None where it is free or its memcg is gone (or another one of the same name)."""
        path = self.slot_path(slot)
        if path is None:
            return None
        try:
            memcg = Memcg(path)
        except OSError:
            return None
        _, cgroup_id, *_ = _SLOT.unpack_from(self.memory, slot * SLOT_BYTES)
        if memcg.cgroup_id != cgroup_id:
            memcg.close()
            return None
        return Knobs(memcg, self.memory, slot * SLOT_BYTES)

    @property
    def is_turned(self) -> bool:
        """Whether restore_all() has something to undo."""
        return any(self._is_turned(slot) for slot in self.slots())

    def is_slot_turned(self, slot: int) -> bool:
        """Whether it is written down of a slot that something was turned and not undone."""
        start = slot * SLOT_BYTES
        return bool(self.memory[start + _OFF_FROZEN] or self.memory[start + _OFF_HIGH_SET])

    def _is_turned(self, slot: int) -> bool:
        if self.memory[slot * SLOT_BYTES + _OFF_FROZEN] == STOP:
            return True
        knobs = self.knobs(slot)
        if knobs is None:
            return False
        knobs.close()
        return knobs.frozen_by_us or knobs.high_set_by_us

    def restore_all(self) -> list[str]:
        """Undo every turn in the file; a line for each memcg that had one."""
        told = []
        for slot in self.slots():
            if count := _let_go_on(self.memory, slot * SLOT_BYTES):
                told.append(f"{self.slot_path(slot)}: {count} processes go on")
            if knobs := self.knobs(slot):
                if undone := knobs.restore():
                    told.append(f"{knobs.memcg.path}: {', '.join(undone)}")
                knobs.close()
        return told


def is_stopped_by_governor(path: str, pid: int) -> bool:
    """Whether the knob file at `path` has it that governor stopped a process; False where there is no such file."""
    if not os.path.exists(path):  # noqa: PTH110  no pathlib here
        return False
    memory = KnobFile(path).memory
    for start in range(0, len(memory), SLOT_BYTES):
        at = start + _OFF_STOPPED
        count = min(_STOPPED_COUNT.unpack_from(memory, at)[0], _STOPPED_LIMIT)
        listed = (_STOPPED.unpack_from(memory, at + _STOPPED_COUNT.size + i * _STOPPED.size) for i in range(count))
        if memory[start + _OFF_FROZEN] == STOP and any(stopped == pid for stopped, _ in listed):
            return True
    return False


def _let_go_on(memory: mmap.mmap, start: int) -> int:
    """SIGCONT to exactly the processes that the slot names as stopped by us; how many there were."""
    if memory[start + _OFF_FROZEN] != STOP:
        return 0
    at = start + _OFF_STOPPED
    count = min(int(_STOPPED_COUNT.unpack_from(memory, at)[0]), _STOPPED_LIMIT)
    for i in range(count):
        pid, start_ticks = _STOPPED.unpack_from(memory, at + _STOPPED_COUNT.size + i * _STOPPED.size)
        subtree.send(pid, start_ticks, signal.SIGCONT)
    memory[start + _OFF_FROZEN] = 0
    _STOPPED_COUNT.pack_into(memory, at, 0)
    return count


class Knobs:
    """`cgroup.freeze` and `memory.high` of one memcg, or the SIGSTOP of the agent in it."""

    def __init__(self, memcg: Memcg, memory: mmap.mmap, start: int) -> None:
        self.memcg = memcg
        self._memory = memory
        self._start = start
        self._agent: tuple[int, int] | None = None
        # Who is inside would freeze itself, and memory.high would throttle it: neither is its to turn.
        inside = is_inside(memcg_of("self", memcg.v1), memcg.path)
        self._freeze_fd = -1 if inside else self._open("cgroup.freeze")
        self._high_fd = -1 if inside else self._open("memory.high")

    def _open(self, name: str) -> int:
        try:
            return self.memcg.open(name, os.O_RDWR)
        except OSError:
            return -1

    def set_agent(self, pid: int, governor_pid: int) -> None:
        """Whose processes are stopped where the memcg may not be frozen; governor's own never are."""
        self._agent = (pid, governor_pid)

    @property
    def brake(self) -> int:
        """What can hold the agent here: FREEZE, STOP, or NONE where its processes may not be signalled either."""
        if self._freeze_fd >= 0:
            return FREEZE
        stat = subtree.read_stat(self._agent[0]) if self._agent else None
        return NONE if stat and not subtree.send(stat.pid, stat.start_ticks, 0) else STOP

    @property
    def frozen_by_us(self) -> bool:
        """Whether governor froze this memcg, or stopped the agent, and has not let it go on."""
        return bool(self._memory[self._start + _OFF_FROZEN])

    @property
    def high_set_by_us(self) -> bool:
        """Whether memory.high is governor's."""
        return bool(self._memory[self._start + _OFF_HIGH_SET])

    def frozen_by_others(self) -> bool:
        """Whether somebody else holds it frozen: then it cannot grow, and is theirs to thaw."""
        if self._freeze_fd < 0:
            return False
        try:
            return not self.frozen_by_us and os.pread(self._freeze_fd, 8, 0).strip() == b"1"
        except OSError:
            return False

    def freeze(self) -> bool:
        """Freeze, or stop the agent; False when somebody else has it frozen, or it cannot be held now."""
        if self.frozen_by_us:
            return True
        if self.frozen_by_others():
            return False
        if self._freeze_fd < 0:
            return self._stop()
        try:
            self._memory[self._start + _OFF_FROZEN] = FREEZE
            os.pwrite(self._freeze_fd, b"1", 0)
        except OSError:
            self._memory[self._start + _OFF_FROZEN] = 0
            return False
        return True

    def thaw(self) -> bool:
        """Thaw if governor froze it; False when there was nothing to thaw."""
        if not self.frozen_by_us:
            return False
        if self._memory[self._start + _OFF_FROZEN] == STOP:
            return _let_go_on(self._memory, self._start) > 0
        try:
            os.pwrite(self._freeze_fd, b"0", 0)
        except OSError:
            return False
        finally:
            self._memory[self._start + _OFF_FROZEN] = 0
        return True

    def _stop(self) -> bool:
        if not self._agent:
            return False
        at = self._start + _OFF_STOPPED
        _STOPPED_COUNT.pack_into(self._memory, at, 0)
        self._memory[self._start + _OFF_FROZEN] = STOP
        agent_pid, governor_pid = self._agent
        if subtree.stop(agent_pid, self.memcg.own_path, governor_pid, self._write_down):
            return True
        _let_go_on(self._memory, self._start)
        return False

    def _write_down(self, pid: int, start_ticks: int) -> bool:
        at = self._start + _OFF_STOPPED
        count = _STOPPED_COUNT.unpack_from(self._memory, at)[0]
        if count >= _STOPPED_LIMIT:
            return False
        _STOPPED.pack_into(self._memory, at + _STOPPED_COUNT.size + count * _STOPPED.size, pid, start_ticks)
        _STOPPED_COUNT.pack_into(self._memory, at, count + 1)
        return True

    def squeeze(self, high_bytes: int) -> bool:
        """Set memory.high under the current usage, for not much longer than SQUEEZE_S; as set_high otherwise.

        The kernel (memory_high_write) sets the value first and then reclaims until a signal comes.
        """
        before = signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, SQUEEZE_S, SQUEEZE_S)
        try:
            return self.set_high(high_bytes)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)

    def set_high(self, high_bytes: int) -> bool:
        """Set memory.high unless somebody else has one; False when it was left alone.

        A value under the current usage makes the kernel reclaim in this call: pass one above, or squeeze().
        """
        if self._high_fd < 0:
            return False
        aligned = high_bytes // PAGE_BYTES * PAGE_BYTES
        was_set, was_bytes = self.high_set_by_us, self._our_high()
        try:
            found = parse_limit(os.pread(self._high_fd, 32, 0))
            if found != UNLIMITED and not (self.high_set_by_us and found == self._our_high()):
                return False
            self._mark_high(True, aligned)
            os.pwrite(self._high_fd, str(aligned).encode(), 0)
            if not self.high_set_by_us:  # the other process has lifted the one before meanwhile
                self._mark_high(True, aligned)
        except (OSError, ValueError):
            self._mark_high(was_set, was_bytes)
            return False
        return True

    def lift_high(self) -> bool:
        """Put memory.high back to "max" if it is still governor's; False when it was not."""
        if not self.high_set_by_us:
            return False
        try:
            ours = parse_limit(os.pread(self._high_fd, 32, 0)) == self._our_high()
            if ours:
                os.pwrite(self._high_fd, b"max", 0)
        except (OSError, ValueError):
            ours = False
        self._memory[self._start + _OFF_HIGH_SET] = 0
        with suppress(OSError, ValueError):  # unless the other process has set one meanwhile
            if ours and parse_limit(os.pread(self._high_fd, 32, 0)) == self._our_high():
                self._memory[self._start + _OFF_HIGH_SET] = 1
        return ours

    def restore(self) -> list[str]:
        """Undo every turn; what was undone, in words. memory.high first, so that what thaws is not throttled."""
        undone = ["memory.high lifted"] if self.lift_high() else []
        return [*undone, "thawed"] if self.thaw() else undone

    def _mark_high(self, is_set: bool, high_bytes: int) -> None:
        self._memory[self._start + _OFF_HIGH_SET] = is_set
        struct.pack_into("=q", self._memory, self._start + _OFF_HIGH, high_bytes)

    def _our_high(self) -> int:
        return int(struct.unpack_from("=q", self._memory, self._start + _OFF_HIGH)[0])

    def close(self) -> None:
        """Close the descriptors; turns stay as they are."""
        for fd in (self._freeze_fd, self._high_fd):
            if fd >= 0:
                os.close(fd)
        self.memcg.close()
