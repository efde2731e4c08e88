"""What is exported: parsed as Prometheus would, with names that an enemy chose, and with thousands of targets."""

import re
import shutil
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from governor import link, model, tally
from governor.cgroup import MemoryState
from governor.container import Container
from governor.metrics import Exported, exposition
from governor.standing import Standing
from governor.tally import Tally

MIB, MS = 1 << 20, 1_000_000
ROOT = Path(__file__).parent.parent.parent
ALERTS, README = ROOT / "scripts" / "k8s" / "alerts.yaml", ROOT / "README.md"
HOSTILE = [
    '"} 1\ngovernor_container_phase{namespace="x"} 3',
    "\x1b]0;owned\x07\x1b[2J",
    "a\\\\nb\\",
    "\r\n# TYPE x counter",
    "\udcff\ud800",
    "\u202etxt.exe",
    "\x00",
    "p" * 100_000,
]


def standing(number=0, namespace="shop", pod=None, name="agent", ratio=0.5):
    container = Container(
        f"/sys/fs/cgroup/kubepods.slice/{number}",
        f"{number:064x}",
        "uid",
        "burstable",
        namespace,
        pod or f"agent-{number}",
        name,
    )
    memory = MemoryState(int(ratio * 100 * MIB) + 7, 100 * MIB, 0, 7, 0)
    return Standing(
        container.cgroup,
        number,
        container,
        "default",
        False,
        4711,
        "bpf",
        "freeze",
        memory,
        5 * MIB,
        1,
        model.State(),
    )


def adopted(standings, **options):
    counted = Tally(**options)
    for slot, one in enumerate(standings):
        counted.adopt(slot, one.names, 0)
    return counted


def scraped(counted, standings, now_ns=0, accept=""):
    _, text = exposition(Exported(counted, enumerate(standings), now_ns), 1, None, accept)
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def of(found, name, **labels):
    return found.get((name, *sorted(labels.items())))


NAMES = {"namespace": "shop", "pod": "agent-0", "container": "agent"}


def test_the_figures_of_a_container():
    one = standing()
    counted = adopted([one])
    brake = link.Braked(0, 3 * MS, 7 * MS, one.memory, -1, -1, 77, True, False)
    counted.braked(0, link.decode_from_reflex(brake.encode()))
    found = scraped(counted, [one], now_ns=1507 * MS)
    assert of(found, "governor_container_unreclaimable_bytes", **NAMES) == 50 * MIB
    assert of(found, "governor_container_usage_bytes", **NAMES) == 50 * MIB + 7
    assert of(found, "governor_container_headroom_bytes", **NAMES) == 50 * MIB
    assert of(found, "governor_container_fill_rate_bytes_per_second", **NAMES) == 5 * MIB
    assert of(found, "governor_container_brakes_total", **NAMES) == 1
    assert of(found, "governor_container_brake_seconds_total", **NAMES) == 1.5
    assert of(found, "governor_container_actions_total", **NAMES, action="shed") == 0
    assert of(found, "governor_targets", source="bpf") == 1
    assert of(found, "governor_targets", source="poll") == 0
    assert of(found, "governor_crossing_to_frozen_seconds_bucket", le="0.0025") == 0
    assert of(found, "governor_crossing_to_frozen_seconds_bucket", le="0.005") == 1
    assert of(found, "governor_crossing_to_frozen_seconds_bucket", le="+Inf") == 1
    assert of(found, "governor_crossing_to_frozen_seconds_sum") == 0.004
    assert of(found, "governor_actions_total", action="compact", outcome="delivered") == 0


def test_what_could_not_be_read_is_not_zero():
    one = replace(standing(), memory=None)
    found = scraped(adopted([one]), [one])
    assert of(found, "governor_container_usage_bytes", **NAMES) is None
    assert of(found, "governor_container_phase", **NAMES) == 0


def test_two_of_the_same_names_are_one_series_with_the_worst_of_both():
    """As when a container is started again before its old memcg is gone."""
    both = [standing(ratio=0.2), standing(ratio=0.9)]
    both[1] = replace(both[1], state=model.State(phase=model.Phase.PROBATION))
    found = scraped(adopted(both), both)
    assert of(found, "governor_container_unreclaimable_bytes", **NAMES) == 110 * MIB
    assert of(found, "governor_container_headroom_bytes", **NAMES) == 10 * MIB
    assert of(found, "governor_container_unreclaimable_ratio", **NAMES) == 0.9
    assert of(found, "governor_container_phase", **NAMES) == 2


def test_one_that_is_gone_leaves_its_counters_for_a_while_and_no_gauges():
    counted = adopted([standing()])
    counted.release(0, 5)
    found = scraped(counted, [], now_ns=6)
    assert of(found, "governor_container_brakes_total", **NAMES) == 0
    assert of(found, "governor_container_usage_bytes", **NAMES) is None
    found = scraped(counted, [], now_ns=6 + tally.GRACE_NS)
    assert of(found, "governor_container_brakes_total", **NAMES) is None


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_hostile_names_are_labels_and_nothing_else(accept):
    plain = [standing(number) for number in range(len(HOSTILE))]
    hostile = [standing(n, namespace=text, pod=text, name=text) for n, text in enumerate(HOSTILE)]
    texts = []
    for standings in (plain, hostile):
        _, text = exposition(Exported(adopted(standings), enumerate(standings), 0), 1, None, accept)
        texts.append(text.decode())
    assert all(character.isprintable() for line in texts[1].splitlines() for character in line)
    ours = [[line for line in text.splitlines() if not line.startswith("process_")] for text in texts]
    lines = [[re.sub(r"\{.*\}", "{}", line) for line in each] for each in ours]
    assert lines[0] == lines[1]  # the same metrics, line by line: no name has made one of its own
    values = {
        value
        for family in text_string_to_metric_families(texts[1] if not accept else texts[1].removesuffix("# EOF\n"))
        for sample in family.samples
        for value in sample.labels.values()
    }
    assert max(map(len, values)) <= 253


def test_thousands_of_targets_are_a_bounded_text_and_not_slow():
    standings = [standing(number) for number in range(5000)]
    counted = adopted(standings)
    began_s = time.process_time()
    _, text = exposition(Exported(counted, enumerate(standings), 0), 1, None, "")
    took_s = time.process_time() - began_s
    lines = text.count(b"\n")
    print(f"{took_s:.2f} s of CPU, {len(text) >> 10} KiB, {lines} lines")
    assert took_s < 10
    assert lines < 20 * tally.SERIES_LIMIT + 500
    assert b'container="other"' in text
    found = scraped(counted, standings)
    other = {"namespace": "", "pod": "", "container": "other"}
    assert of(found, "governor_container_usage_bytes", **other) == 4000 * (50 * MIB + 7)
    assert of(found, "governor_containers_without_series") == 4000


# Alert rules


def exported_names():
    one = standing()
    return {name for name, *_ in scraped(adopted([one]), [one])}


def test_every_metric_is_in_the_readme_and_no_other():
    one = standing()
    exported = {re.sub("_(bucket|count|sum|created)$", "", name) for name, *_ in scraped(adopted([one]), [one])}
    exported = {name for name in exported if name.startswith("governor_")}
    assert set(re.findall(r"^\| `(governor_\w+)`", README.read_text(), re.MULTILINE)) == exported


def test_every_metric_of_the_alert_rules_is_exported():
    named = set(
        re.findall(
            r"\b(?:governor|process)_[a-z_]+", "\n".join(re.findall(r"expr:.*(?:\n {10}.*)*", ALERTS.read_text()))
        )
    )
    assert len(named) > 8
    assert named <= exported_names()


def test_every_label_of_the_alert_rules_is_one_that_is_exported():
    one = standing()
    labels = {name: {key for key, _ in labels} for name, *labels in scraped(adopted([one]), [one])}
    for name, matchers in re.findall(r"(governor_[a-z_]+)\{([^}]*)\}", ALERTS.read_text()):
        assert set(re.findall(r"(\w+)=", matchers)) <= labels[name], name
    for action in re.findall(r'action=~?"([^"]*)"', ALERTS.read_text()):
        assert set(action.split("|")) <= set(tally.ACTIONS)
    for source in re.findall(r'source=~?"([^"]*)"', ALERTS.read_text()):
        assert set(source.split("|")) <= {"bpf", "psi", "poll", "none"}


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is in Debian's package prometheus")
def test_promtool_takes_the_alert_rules():
    checked = subprocess.run(["promtool", "check", "rules", ALERTS], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
