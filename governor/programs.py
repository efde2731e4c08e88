"""The BPF programs of one governor: compiled and attached in a child, while reflex polls already."""

from __future__ import annotations

import time

from governor import pins, poll_source, probe
from governor.children import Children, Ended, spawn
from governor.journal import Note
from governor.policy import SECOND, Source
from governor.reflex_process import ReflexProcess

_NAMES = {poll_source.BPF: "BPF", poll_source.PSI: "psi and polling", poll_source.POLL: "polling"}


class Programs:
    """Gets them loaded, and tells reflex where they are or that there are none."""

    def __init__(self, instance: str, source: Source, refused: str, reflex: ReflexProcess, note: Note) -> None:
        """`refused`: why they are not to be loaded, "" where they are to be tried."""
        self._instance, self._source, self._refused = instance, source, refused
        self._reflex = reflex
        self._note = note
        self.lost = False  # they cannot be had

    def load(self, children: Children) -> None:
        """Have them loaded, unless they are, or are not wanted."""
        if self._source in (Source.PSI, Source.POLL) or pins.current(self._instance):
            return
        if self._refused:
            self.refused(self._refused)
            return
        deadline_ns = time.monotonic_ns() + probe.LOAD_TIMEOUT_S * SECOND
        argv = tuple(probe.loader_command(self._instance))
        children.attempt(lambda: spawn(argv, {}, deadline_ns, "loading the BPF programs"), self._loaded)

    def _loaded(self, ended: Ended) -> None:
        error = probe.parse_loaded(ended.output, ended.status).get("error")
        directory = pins.current(self._instance)
        if error or not directory:
            self.refused("the loader was over its deadline" if ended.over_deadline else error or "no pins")
        else:
            self._reflex.open_pins(directory)

    def refused(self, reason: str) -> None:
        """They cannot be had, or are gone: reflex polls on."""
        self.lost = True
        self._note("bpf_refused", f"no BPF: {reason}")
        self._reflex.open_pins(None)

    def source_name(self, source: int) -> str:
        """A source in words, with how the programs are attached."""
        directory = pins.current(self._instance) if source == poll_source.BPF else None
        how = f" ({pins.attached(directory).get(pins.REQUIRED_MODULE, 'detached')})" if directory else ""
        return _NAMES[source] + how
