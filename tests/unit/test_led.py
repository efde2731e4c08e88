"""What a guard that is led from outside decides: nothing, but a recycle; and what it answers."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor import ladder, led, model, policy_file
from governor.cgroup import MemoryState
from governor.decisions import boottime_ns
from governor.line_socket import Garbled
from governor.model import Phase, Status, Tier
from governor.policy import Delivery

SECOND = 1_000_000_000
MIB = 1 << 20
POLICIES = [policy_file.load(name).policy for name in ("default", "seed", "cautious")]
LEADER = 7


def memory(ratio):
    return MemoryState(int(ratio * 1000) * MIB, 1000 * MIB, 0, 0, 0)


def samples(policy, ratios, step_ns, agent_bytes, recycle):
    """All that the ladder asks for over these samples."""
    state, asked = model.State(), []
    for tier in Tier:
        state, _ = ladder.step(state, model.Reachable(tier, recycle or tier is not Tier.RECYCLE), 0, policy)
    for number, ratio in enumerate(ratios):
        now_ns = (number + 1) * step_ns
        events = [model.Stalled()] if number % 7 == 3 else []
        for event in [*events, model.Sampled(memory(ratio), now_ns, agent_bytes)]:
            state, instructions = ladder.step(state, event, now_ns, policy)
            asked += instructions
    return state, asked


@given(
    st.sampled_from(POLICIES),
    st.lists(st.floats(0, 1.0), max_size=60),
    st.sampled_from([SECOND // 10, SECOND, 20 * SECOND]),
)
def test_standing_back_nothing_is_decided(policy, ratios, step_ns):
    state, asked = samples(led.standing_back(policy, recycles=False), ratios, step_ns, 500 * MIB, True)
    assert asked == [] and state.phase is Phase.WATCHING


@given(st.sampled_from(POLICIES), st.lists(st.floats(0.6, 1.0), max_size=60))
def test_or_nothing_but_a_recycle(policy, ratios):
    policy = replace(policy, recycle=replace(policy.recycle, peak_bytes=100 * MIB))
    state, asked = samples(led.standing_back(policy, recycles=True), ratios, SECOND, 500 * MIB, True)
    assert state.phase is Phase.WATCHING
    assert all(getattr(each, "tier", None) is Tier.RECYCLE for each in asked)


def test_a_recycle_is_decided_where_compact_gives_nothing():
    policy = replace(POLICIES[0], recycle=replace(POLICIES[0].recycle, peak_bytes=100 * MIB))
    _, asked = samples(led.standing_back(policy, recycles=True), [0.8] * 20, SECOND, 500 * MIB, True)
    assert [type(each) for each in asked] == [model.Deliver]


class Guard:
    """Led, beside stand-ins for the subscribers' socket and for what delivers."""

    def __init__(self, policy=POLICIES[0], **state):
        self.said, self.notes, self.begun, self.dropped = [], [], [], []
        compact = replace(model.TierState(), reachable=True)
        whole = replace(model.State(), **({"compact": compact} | state))
        subscribers = SimpleNamespace(
            say_to=lambda fd, message, **fields: self.said.append((fd, message, fields)),
            hear=lambda fd: None,
            drop=lambda fd: (self.dropped.append(fd), subscribers.on_left(fd)),
            leader_fd=-1,
        )
        self.subscribers = subscribers
        self.deliveries = SimpleNamespace(deliver=lambda *what: self.begun.append(what))
        self.decisions = SimpleNamespace(policy=policy, state=whole)
        self.led = led.Led(subscribers, self.deliveries, self.decisions, lambda kind, text: self.notes.append(kind))

    def hear(self, fd=LEADER, **said):
        return self.subscribers.on_leader(fd, said)

    def deliver(self, what="compact", number=1, deadline_s=30):
        return self.hear(type="deliver", id=number, what=what, reason="full", deadline_s=deadline_s)

    def acks(self):
        return [(fields["id"], fields["status"]) for _, message, fields in self.said if message == "ack"]


def test_it_waits_for_what_is_under_way():
    guard = Guard(phase=Phase.HELD)
    assert guard.hear(type="lead", for_s=30)
    assert guard.said == [] and guard.led.policy(POLICIES[0]) is POLICIES[0]
    assert not guard.deliver()
    guard.decisions.state = replace(guard.decisions.state, phase=Phase.WATCHING)
    guard.led.turn(0)
    assert guard.said == [(LEADER, "led", {"can": ["compact"]})] and guard.notes == ["led"]
    assert not guard.led.policy(POLICIES[0]).brakes
    guard.decisions.state = model.State()  # whoever could has gone
    guard.led.turn(0)
    assert guard.said[1:] == [(LEADER, "led", {"can": []})]


def test_one_leads_and_a_second_waits_until_it_is_gone():
    guard = Guard()
    guard.hear(type="lead", for_s=30)
    assert guard.hear(8, type="lead", for_s=30)
    assert not guard.hear(8, type="event", kind="braked", text="x")
    assert [fd for fd, _, _ in guard.said] == [LEADER]
    guard.subscribers.on_left(LEADER)
    assert guard.hear(8, type="lead", for_s=30)
    assert guard.said[-1][:2] == (8, "led") and guard.notes == ["led", "led_no_more", "led"]


@pytest.mark.parametrize(("for_s", "gone_after_s"), [(30, 30), (1e9, 60), (-5, 0)])
def test_it_leads_itself_when_the_time_is_over(for_s, gone_after_s, monkeypatch):
    guard = Guard()
    monkeypatch.setattr(led.time, "monotonic_ns", lambda: 0)
    guard.hear(type="lead", for_s=for_s)
    if gone_after_s:
        guard.led.turn(gone_after_s * SECOND - 1)
        assert guard.dropped == []
    guard.led.turn(gone_after_s * SECOND)
    assert guard.dropped == [LEADER] and guard.notes[-1] == "led_no_more"


def test_a_delivery_is_answered_once_by_what_became_of_it():
    guard = Guard()
    guard.hear(type="lead", for_s=30)
    assert guard.deliver(number=1, deadline_s=5) and guard.deliver(number=2)
    [(tier, _, wanted)] = guard.begun
    assert (tier, wanted.deadline_ns) == (Tier.COMPACT, 5 * SECOND)
    guard.deliveries.on_delivered(Tier.COMPACT, Status.UNAVAILABLE, "x" * 1000)
    guard.deliveries.on_delivered(Tier.COMPACT, Status.DELIVERED, "")
    assert guard.acks() == [(2, "deferred"), (1, "failed")]
    assert max(len(fields.get("reason", "")) for _, _, fields in guard.said) == 600


@pytest.mark.parametrize(
    ("policy", "state", "status"),
    [
        (POLICIES[0], {"compact": model.TierState()}, "failed"),
        (POLICIES[0], {"veto_from_ns": boottime_ns(), "veto_for_ns": 3600 * SECOND}, "failed"),
        (replace(POLICIES[0], compact=Delivery(0.7, 0.6, exec=("true",))), {"compact": model.TierState()}, None),
    ],
    ids=["nobody can", "a person forbids it", "a command does it"],
)
def test_what_can_be_delivered(policy, state, status):
    guard = Guard(policy, **state)
    guard.hear(type="lead", for_s=30)
    guard.deliver()
    assert guard.acks() == ([(1, status)] if status else [])
    assert bool(guard.begun) == (status is None)


@pytest.mark.parametrize(
    "said",
    [
        {"type": "deliver", "id": 1, "what": "terminate", "reason": "", "deadline_s": 1},
        {"type": "deliver", "id": "1", "what": "compact", "reason": "", "deadline_s": 1},
        {"type": "deliver", "id": 1, "what": ["compact"], "reason": "", "deadline_s": 1},
        {"type": "lead"},
        {"type": "lead", "for_s": True},
        {"type": "tell", "text": 7},
        {"type": "event", "kind": "braked"},
    ],
    ids=str,
)
def test_what_is_no_line(said):
    guard = Guard()
    guard.hear(type="lead", for_s=30)
    with pytest.raises((KeyError, TypeError, ValueError, Garbled)):
        guard.subscribers.on_leader(LEADER, said)
    assert not guard.begun
