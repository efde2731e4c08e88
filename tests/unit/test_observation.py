"""The loop and its targets tell what happens, and can be seen: a real loop over files as a memcg has them."""

import time
from dataclasses import replace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from governor import health, instance, link, model, policy, poll_source, record
from governor.brake import FREEZE
from governor.cgroup import MemoryState
from governor.container import Container
from governor.guard import Guard
from governor.loop import Loop
from governor.observation import Observation
from governor.policy import SECOND, Policy, Source

MIB = 1 << 20
FILES = {
    "memory.current": "52428800\n",
    "memory.max": "104857600\n",
    "memory.stat": "anon 41943040\ninactive_file 0\nactive_file 10485760\nslab_reclaimable 0\n",
    "memory.events": "oom 0\noom_kill 0\n",
    "cgroup.procs": "",
}
NAMES = ("shop", "agent-0", "agent")


class Running:
    """A loop that governs one memcg; what reflex would say is said to it."""

    def __init__(self, tmp_path, dry_run=False):
        self.path = tmp_path / "memcg-0"
        self.loop = Loop("obs", str(tmp_path / "knobs"), Source.POLL)
        self.target = self.add(dry_run)
        self.observation = Observation(self.loop, "127.0.0.1:0")

    def add(self, dry_run=False):
        slot = self.loop.knob_file.free_slot()
        path = self.path.with_name(f"memcg-{slot}")
        path.mkdir()
        for name, text in FILES.items():
            (path / name).write_text(text)
        container = Container(str(path), "c0ffee", "uid", "burstable", *NAMES)
        above = path.parent
        guard = Guard(str(path), "obs", str(above / "knobs"), str(above), str(above / "journal"))
        return self.loop.add(guard, slot, Policy(dry_run=dry_run), None, container=container)

    def say(self, *messages):
        for message in messages:
            data = message if isinstance(message, bytes) else message.encode()
            self.loop._on_reflex(link.decode_from_reflex(data))

    def metric(self, name, **labels):
        _, text = self.observation._exposition("")
        return next(
            sample.value
            for family in text_string_to_metric_families(text.decode())
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        )

    def close(self):
        self.loop._end()
        self.observation.close()


@pytest.fixture
def running(tmp_path, monkeypatch):
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path)
    monkeypatch.setattr(instance, "state_directory", lambda: tmp_path)
    made = []

    def start(**options):
        made.append(Running(tmp_path, **options))
        return made[0]

    yield start
    made[0].close()


def crossing(cgroup_id, ktime_ns=1000, level=1):
    figures = (77, 77, 9, 9, 10, 0, 0, 0, 0, 0)
    found = record.Record(ktime_ns, cgroup_id, record.CROSSING, record.RISING, 1, level, *figures)
    return link.encode_record(found.encode(), ktime_ns + 300_000)


def braked(at_ns):
    memory = MemoryState(91 * MIB, 100 * MIB, 0, 0, 0)
    return link.Braked(0, at_ns, at_ns + 2_000_000, memory, 900 * MIB, -1, 77, True, False)


def test_what_reflex_says_is_counted(running):
    one = running()
    now_ns = time.monotonic_ns()
    one.say(link.Adopted(0, True, poll_source.BPF, FREEZE), crossing(one.target.cgroup_id), link.Alive(now_ns, 3))
    assert one.metric("governor_crossing_to_callback_seconds_sum") == 0.0003
    assert one.metric("governor_dropped_records_total") == 3
    assert one.metric("governor_targets", source="bpf") == 1
    one.say(braked(now_ns))
    assert one.target.standing().frozen_for_ns is not None
    assert one.metric("governor_container_phase", pod="agent-0") == 1
    assert one.metric("governor_actions_total", action="archive", outcome="begun") == 1
    assert one.metric("governor_container_actions_total", pod="agent-0", action="archive") == 1
    one.say(link.Thawed(0, now_ns + 12_000_000, link.LOAN_OVER))
    assert one.metric("governor_container_brakes_total", pod="agent-0") == 1
    assert one.metric("governor_container_brake_seconds_total", pod="agent-0") == 0.01
    assert one.metric("governor_crossing_to_frozen_seconds_sum") == 0.002
    assert one.target.standing().frozen_for_ns is None
    one.say(braked(now_ns + SECOND), link.Thawed(0, now_ns + 2 * SECOND, link.FALSE_ALARM))
    assert one.metric("governor_false_alarms_total") == 1


def test_a_dry_run_is_counted_as_one(running):
    one = running(dry_run=True)
    one.say(braked(time.monotonic_ns()))
    assert one.metric("governor_actions_total", action="archive", outcome="dry_run") == 1
    assert one.metric("governor_actions_total", action="archive", outcome="begun") == 0
    assert one.target.standing().decided.what.endswith("(dry_run)")


def test_a_dry_run_decides_what_would_follow_a_brake_and_is_not_held(running):
    one = running(dry_run=True)
    assert not policy.levels(one.target.policy).holds
    (one.path / "memory.current").write_text(str(95 * MIB))
    (one.path / "memory.stat").write_text(f"anon {95 * MIB}\n")
    for _ in range(2):
        now_ns = time.monotonic_ns()
        one.say(crossing(one.target.cgroup_id, now_ns, record.LEVEL_BRAKE))
    journal = (one.path.parent / "journal").read_text()
    assert journal.count("would brake at 95.0 %") == 1
    assert "would archive" in journal and '"braked"' not in journal


def test_oom_kills_are_counted(running):
    one = running()
    (one.path / "memory.events").write_text("oom 2\noom_kill 2\n")
    one.target.sample(time.monotonic_ns())
    assert one.metric("governor_oom_kills_total") == 2
    assert one.metric("governor_container_oom_kills_total", pod="agent-0") == 2


def test_how_it_stands(running):
    one = running()
    one.target.sample(time.monotonic_ns())
    standing = one.target.standing()
    assert (standing.names, standing.memory.unreclaimable_bytes) == (NAMES, 40 * MIB)
    assert (standing.source, standing.agent_pid, standing.state.phase) == ("", 0, model.Phase.WATCHING)
    [(_, told), (_, about)] = one.observation._status(-1)
    assert (told["pod"], told["memory"]["max_bytes"], about["targets"]) == ("agent-0", 100 * MIB, 1)
    (one.path / "memory.stat").unlink()
    one.target._memcg._files.clear()
    one.target.sample(time.monotonic_ns())
    assert one.target.standing().memory is None


def test_names_that_are_known_later_are_those_that_are_shown(running):
    one = running()
    one.target.known_as(replace(one.target.standing().container, pod="agent-1"))
    assert one.metric("governor_container_brakes_total", pod="agent-1") == 0
    assert one.target.standing().names == ("shop", "agent-1", "agent")


def test_faults_and_turns_are_counted(running, monkeypatch):
    one = running()
    monkeypatch.setattr(one.target, "turn", lambda now_ns: 1 // 0)
    monkeypatch.setattr(one.loop, "_keep_reflex", lambda now_ns: None)
    one.loop._once()
    assert one.metric("governor_faults_total") == 1
    assert one.metric("governor_loop_turn_seconds_count") == 1


def test_vitals(running, monkeypatch):
    one = running()
    assert health.faults(one.loop.vitals()) == ["reflex does not run"]
    assert health.not_ready(one.loop.vitals(False))[1:] == [
        "the first scan for containers is not over",
        "1 targets wait for reflex to watch them",
    ]
    one.say(link.Adopted(0, True, poll_source.BPF, FREEZE))
    assert not one.loop.vitals().waiting
    one.target.sample(time.monotonic_ns())
    assert one.loop.vitals().late_ns < 0
    later_ns = time.monotonic_ns() + 60 * SECOND
    monkeypatch.setattr(time, "monotonic_ns", lambda: later_ns)
    assert one.loop.vitals().late_ns > 40 * SECOND
    one.say(link.Refused("somebody unloaded them"), link.Source(0, poll_source.POLL, FREEZE))
    assert "the BPF programs are gone: polling only" in health.faults(one.loop.vitals())


@pytest.mark.parametrize("can_be_watched", [True, False])
def test_it_is_ready_once_whoever_was_there_is_watched_or_cannot_be(running, can_be_watched):
    one = running()
    not_ready = one.observation._endpoint.not_ready
    one.loop._keep_reflex(time.monotonic_ns())  # what it answers is not read
    one.observation.turn(0)
    assert not_ready() == ["the first scan for containers is not over", "1 targets wait for reflex to watch them"]
    one.loop.tally.scanned(1)
    one.observation.turn(0)
    assert not_ready() == ["1 targets wait for reflex to watch them"]
    one.say(link.Adopted(0, can_be_watched, poll_source.POLL, FREEZE))
    one.observation.turn(0)
    assert not_ready() == []
    one.add()
    assert one.loop.vitals().waiting == 1
    assert not_ready() == []
    one.loop._reflex.stop()
    assert not_ready() == ["reflex does not run"]


def test_one_that_is_let_go_of_is_seen_no_more(running):
    one = running()
    one.target.sample(time.monotonic_ns())
    one.loop.drop(one.target)
    assert [line for line, _ in one.observation._status(-1)] == ["status"]
    assert one.metric("governor_container_brakes_total", pod="agent-0") == 0
    with pytest.raises(StopIteration):
        one.metric("governor_container_usage_bytes", pod="agent-0")
