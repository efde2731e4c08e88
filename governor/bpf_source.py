"""The pinned programs of one instance as a source: their rings, and what they are told to watch.

Imported by the real-time process; libbpf is opened here, so that a machine without it can still be polled.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from governor import bpflib, record
from governor.cgroup import pages
from governor.limits import Seen
from governor.record import CONFIG_KEY, LEVEL_BRAKE, PPM, Config, Levels, Verified

IDLE_AFTER_NS = 10_000_000_000  # long enough for a reader to be restarted and find its records


class BpfSource:
    """All modules of one instance; a ring has one reader."""

    def __init__(self, pins_directory: str, on_record: Callable[[bytes], None]) -> None:
        """Raises OSError when libbpf or the pins are missing, or may not be opened."""
        lib = bpflib.open_libbpf()
        self._directory = pins_directory
        modules = [
            f"{pins_directory}/{name}"
            for name in ("charge", "stall", "victim")
            if os.path.exists(f"{pins_directory}/{name}/ring")  # noqa: PTH110  no pathlib here
        ]
        if not modules:
            raise OSError(f"found no programs pinned at {pins_directory}; somebody unloaded them")
        self._configs = [bpflib.PinnedMap(lib, f"{module}/config") for module in modules]
        watching = [module for module in modules if not module.endswith("/victim")]
        self._watches = [bpflib.PinnedMap(lib, f"{module}/watch") for module in watching]
        self._tracks = [bpflib.PinnedMap(lib, f"{module}/track") for module in watching]
        self._dropped = [bpflib.PinnedMap(lib, f"{module}/dropped") for module in modules]
        self._ring_maps = [bpflib.PinnedMap(lib, f"{module}/ring") for module in modules]
        self._cpus = bpflib.possible_cpus()
        self._rings = bpflib.Rings(lib, self._ring_maps, on_record)
        self.fd = self._rings.fd
        self.drain = self._rings.drain
        self.tells_of_stalls = f"{pins_directory}/stall" in modules

    def vanished(self) -> bool:
        """Whether somebody detached the programs: the maps that are open still work, and nobody writes to them."""
        try:
            return not any(name.startswith("link-") for name in os.listdir(f"{self._directory}/charge"))  # noqa: PTH208
        except OSError:
            return True

    def charged_pages(self, cgroup_id: int) -> int:
        """Pages charged since the memcg is tracked; it is tracked from now on. Ask before reading memory.stat.

        Raises OSError where there is no room for it.
        """
        key = record.CGROUP_ID.pack(cgroup_id)
        for track in self._tracks:
            if track.lookup(key, record.TRACK.size) is None:
                track.update(key, bytes(record.TRACK.size))
        found = self._tracks[0].lookup(key, record.TRACK.size)
        return record.charged_pages(found) if found else 0

    def watch(self, seen: Seen, levels: Levels, charged_pages: int, epoch: int) -> None:
        """Report this memcg's crossings, beginning from what memory.stat says; raises OSError.

        There is room for MAX_WATCHED of them (charge.bpf.c).
        """
        state = seen.state
        brake_bytes = state.max_bytes * levels.engage_ppm[LEVEL_BRAKE - 1] // PPM
        room_pages = pages(max(0, brake_bytes - state.unreclaimable_bytes))
        verified = Verified(pages(state.unreclaimable_bytes), charged_pages, max(64, room_pages // 2))
        value = record.encode_watch(levels._replace(max_pages=pages(seen.given_bytes)), verified, epoch)
        for watch in self._watches:
            watch.update(record.CGROUP_ID.pack(seen.memcg.cgroup_id), value)

    def unwatch(self, cgroup_id: int) -> None:
        """Report nothing more of this memcg."""
        for table in (*self._watches, *self._tracks):
            table.delete(record.CGROUP_ID.pack(cgroup_id))

    def beat(self, now_ns: int) -> None:
        """Tell the programs that somebody reads."""
        value = Config(heartbeat_ns=now_ns, idle_after_ns=IDLE_AFTER_NS).encode()
        for config in self._configs:
            config.update(CONFIG_KEY, value)

    def dropped_records(self) -> int:
        """Records that found no room in a ring, so far."""
        total = 0
        for table in self._dropped:
            if values := table.lookup(CONFIG_KEY, 8 * self._cpus):
                total += sum(int.from_bytes(values[i : i + 8], sys.byteorder) for i in range(0, len(values), 8))
        return total

    def close(self) -> None:
        """Close everything; the programs stay as they are."""
        self._rings.close()
        for table in (*self._configs, *self._watches, *self._tracks, *self._dropped, *self._ring_maps):
            table.close()
