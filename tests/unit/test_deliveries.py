"""deliveries: what the journal says of how tier 1 or 2 is brought to the agent."""

from types import SimpleNamespace

import pytest

from governor import profile_file
from governor.deliveries import Deliveries
from governor.model import Status, Tier
from governor.policy import Delivery
from governor.poller import Poller
from governor.subscribers import Subscribers

REPL = profile_file.load("generic-repl").profile


class Asked(Subscribers):
    """Somebody who can, and says nothing."""

    can = frozenset({Tier.COMPACT})

    def ask(self, *_):
        return True


@pytest.mark.parametrize(
    ("wanted", "subscribers", "channel", "how"),
    [
        (Delivery(0.7, 0.6, exec=("true", "x")), Asked, "pty:/x", ("true", "x")),
        (Delivery(0.7, 0.6, signal="SIGUSR1"), Asked, "pty:/x", ("SIGUSR1",)),
        (Delivery(0.7, 0.6), Asked, "pty:/x", ("subscriber",)),
        (Delivery(0.7, 0.6), Subscribers, "pty:/x", ("typed", "pty:/x")),
        (Delivery(0.7, 0.6), Subscribers, "", ("nobody",)),
    ],
)
def test_the_journal_says_how(wanted, subscribers, channel, how):
    noted, told, begun = [], [], []
    deliveries = Deliveries(
        cgroup="/pod",
        slot=0,
        agent=SimpleNamespace(pid=0, pidfd=-1),
        knob_file=SimpleNamespace(knobs=lambda slot: None),
        children=SimpleNamespace(attempt=lambda make, on_end: begun.append(make)),
        commands=None,
        subscribers=subscribers(Poller(), dict),
        note=lambda kind, text, **fields: noted.append((kind, fields)),
        feed=told.append,
        limits=SimpleNamespace(memory_state=lambda now_ns: None),
        profile=REPL,
        channel=channel,
    )
    deliveries.deliver(Tier.COMPACT, "70 %", wanted)
    assert noted[0] == ("deliver", {"tier": "compact", "how": how})
    if how == ("nobody",):
        assert told[0].status is Status.FAILED
