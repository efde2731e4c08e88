"""What is counted and how the targets stand, as Prometheus metrics.

Imported where a scrape is answered, in a child of the governor (see http_endpoint): prometheus_client costs 2.8 MiB
that the resident process does without. Names are those of the conventions: base units, `_total` for counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from governor import __version__
from governor.cgroup import MemoryState
from governor.model import Phase
from governor.standing import Standing
from governor.tally import ACTIONS, OUTCOMES, TIERS, Histogram, Names, Tally

SOURCES = ("bpf", "psi", "poll", "none")
_LABELS = ("namespace", "pod", "container")
_PHASES = {phase: number for number, phase in enumerate(Phase)}
_SECOND = 1e9


_OF_MEMORY: tuple[tuple[str, str, Callable[[MemoryState], float], Callable[[Iterable[float]], float]], ...] = (
    ("usage_bytes", "Usage of the memcg whose limit counts", lambda of: of.usage_bytes, sum),
    ("unreclaimable_bytes", "Usage less file LRU and reclaimable slab", lambda of: of.unreclaimable_bytes, sum),
    ("max_bytes", "The limit that counts", lambda of: of.max_bytes, sum),
    ("headroom_bytes", "What is left to max", lambda of: max(0, of.max_bytes - of.unreclaimable_bytes), min),
    ("unreclaimable_ratio", "Unreclaimable share of max, 0 to 1", lambda of: of.unreclaimable_ratio, max),
)
# Of several containers in one series: the sum of their bytes, the worst of the rest.


@dataclass(frozen=True, slots=True, eq=False)
class Exported(Collector):
    """Everything that one governor exports; `now_ns` is of the monotonic clock."""

    tally: Tally
    standings: Iterable[tuple[int, Standing]]  # by slot
    now_ns: int

    def collect(self) -> Iterator[Metric]:
        """The metric families."""
        standings = list(self.standings)
        build = GaugeMetricFamily("governor_build_info", "Always 1; which version runs", labels=["version"])
        build.add_metric([__version__], 1)
        yield build
        yield from self._node(standings)
        yield from self._actions()
        yield from self._containers(standings)

    def _node(self, standings: list[tuple[int, Standing]]) -> Iterator[Metric]:
        tally = self.tally
        targets = GaugeMetricFamily(
            "governor_targets", "Governed memcgs, by where their crossings come from", labels=["source"]
        )
        for source in SOURCES:
            targets.add_metric([source], sum((one.source or "none") == source for _, one in standings))
        yield targets
        for name, text, histogram in (
            ("crossing_to_callback", "From the kernel's stamp of a crossing to reflex having it", tally.to_callback),
            ("crossing_to_frozen", "From the kernel's stamp of a crossing to cgroup.freeze", tally.to_frozen),
            ("loop_turn", "How long the loop was busy before it waited again", tally.turns),
        ):
            yield _histogram(f"governor_{name}_seconds", text, histogram)
        for name, text, value in (
            ("dropped_records", "Records that the kernel could not place in a ring", tally.dropped_records),
            ("false_alarms", "Brakes that memory.stat did not confirm", tally.false_alarms),
            ("brakes_not_held", "Brakes that could not freeze or stop anything", tally.not_held),
            ("oom_kills", "OOM kills in governed memcgs", tally.oom_kills),
            ("reflex_starts", "Starts of reflex; more than one: it died", tally.reflex_starts),
            ("faults", "Faults of governor itself that it went on after", tally.faults),
            ("containers_found", "Containers that discovery found", tally.found),
            ("containers_gone", "Containers that went", tally.gone),
            ("containers_not_selected", "Times that no policy selected a container", tally.not_selected),
            ("containers_not_governed", "Times that a selected container could not be governed", tally.not_governed),
            ("discovery_scans", "Looks of discovery at the whole tree", tally.scans),
            ("discovery_scan_seconds", "Time that these took", tally.scan_ns / _SECOND),
        ):
            yield CounterMetricFamily(f"governor_{name}", text, value=value)
        yield GaugeMetricFamily(
            "governor_containers_without_series",
            'Containers beyond the limit, counted as container="other"',
            value=tally.other.members,
        )

    def _actions(self) -> Iterator[Metric]:
        actions = CounterMetricFamily(
            "governor_actions", "What was begun, and what became of it", labels=["action", "outcome"]
        )
        for action, outcomes in OUTCOMES.items():
            for outcome in outcomes:
                actions.add_metric([action, outcome], self.tally.actions[action, outcome])
        yield actions
        freed = CounterMetricFamily(
            "governor_freed_bytes", "Unreclaimable memory that a tier gave back, once settled", labels=["tier"]
        )
        for tier in TIERS:
            freed.add_metric([tier], self.tally.freed_bytes[tier])
        yield freed

    def _containers(self, standings: list[tuple[int, Standing]]) -> Iterator[Metric]:
        by_names: dict[Names, list[Standing]] = {}
        for slot, standing in standings:
            if series := self.tally.series_of(slot):
                by_names.setdefault(series.names, []).append(standing)
        read = {names: [one.memory for one in of if one.memory] for names, of in by_names.items()}
        for name, text, value_of, together in _OF_MEMORY:
            gauge = GaugeMetricFamily(f"governor_container_{name}", text, labels=_LABELS)
            for names, memories in read.items():
                if memories:
                    gauge.add_metric(names, together(map(value_of, memories)))
            yield gauge
        rate = GaugeMetricFamily(
            "governor_container_fill_rate_bytes_per_second",
            "Growth of unreclaimable memory between the last two samples",
            labels=_LABELS,
        )
        phase = GaugeMetricFamily(
            "governor_container_phase", "0 watching, 1 held, 2 probation, 3 terminating", labels=_LABELS
        )
        for names, of in by_names.items():
            rate.add_metric(names, sum(one.fill_rate_bytes or 0 for one in of))
            phase.add_metric(names, max(_PHASES[one.state.phase] for one in of))
        yield from (rate, phase)
        counted, held = self.tally.series(self.now_ns), self.tally.frozen_ns(self.now_ns)
        for name, text in (
            ("episodes", "Times that memory rose to a level and calmed down again"),
            ("brakes", "Confirmed brakes that held it"),
            ("oom_kills", "OOM kills of the kernel's"),
        ):
            counter = CounterMetricFamily(f"governor_container_{name}", text, labels=_LABELS)
            for one in counted:
                counter.add_metric(one.names, getattr(one, name))
            yield counter
        braked = CounterMetricFamily("governor_container_brake_seconds", "Time that it was held", labels=_LABELS)
        acted = CounterMetricFamily("governor_container_actions", "What was begun", labels=[*_LABELS, "action"])
        for one in counted:
            braked.add_metric(one.names, (one.braked_ns + held.get(one.names, 0)) / _SECOND)
            for action in ACTIONS:
                acted.add_metric([*one.names, action], one.actions[action])
        yield braked
        yield acted


def exposition(exported: Exported, governor_pid: int, reflex_pid: int | None, accept: str) -> tuple[str, bytes]:
    """The content type that `accept`, as of an HTTP header of our own, asks for, and the text."""
    registry = CollectorRegistry()
    registry.register(exported)
    ProcessCollector(pid=lambda: governor_pid, registry=registry)
    if reflex_pid is not None:
        ProcessCollector(namespace="governor_reflex", pid=lambda: reflex_pid or 0, registry=registry)
    encode, content_type = choose_encoder(accept)
    return content_type, encode(registry)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    below, buckets = 0, []
    for bound_ns, count in zip(histogram.bounds_ns, histogram.counts, strict=False):
        below += count
        buckets.append((f"{bound_ns / _SECOND:g}", below))
    buckets.append(("+Inf", sum(histogram.counts)))
    return HistogramMetricFamily(name, text, buckets=buckets, sum_value=histogram.sum_ns / _SECOND)
