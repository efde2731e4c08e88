"""The real-time half: hears crossings, brakes at once, keeps the loans' deadlines, forwards records.

Crossings come from the rings of BPF programs, from polling, or from both, and go one way. Started by the governor
process with one end of a socket pair; decides nothing beyond the brake. When the other end is gone it undoes every
turn of a knob and exits. Runs with SCHED_FIFO, locked memory and no garbage collector where it may. Imports ctypes
and pure modules only: its resident memory is counted.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
import sys
import time

from governor import link, record
from governor.bpf_source import BpfSource
from governor.bpf_watches import BpfWatches
from governor.brake import NONE, KnobFile
from governor.braking import Braking
from governor.cgroup import is_inside, memcg_of
from governor.governed import VERIFY_GAP_NS, Governed
from governor.poll_source import POLL, RECONCILE_NS
from governor.poller import Poller
from governor.real_time import become_real_time
from governor.record import Levels, Record
from governor.schedule import Schedule

HEARTBEAT_NS = 1_000_000_000
LOOKS_RATIO = 30  # beside BPF, so many times what looks at all memcgs take is between two looks at one of them
AVERAGED = 16
LOOKS_NS = 200_000  # of looks, until the ring is drained: a thousand memcgs may be due at once


class Reflex:
    """All governed memcgs of one instance, their sources, and the link to governor."""

    def __init__(self, link_fd: int, knob_path: str, wanted: str) -> None:
        """`wanted` is auto, or the one source that is forced: bpf, psi or poll."""
        self._link_fd = link_fd
        self._governor_pid = os.getppid()
        self._wanted = wanted
        self._unsent: list[bytes] = []
        self._knob_file = KnobFile(knob_path)
        self._slots: dict[int, Governed] = {}
        self._governed: dict[int, Governed] = {}  # by cgroup id
        self._watches = BpfWatches()
        self._schedule: Schedule[int] = Schedule()  # of the slots
        self._braking = Braking(self._watches, self._schedule, self._tell)
        self._poller = Poller()
        self._poller.register(link_fd, lambda _: self._hear())
        self._heartbeat_ns = 0
        self._look_took_ns = 0  # the average of late
        self._is_over = False

    # The hot path: from a record to whom it is of.

    def _on_ring(self, data: bytes) -> None:
        now_ns = time.monotonic_ns()
        found = record.decode(data)
        if found.kind == record.CROSSING and (governed := self._whose(found)):
            governed.poll.told(found)
            self._braking.on_crossing(governed, found)
            data = found._replace(cgroup_id=governed.limits.cgroup_id).encode()
        elif found.kind == record.VERIFY:  # several a second of a full memcg, and only ours to answer
            for governed in self._watches.watchers(found.cgroup_id):
                governed.wants_verify = True
                self._braking.plan(governed)
            return
        elif found.kind == record.OOM_KILL and found.cgroup_id not in self._governed:
            path = memcg_of(found.pid)  # the limit is one below or above: is the victim ours?
            for governed in self._governed.values():
                if is_inside(path, governed.knobs.memcg.path):
                    data = found._replace(cgroup_id=governed.limits.cgroup_id).encode()
        self._tell(link.encode_record(data, now_ns), may_drop=True)

    def _whose(self, found: Record) -> Governed | None:
        """The governed memcg that a crossing is of; an ancestor's only if the charge came from inside."""
        if (own := self._governed.get(found.cgroup_id)) is not None:
            return own
        below = self._watches.watchers(found.cgroup_id)
        path = memcg_of(found.pid) if below else None
        for governed in below:
            if is_inside(path, governed.knobs.memcg.path):
                return governed
            governed.poll.hurry(found.ktime_ns)  # the kernel reports a level once, and it may be ours in a moment
            self._braking.plan(governed)
        return None

    # What governor asks for.

    def _on_message(self, data: bytes) -> None:
        kind = data[0]
        if kind in (link.ADOPT, link.SET_LEVELS):
            slot, levels = link.decode_levels(data)
            self._adopt(slot, levels) if kind == link.ADOPT else self._set_levels(slot, levels)
        elif kind == link.THAW:
            asked = link.decode_thaw(data)
            if governed := self._slots.get(asked.slot):
                self._braking.thaw_as_asked(governed, asked)
        elif kind == link.OPEN_PINS:
            self._open_pins(link.decode_pins(data))
        else:
            slot, ns = link.decode_slot(data)
            governed = self._slots.get(slot)
            if governed and kind == link.BRAKE:
                self._braking.brake_as_asked(governed)
            elif governed and kind == link.PROLONG:
                governed.loan.prolong(ns)
                self._braking.plan(governed)
            elif governed and kind == link.AGENT:
                governed.knobs.set_agent(ns, self._governor_pid)
                self._tell_source(governed)
            elif kind == link.RELEASE:
                if governed:
                    self._release(governed)
                self._tell(link.Released(slot).encode())

    def _adopt(self, slot: int, levels: Levels) -> None:
        knobs = self._knob_file.knobs(slot)
        if knobs is None:
            self._tell(link.Adopted(slot, False, POLL, NONE).encode())
            return
        with_psi = self._wanted != "poll"
        governed = Governed(slot, knobs, levels, self._poller, with_psi, self._stirred, self._watches.lacks_stalls)
        self._slots[slot] = self._governed[knobs.memcg.cgroup_id] = governed
        if knobs.frozen_by_us:  # by an earlier reflex that was killed: lent for no longer than by this one
            governed.loan.begin(time.monotonic_ns())
        ok = self._braking.verify(governed, hear_again=True) is not None
        self._heed_stalls(governed)
        governed.told = self._watches.source(governed), knobs.brake
        self._tell(link.Adopted(slot, ok, *governed.told).encode())

    def _release(self, governed: Governed) -> None:
        governed.knobs.restore()
        self._watches.release(governed)
        governed.close()
        self._schedule.drop(governed.slot)
        del self._slots[governed.slot], self._governed[governed.limits.cgroup_id]

    def _heed_stalls(self, governed: Governed) -> None:
        governed.poll.heed_stalls(self._watches.lacks_stalls or governed.crowded_out)

    def _tell_source(self, governed: Governed) -> None:
        found = self._watches.source(governed), governed.knobs.brake
        if governed.told != found:
            governed.told = found
            self._tell(link.Source(governed.slot, *found).encode())

    def _open_pins(self, directory: str) -> None:
        """BPF takes over from polling."""
        self._close_pins()
        try:
            opened = BpfSource(directory, self._on_ring)
            opened.beat(time.monotonic_ns())
        except OSError as error:
            self._tell(link.Refused(str(error)).encode())
            return
        self._watches.bpf = opened
        self._poller.register(opened.fd, lambda _: self._drain())
        self._poller.first_fd = opened.fd
        for governed in self._governed.values():
            self._braking.verify(governed, hear_again=True)
            self._tell_source(governed)

    def _close_pins(self) -> None:
        """Polling takes over from BPF."""
        if self._watches.bpf:
            self._poller.unregister(self._watches.bpf.fd)
            self._watches.bpf.close()
            self._watches.bpf = None
        for governed in self._governed.values():
            self._watches.release(governed)
            governed.poll.heed_stalls(self._watches.lacks_stalls)
            governed.poll.due_ns = 0
            self._braking.plan(governed)

    def _set_levels(self, slot: int, levels: Levels) -> None:
        if governed := self._slots.get(slot):
            governed.set_levels(levels)
            self._braking.verify(governed, hear_again=True)

    # Time.

    def _tick(self, now_ns: int) -> None:
        for slot in self._schedule.due(now_ns):
            governed = self._slots[slot]
            if governed.loan.deadline_ns is not None and now_ns >= governed.loan.deadline_ns:
                self._braking.loan_over(governed)
            if governed.wants_verify and now_ns - governed.verified_ns >= VERIFY_GAP_NS:
                self._braking.verify(governed)
            if now_ns >= governed.poll.due_ns:
                self._look(governed, now_ns)
            self._braking.plan(governed)
            if self._braking.suspects or time.monotonic_ns() - now_ns > LOOKS_NS:
                break
        self._braking.confirm_all()
        if now_ns - self._heartbeat_ns >= HEARTBEAT_NS:
            self._heartbeat_ns = now_ns
            if self._watches.bpf and self._watches.bpf.vanished():
                self._tell(link.Refused("somebody unloaded the BPF programs").encode())
                self._close_pins()
                for governed in self._governed.values():
                    self._tell_source(governed)
            if self._watches.bpf:
                self._watches.bpf.beat(now_ns)
            dropped = self._watches.bpf.dropped_records() if self._watches.bpf else 0
            self._tell(link.Alive(now_ns, dropped).encode(), may_drop=True)

    def _look(self, governed: Governed, now_ns: int) -> None:
        """What polling sees; beside BPF, what it missed."""
        self._heed_stalls(governed)
        if governed.told[0] != self._watches.source(governed):
            self._tell_source(governed)
        watched = (self._watches.bpf is not None or self._wanted == "bpf") and not governed.crowded_out
        spared_ns = max(RECONCILE_NS, LOOKS_RATIO * len(self._slots) * self._look_took_ns)
        begun_ns = time.monotonic_ns()
        found = governed.poll.look(governed.levels, now_ns, watched, spared_ns)
        self._look_took_ns += (time.monotonic_ns() - begun_ns - self._look_took_ns) // AVERAGED
        if found:
            self._braking.on_crossing(governed, found)
            self._tell(link.encode_record(found.encode(), time.monotonic_ns()), may_drop=True)
        # A limit was set or lifted, or it is the machine's, which the kernel side does not know.
        if self._watches.bpf and (governed.watched != governed.poll.seen_ids or governed.limits.of_machine):
            governed.wants_verify = True

    def _tell(self, message: bytes, may_drop: bool = False) -> None:
        sent = not self._unsent and link.send(self._link_fd, message)
        if not sent and not may_drop:
            self._unsent.append(message)

    def run(self) -> None:
        """Until governor is gone. Raises nothing of one memcg's: it loses its brake, the others keep theirs."""
        while not self._is_over:
            now_ns = time.monotonic_ns()
            self._tick(now_ns)
            heartbeat_ns, next_ns = self._heartbeat_ns + HEARTBEAT_NS, self._schedule.next_ns()
            until_ns = heartbeat_ns if next_ns is None else min(next_ns, heartbeat_ns)
            is_calm = not self._poller.wait(until_ns - now_ns)
            while self._unsent and link.send(self._link_fd, self._unsent[0]):
                self._unsent.pop(0)
            if is_calm:
                gc.collect(0)

    def _drain(self) -> None:
        if self._watches.bpf:
            self._watches.bpf.drain()
            self._braking.confirm_all()

    def _stirred(self, governed: Governed) -> None:
        victim = governed.poll.stirred(time.monotonic_ns())
        if victim and not self._watches.bpf:  # which tells of it by itself, and of whom
            self._tell(link.encode_record(victim.encode(), victim.ktime_ns), may_drop=True)
        self._braking.plan(governed)

    def _hear(self) -> None:
        message = link.receive(self._link_fd)
        self._is_over = message == b""
        if message:
            self._on_message(message)

    def restore(self) -> None:
        """Undo every turn, in every memcg of the instance."""
        for told in self._knob_file.restore_all():
            sys.stderr.write(f"governor: reflex: {told}\n")


def main(arguments: list[str]) -> None:
    """Entry point: LINK_FD KNOB_FILE SOURCE."""
    for ignored in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(ignored, signal.SIG_IGN)  # governor says when to go, by closing the link
    ctypes.CDLL(None).prctl(15, b"governor-reflex", 0, 0, 0)  # PR_SET_NAME
    link_fd, knob_path, wanted = arguments
    os.set_blocking(int(link_fd), False)
    reflex = Reflex(int(link_fd), knob_path, wanted)
    gc.disable()
    gc.freeze()
    become_real_time()
    try:
        reflex.run()
    finally:
        reflex.restore()
