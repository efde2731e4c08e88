"""The subscribers' socket: who hears what, who is asked, and who is cut off."""

import contextlib
import json
import os
import select
import socket
import tempfile
from pathlib import Path

import pytest

from governor import subscribers
from governor.model import Status, Tier
from governor.peer import Peer
from governor.poller import Poller
from governor.subscribers import Subscribers

SECOND = 1_000_000_000


class Served:
    """Subscribers with a poller, and what they answered."""

    def __init__(self, path):
        self.path = path
        self.poller = Poller()
        self.subscribers = Subscribers(self.poller, lambda: {"cgroup": "/pod", "agent_pid": 7})
        self.subscribers.listen(path)
        self.answers, self.changes = [], 0
        self.subscribers.on_answer = lambda *answer: self.answers.append(answer)
        self.subscribers.on_change = self.changed
        self.connections = []

    def changed(self):
        self.changes += 1

    def turn(self):
        """Until nothing is ready any more."""
        while self.poller.wait(20_000_000):
            pass

    def connect(self, *can):
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(5)
        connection.connect(str(self.path))
        self.connections.append(connection)
        if can:
            self.send(connection, type="subscribe", can=can)
        self.turn()
        return connection

    def send(self, connection, **message):
        connection.sendall(json.dumps(message).encode() + b"\n")
        self.turn()

    def ask(self, tier=Tier.COMPACT, for_ns=SECOND, now_ns=0):
        return self.subscribers.ask(tier, "70 % of max is in use", now_ns + for_ns, now_ns)


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path / "memcg-1.sock")
    yield made
    made.subscribers.close()
    for connection in made.connections:
        connection.close()
    assert not made.path.exists()


def lines(connection):
    return [json.loads(line) for line in connection.recv(1 << 20).splitlines()]


def is_cut_off(connection):
    try:
        while connection.recv(1 << 20):
            pass
    except ConnectionResetError:
        pass
    return True


def test_everybody_is_greeted_and_told(served):
    one, two = served.connect(), served.connect("compact")
    served.subscribers.tell("event", kind="braked", text="held")
    hello = {"type": "hello", "version": 1, "cgroup": "/pod", "agent_pid": 7}
    assert lines(one) == lines(two) == [hello, {"type": "event", "kind": "braked", "text": "held"}]


def test_a_request_is_acknowledged_once(served):
    agent = served.connect("compact")
    assert served.ask()
    *_, request = lines(agent)
    assert request == {
        "type": "request",
        "id": request["id"],
        "what": "compact",
        "reason": "70 % of max is in use",
        "deadline_s": 1.0,
    }
    for _ in range(2):
        served.send(agent, type="ack", id=request["id"], status="delivered", reason="x" * 1000)
    assert served.answers == [(Tier.COMPACT, Status.DELIVERED, "x" * 300)]
    served.subscribers.check_deadlines(10 * SECOND)
    assert len(served.answers) == 1


def test_the_last_who_can_is_asked_and_nobody_else_may_answer(served):
    first, last, listener = served.connect("compact", "clear"), served.connect("compact"), served.connect()
    assert served.ask() and served.ask(Tier.CLEAR)
    compact, clear = lines(last)[-1], lines(first)[-1]
    assert (compact["what"], clear["what"]) == ("compact", "clear")
    for stranger in (first, listener):
        served.send(stranger, type="ack", id=compact["id"], status="delivered")
    assert served.answers == []
    served.send(first, type="ack", id=clear["id"], status="deferred", reason="in a turn")
    assert served.answers == [(Tier.CLEAR, Status.DEFERRED, "in a turn")]


def test_who_leaves_after_its_acknowledgement_has_done_it(served):
    agent = served.connect("compact")
    assert served.ask()
    agent.sendall(json.dumps({"type": "ack", "id": lines(agent)[-1]["id"], "status": "delivered"}).encode() + b"\n")
    agent.close()
    served.subscribers.tell("event", kind="braked", text="held")
    served.turn()
    assert [answer[:2] for answer in served.answers] == [(Tier.COMPACT, Status.DELIVERED)]


def test_who_says_nothing_in_time_or_leaves_has_failed(served):
    slow, gone = served.connect("clear"), served.connect("compact")
    assert served.ask() and served.ask(Tier.CLEAR)
    served.subscribers.prolong(SECOND)  # frozen meanwhile
    gone.close()
    served.turn()
    assert served.answers == [(Tier.COMPACT, Status.FAILED, "who was asked for it is gone")]
    assert served.subscribers.can == {Tier.CLEAR} and not served.ask()
    served.subscribers.check_deadlines(2 * SECOND - 1)
    assert len(served.answers) == 1
    served.subscribers.check_deadlines(2 * SECOND)
    assert served.answers[1:] == [(Tier.CLEAR, Status.FAILED, "nobody acknowledged it in time")]
    served.send(slow, type="subscribe", can=[])
    assert served.subscribers.can == frozenset()
    served.subscribers.check_deadlines(9 * SECOND)
    assert served.changes == 2  # what changed until that was first looked at, and what changed since


@pytest.mark.parametrize(
    "said",
    [
        b"\n",
        b"no json\n",
        b"[]\n",
        b'{"type": "subscribe"}\n',
        b'{"type": "subscribe", "can": ["terminate"]}\n',
        b'{"type": "subscribe", "can": 7}\n',
        b'{"type": "subscribe", "can": [[]]}\n',
        b'{"type": "ack", "id": 1, "status": "done"}\n',
        b'{"type": "kill"}\n',
        b'{"type": "ack", "id": 1, "status": "failed", "reason": ' + b"[" * 1000 + b"]" * 1000 + b"}\n",
        b'{"type": "subscribe", "can": [' + b"[" * 1000 + b"]" * 1000 + b"]}\n",
        b'{"type": "ack", "id": [], "status": {}}\n',
        b"x" * (40 << 10),
        b"[" * 10_000 + b"\n",
        b"\xff\xfe\n",
    ],
)
def test_who_says_no_line_of_the_protocol_is_cut_off_and_nobody_else(served, said):
    agent, bad = served.connect("compact"), served.connect()
    with contextlib.suppress(BrokenPipeError):
        bad.sendall(said)
    served.turn()
    assert is_cut_off(bad)
    assert served.ask() and lines(agent)[-1]["what"] == "compact"


def test_who_does_not_read_is_cut_off_and_holds_up_nobody(served):
    deaf, agent = served.connect(), served.connect("compact")
    for _ in range(2000):
        served.subscribers.tell("event", kind="braked", text="x" * 1000)
        agent.recv(1 << 20)
    served.turn()
    assert is_cut_off(deaf)
    assert served.ask()


def test_who_changes_its_mind_all_the_time_is_heard_once_a_second(served):
    agent = served.connect("compact")
    for second in range(3):
        for turn in range(10):
            served.send(agent, type="subscribe", can=["clear"] if turn % 2 else [])
            served.subscribers.check_deadlines(second * SECOND + turn)
    assert served.changes == 3
    served.send(agent, type="subscribe", can=["clear"])  # as before
    served.subscribers.check_deadlines(9 * SECOND)
    assert served.changes == 4
    served.subscribers.check_deadlines(11 * SECOND)
    assert served.changes == 4


def test_who_talks_without_end_is_cut_off(served):
    agent, talker = served.connect("compact"), served.connect()
    line = json.dumps({"type": "subscribe", "can": []}).encode() + b"\n"
    for second in range(3):
        talker.sendall(line * subscribers._LINES_A_SECOND)
        served.turn()
        served.subscribers.check_deadlines((second + 1) * SECOND)
    talker.sendall(line * (subscribers._LINES_A_SECOND + 1))
    served.turn()
    assert is_cut_off(talker)
    assert served.ask() and lines(agent)[-1]["what"] == "compact"


class Crowd:
    """Connections of several users."""

    def __init__(self, served, monkeypatch):
        self.served = served
        self.served.subscribers.allowed_uids = frozenset(range(5))
        monkeypatch.setattr(subscribers, "peer_of", lambda _: Peer(os.getpid(), self.uid))

    def come(self, uid, count=1, speaks=True):
        self.uid = uid
        came = [self.served.connect(*(["compact"] if speaks else [])) for _ in range(count)]
        return came if count > 1 else came[0]


@pytest.fixture
def crowd(served, monkeypatch):
    return Crowd(served, monkeypatch)


def stays(connection):
    """Whether it is still served; what it was told is taken."""
    try:
        connection.setblocking(False)
        while connection.recv(1 << 20):
            pass
    except BlockingIOError:
        return True
    except ConnectionResetError:
        return False
    return False


def test_there_are_so_many_places_some_for_root_and_so_many_for_each(crowd):
    ones = crowd.come(1, 20)
    assert [stays(one) for one in ones] == [True] * 12 + [False] * 8
    twos = crowd.come(2, 12)
    assert all(map(stays, twos))
    assert not stays(crowd.come(3))
    roots = crowd.come(0, 9)
    assert [stays(root) for root in roots] == [True] * 8 + [False]
    assert all(map(stays, ones[:12] + twos))


def test_who_has_said_nothing_makes_room(crowd):
    idle = crowd.come(1, 40, speaks=False)
    assert [stays(one) for one in idle] == [False] * 28 + [True] * 12
    assert all(map(stays, crowd.come(2, 12)))
    assert stays(crowd.come(3))
    assert [stays(one) for one in idle[28:]] == [False] + [True] * 11
    assert all(map(stays, crowd.come(0, 9)))
    assert sum(map(stays, idle)) == 10


def heard_by_user_1000(served):
    """What another user gets to read of the socket."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        heard = b"?"
        try:
            os.setgroups([])
            os.setgid(1000)
            os.setuid(1000)
            connection = socket.socket(socket.AF_UNIX)
            connection.settimeout(10)
            connection.connect(str(served.path))
            heard = connection.recv(1000)
        except ConnectionResetError:
            heard = b""
        finally:
            os.write(writer, heard)
            os._exit(0)
    os.close(writer)
    while not select.select([reader], [], [], 0)[0]:
        served.turn()
    os.waitpid(pid, 0)
    with open(reader, "rb") as pipe:
        return pipe.read()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_other_users_are_refused_but_the_agents():
    with tempfile.TemporaryDirectory() as directory:  # pytest's own are below one that is closed to others
        served = Served(Path(directory) / "memcg-1.sock")
        assert heard_by_user_1000(served) == b""
        served.subscribers.allowed_uids |= {1000}
        assert b"hello" in heard_by_user_1000(served)
        served.subscribers.close()


def test_the_socket_of_a_killed_governor_is_taken_over(tmp_path):
    path = tmp_path / "memcg-1.sock"
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    served = Served(path)
    assert lines(served.connect())[0]["type"] == "hello"
    served.subscribers.close()
    left.close()
