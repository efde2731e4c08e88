"""State file, journal and replay: what outlasts a governor, and what damaged files do to it."""

import errno
import itertools
import json
import os
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_ladder import REACHED, Run, braked, events, histories, memory, policies, tool

from governor import instance, ladder, leftovers, model, replay, state_file
from governor.codec import plain, restored
from governor.journal import Journal
from governor.model import Answered, Archived, Phase, Sampled, Signalled, State, Status, Tier
from governor.policy import SECOND, Policy
from governor.state_file import Saved

TARGET = "/sys/fs/cgroup/a.service"


@given(events)
def test_every_event_survives_the_journal(event):
    assert restored(type(event), json.loads(json.dumps(plain(event)))) == event


@given(histories, policies)
def test_every_state_survives_the_file(history, policy):
    run = Run(policy)
    for event, passed_ns in history:
        run.now_ns += passed_ns
        run.feed(replace(event, at_ns=run.now_ns) if isinstance(event, Sampled) else event)
    assert restored(State, json.loads(json.dumps(plain(run.state)))) == run.state
    assert restored(Policy, json.loads(json.dumps(plain(policy)))) == policy


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=5)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["phase", "held", "compact", "state", "x"]), inner, max_size=3),
    ),
)


@given(json_values)
def test_foreign_values_are_refused_not_raised_on(value):
    try:
        found = restored(State, value)
    except ValueError:
        return
    assert isinstance(found, State)


def test_numbers_that_json_cannot_hold_later_are_refused():
    values = plain(State())
    values["compact"]["useless_trials"] = 2**64 - 1
    with pytest.raises(ValueError, match="expected int"):
        restored(State, values)


def saved(state=None):
    return Saved(TARGET, (17, 4711), state or State(in_episode=True, veto_from_ns=5, veto_for_ns=6))


def test_a_state_comes_back(tmp_path):
    path = tmp_path / "deep" / "state"
    state_file.save(path, saved())
    assert state_file.load(path, TARGET) == (saved(), "")
    assert [p.name for p in path.parent.iterdir()] == ["state"]
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("data", ["", "data"])
def test_what_a_killed_governor_left_half_written_goes_at_the_next_start(tmp_path, monkeypatch, data):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home"))
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path / "run")
    monkeypatch.setenv("AGENT_DATA", data and str(tmp_path / data))
    path = state_file.path_for(TARGET)
    state_file.save(path, saved())
    kept = {path.name, f".{path.name}.{os.getpid()}", f".{path.name}.swp", ".state.999999999", "b.json.999999999"}
    left = f".{path.name}.999999999"
    for name in {left, *kept} - {path.name}:
        (path.parent / name).touch()
    assert leftovers.sweep() == []  # young
    assert leftovers.sweep(0) == [left]
    assert {each.name for each in path.parent.iterdir()} == kept
    assert state_file.load(path, TARGET) == (saved(), "")


def test_after_a_reboot_stamps_are_as_long_ago_as_they_were(tmp_path, monkeypatch):
    path = tmp_path / "state"
    tier = model.TierState(Status.SETTLED, delivered_ns=1000 * SECOND, useless_trials=3, judged_ns=1030 * SECOND)
    before = State(compact=tier, held=braked(0.95, growth=tool()), veto_from_ns=1100 * SECOND, veto_for_ns=7)
    state_file.save(path, saved(before))
    values = json.loads(path.read_bytes())
    values |= {"boot_id": "another", "boottime_ns": 1200 * SECOND, "wall_ns": values["wall_ns"] - 50 * SECOND}
    path.write_text(json.dumps(values))
    monkeypatch.setattr(state_file.time, "clock_gettime_ns", lambda _: 30 * SECOND)
    loaded, warning = state_file.load(path, TARGET)
    age_s = (30 * SECOND - loaded.state.compact.delivered_ns) / SECOND
    assert not warning
    assert age_s == pytest.approx(250, abs=5)  # 200 s before it was saved, and 50 s since
    assert loaded.state.veto_for_ns == 7
    assert loaded.state.held == before.held


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b"x" * (2 << 20), b'{"version": 2}', b'{"version": 1}', None],
)
def test_a_file_that_is_not_ours_is_set_aside(tmp_path, content):
    path = tmp_path / "state"
    if content is None:
        state_file.save(path, replace(saved(), target="/another"))
    else:
        path.write_bytes(content)
    loaded, warning = state_file.load(path, TARGET)
    assert loaded is None
    assert "set aside as" in warning
    assert not path.exists()
    state_file.save(path, saved())
    assert state_file.load(path, TARGET)[0] == saved()


@pytest.mark.parametrize("kind", ["directory", "fifo", "link"])
def test_what_is_no_file_is_not_followed(tmp_path, kind):
    path = tmp_path / "state"
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        (tmp_path / "elsewhere").write_text("{}")
        path.symlink_to(tmp_path / "elsewhere")
    loaded, warning = state_file.load(path, TARGET)
    assert loaded is None and warning


def test_a_state_lies_with_the_agents_data_where_that_is_named(monkeypatch):
    monkeypatch.setenv("AGENT_DATA", "/data")
    assert str(state_file.path_for(TARGET)) == "/data/config/mem_governor_state"
    monkeypatch.delenv("AGENT_DATA")
    monkeypatch.setenv("XDG_STATE_HOME", "/xdg")
    assert str(state_file.path_for(TARGET)) == "/xdg/governor/state-sys-fs-cgroup-a.service.json"


def test_a_governor_that_comes_back_goes_on_where_it_can():
    terminating = Run().then(braked(0.95), Archived(True), Signalled())
    resumed = ladder.resumed(terminating.state, True, terminating.now_ns)
    assert Run(state=resumed).at(0.9, 11).names() == ["Kill"]
    decided = Run().then(braked(0.95), Archived(True))  # killed before it had sent SIGTERM
    assert ladder.resumed(decided.state, True, decided.now_ns).phase is Phase.PROBATION
    assert ladder.resumed(terminating.state, False, terminating.now_ns).phase is Phase.WATCHING
    vetoed = Run().then(model.Vetoed(10 * SECOND))
    assert ladder.resumed(vetoed.state, True, vetoed.now_ns).veto_for_ns == 0  # it may have been ended meanwhile
    held = Run(REACHED).then(braked(0.91))
    resumed = ladder.resumed(held.state, True, held.now_ns)
    assert resumed.phase is Phase.PROBATION
    assert resumed.compact.status is Status.FAILED  # it was queued, and nobody knows whether it was delivered


def write_journal(path, run_policy=REACHED):
    """What the loop writes of a history with a compact, a brake and an end."""
    state, now_ns = State(), 1000 * SECOND
    journal = Journal(path, TARGET, lambda: {"policy": plain(run_policy), "state": plain(state)})
    journal.begin()
    history = [Sampled(memory(0.75), 0), Answered(Tier.COMPACT, Status.FAILED), Sampled(memory(0.8), 0)]
    history += [braked(0.95, growth=tool(agent_mib=400)), Archived(True, memory(0.95)), Signalled()]
    for event in history:
        now_ns += SECOND
        event = replace(event, at_ns=now_ns) if isinstance(event, Sampled) else event
        before = state.phase
        state, instructions = ladder.step(state, event, now_ns, run_policy)
        journal.write(
            "step",
            event=type(event).__name__,
            of=plain(event),
            now_ns=now_ns,
            rule=ladder.rule(before, event, state.phase, instructions),
            instructions=[{type(each).__name__: plain(each)} for each in instructions],
        )
    return journal


def test_replay_comes_to_the_same_decisions(tmp_path):
    path = tmp_path / "journal"
    write_journal(path)
    decisions = list(replay.replay(replay.files(path)))
    assert [d.event for d in decisions][3:] == ["Braked", "Archived", "Signalled"]
    assert all(d.recorded == d.replayed for d in decisions)
    assert sum(bool(d.recorded) for d in decisions) == 4


@pytest.mark.parametrize("kind", ["fifo", "endless"])
def test_replay_waits_for_nobody(tmp_path, kind):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="Not a regular file"):
        list(replay.replay(replay.files(tmp_path / kind)))


def test_replay_by_another_policy_shows_what_differs(tmp_path):
    path = tmp_path / "journal"
    write_journal(path)
    policy = replace(REACHED, compact=replace(REACHED.compact, engage_ratio=0.78))
    differing = [d for d in replay.replay(replay.files(path), policy) if d.recorded != d.replayed]
    assert differing[0].recorded[0].startswith("Deliver(") and not differing[0].replayed
    assert differing[1].replayed[0].startswith("Deliver(") and not differing[1].recorded


def test_replay_reads_rotated_files_and_passes_over_torn_lines(tmp_path, monkeypatch):
    monkeypatch.setattr(Journal, "LIMIT_BYTES", 4500)
    path = tmp_path / "journal"
    write_journal(path)
    assert len(replay.files(path)) > 1
    assert path.stat().st_size < 3 * 4500
    with path.open("ab") as file:
        file.write(b'{"kind": "step", "ev\n')
    decisions = list(replay.replay(replay.files(path)))
    assert len(decisions) == 7
    assert isinstance(decisions[-1], replay.Unreadable)


@pytest.mark.parametrize(("first", "count"), [(1, 1), (2, 1), (2, 3), (3, 2), (4, 1)])
def test_replay_goes_on_where_a_journal_that_lost_lines_begins_anew(tmp_path, monkeypatch, first, count):
    """A disk that is full for a while: the first of them is cut off, the others are not there at all."""
    write, numbers = os.write, itertools.count()

    def on_a_full_disk(fd, data):
        number = next(numbers) if fd > 2 else -1
        if first < number < first + count:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(fd, data[:20] if number == first else data)

    monkeypatch.setattr(os, "write", on_a_full_disk)
    path = tmp_path / "journal"
    write_journal(path)
    found = list(replay.replay(replay.files(path)))
    decisions = [each for each in found if isinstance(each, replay.Decision)]
    assert len(found) == len(decisions) + 1
    assert decisions[-1].event == "Signalled" and all(each.recorded == each.replayed for each in decisions)


@pytest.mark.parametrize(
    "content", [b"", b"{}\n", b'{"kind": "begin"}\n', b'{"kind": "begin", "state": 1}\n', b"\xff"]
)
def test_what_is_no_journal_is_said(tmp_path, content):
    path = tmp_path / "journal"
    path.write_bytes(content)
    with pytest.raises(replay.ReplayError):
        list(replay.replay([path]))
