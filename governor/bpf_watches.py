"""Which memcgs the BPF programs watch, and for whom. Imported by the real-time process.

A governed memcg is watched where it has a limit, and so is each above it that has one: several may share that.
"""

from __future__ import annotations

from collections.abc import Collection

from governor.bpf_source import BpfSource
from governor.governed import Governed
from governor.limits import Seen
from governor.poll_source import BPF


class BpfWatches:
    """Of one instance; as long as there are no programs, nothing is watched."""

    def __init__(self) -> None:
        self.bpf: BpfSource | None = None
        self._watchers: dict[int, set[Governed]] = {}  # by cgroup id

    @property
    def lacks_stalls(self) -> bool:
        """Whether nothing in the kernel tells of stalls."""
        return not (self.bpf and self.bpf.tells_of_stalls)

    def source(self, governed: Governed) -> int:
        """Where its crossings come from."""
        return BPF if self.bpf and not governed.crowded_out else governed.poll.name

    def watchers(self, cgroup_id: int) -> Collection[Governed]:
        """For whom a memcg is watched: itself, or what is below."""
        return self._watchers.get(cgroup_id, ())

    def verify(self, governed: Governed) -> list[Seen]:
        """Read memory.stat, and let the kernel side start from what it says; empty when the memcg is gone."""
        bpf = self.bpf
        charged = {cgroup_id: bpf.charged_pages(cgroup_id) for cgroup_id in governed.watched} if bpf else {}
        seen = governed.limits.look(governed.verified_ns)
        if bpf and seen:
            watched = set()
            for one in seen:
                cgroup_id = one.memcg.cgroup_id
                try:
                    at_pages = charged.pop(cgroup_id, None)
                    at_pages = bpf.charged_pages(cgroup_id) if at_pages is None else at_pages
                    bpf.watch(one, governed.levels, at_pages, governed.epoch)
                    watched.add(cgroup_id)
                except OSError:  # the maps are full: who is watched already has its place in them
                    if cgroup_id not in self._watchers:
                        bpf.unwatch(cgroup_id)
            governed.crowded_out = len(watched) < len(seen)
            self._watch(governed, watched)
        return seen

    def release(self, governed: Governed) -> None:
        """Nothing need be watched for it any more."""
        self._watch(governed, set())

    def _watch(self, governed: Governed, cgroup_ids: set[int]) -> None:
        for cgroup_id in governed.watched - cgroup_ids:
            self._watchers[cgroup_id].discard(governed)
            if not self._watchers[cgroup_id]:
                del self._watchers[cgroup_id]
                if self.bpf:
                    self.bpf.unwatch(cgroup_id)
        for cgroup_id in cgroup_ids:
            self._watchers.setdefault(cgroup_id, set()).add(governed)
        governed.watched = cgroup_ids
