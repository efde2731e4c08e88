"""The guard of a `governor run` in a container that is hostile ground, by real namespaces and sockets: `inside_guard`
outside, `led` inside, and what lies between them.
"""

import contextlib
import json
import os
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from governor import cgroup, inside, inside_guard, led, policy_file, subtree
from governor.actions import processes
from governor.children import Children
from governor.inside_guard import InsideGuard
from governor.model import State, Status, Tier
from governor.poller import Poller
from governor.subscribers import Subscribers
from tests.fakes import container as containers
from tests.fakes.inhabitants import GovernorRun, child
from tests.waiting import wait_for

pytestmark = pytest.mark.skipif(bool(containers.why_none()), reason=f"no containers here: {containers.why_none()}")
SECOND = 1_000_000_000
V1 = Path(cgroup.ROOT_V1, "memory.usage_in_bytes").exists()
NAME = "memcg-77.sock"
DIRECTORY = f"/tmp/governor-{containers.AGENT_UID}/governor"


class Outside:
    """What a target of the daemon does with it."""

    def __init__(self, memcg_path):
        self.poller = Poller()
        self.children = Children(self.poller)
        self.notes, self.answers, self.changes = [], [], []
        memcg = SimpleNamespace(path=memcg_path, cgroup_id=77, v1=V1)
        self.guard = InsideGuard(memcg, self.poller, self.children.attempt, self.note)
        self.guard.on_answer = lambda *answer: self.answers.append(answer)
        self.guard.on_change = lambda: self.changes.append(self.guard.can)
        self.door = None
        self.protect(0)
        self.longest_ns = 0

    def note(self, kind, text, **fields):
        self.notes.append(text)

    def protect(self, pid):
        self.door = inside.door_to(pid, subtree.read_stat(pid).start_ticks) if pid else None
        self.agent = SimpleNamespace(pid=pid, lives_elsewhere=bool(pid), way_in=lambda: self.door)

    def turn(self, leads=True, now_ns=None):
        begun_ns = time.monotonic_ns()
        self.children.check_deadlines(begun_ns)
        self.guard.turn(now_ns or begun_ns, self.agent, leads)
        self.longest_ns = max(self.longest_ns, time.monotonic_ns() - begun_ns)
        self.poller.wait(10_000_000)
        return True

    def until(self, condition, what, seconds=20):
        return wait_for(lambda: self.turn() and condition(), seconds, what)

    def ask(self, tier=Tier.COMPACT, for_ns=10 * SECOND):
        now_ns = time.monotonic_ns()
        return self.guard.ask(tier, "71 % of max is in use", now_ns + for_ns, now_ns)

    def close(self):
        self.guard.close()
        self.children.abandon()
        if self.door:
            self.door.close()


@pytest.fixture
def container():
    made = containers.Container()
    yield made
    made.close()


@pytest.fixture
def outside():
    made = Outside(cgroup.memcg_of("self", V1))
    yield made
    made.close()


@pytest.fixture
def run(container, outside):
    made = []

    def start(serve, **options):
        made.append(GovernorRun(container, serve, **options))
        outside.protect(made[-1].agent_pid)
        return made[-1]

    yield start
    for one in made:
        one.close()


def listen(directory=DIRECTORY, mode=0o666, backlog=8):
    os.makedirs(directory, exist_ok=True)
    server = socket.socket(socket.AF_UNIX)
    server.bind(f"{directory}/{NAME}")
    os.chmod(f"{directory}/{NAME}", mode)
    server.listen(backlog)
    return server


def guard_inside(directory=DIRECTORY, delivers=("delivered", "/compact: it ran"), log="/tmp/heard"):
    """The other end as a guard has it; what it is asked for is done at once, and written to a file."""

    def wrote(*what):
        with open(log, "a") as file:
            file.write(json.dumps(what) + "\n")

    def deliver(tier, reason, wanted):
        wrote("deliver", tier.value, reason, round(wanted.deadline_ns / SECOND))
        deliveries.on_delivered(tier, Status(delivers[0]), delivers[1])

    def serve():
        os.makedirs(directory)
        poller = Poller()
        subscribers = Subscribers(poller, lambda: {"cgroup": "/", "agent_pid": 2})
        subscribers.listen(Path(directory, NAME))
        state = State()
        state = SimpleNamespace(**{name: getattr(state, name) for name in State.__dataclass_fields__})
        state.compact = led.replace(state.compact, reachable=True)
        decisions = SimpleNamespace(policy=policy, state=state)
        guard = led.Led(subscribers, deliveries, decisions, lambda kind, text: wrote(kind))
        guard.policy_changed = lambda: wrote("brakes", guard.policy(decisions.policy).brakes)
        guard.on_event = lambda kind, text: wrote("event", kind, text)
        guard.on_tell, guard.on_ending = lambda text: wrote("tell", text), lambda reason: wrote("ending", reason)
        while True:
            poller.wait(100_000_000)
            guard.turn(time.monotonic_ns())

    deliveries = SimpleNamespace(deliver=deliver, on_delivered=None)
    policy = policy_file.load("default").policy  # there are no files of ours in there
    return serve


def heard(container):
    with contextlib.suppress(FileNotFoundError):
        return [json.loads(line) for line in container.path("/tmp/heard").read_text().splitlines()]
    return []


@pytest.mark.parametrize("uid", [containers.AGENT_UID, 0], ids=["a user", "root"])
def test_compact_is_delivered_inside_and_the_guard_there_stands_back(container, outside, run, uid):
    run(guard_inside("/run/governor" if uid == 0 else DIRECTORY), uid=uid)
    outside.until(lambda: outside.guard.can, "somebody who can")
    assert outside.guard.can == {Tier.COMPACT} and not outside.ask(Tier.CLEAR)
    assert outside.ask() and not outside.guard.are_none
    outside.until(lambda: outside.answers, "an answer")
    assert outside.answers == [(Tier.COMPACT, Status.DELIVERED, "/compact: it ran")] and outside.guard.are_none
    for message in ({"kind": "warning", "text": "soon"}, {"text": "smaller"}, {"reason": "no room"}):
        assert outside.guard.tell(
            {"kind": "event", "text": "tell", "reason": "ending"}[next(iter(message))], **message
        )
    outside.until(lambda: len(heard(container)) == 6, "all of it")
    assert heard(container) == [
        ["led"],
        ["brakes", False],
        ["deliver", "compact", "asked for from outside: 71 % of max is in use", 10],
        ["event", "warning", "soon"],
        ["tell", "smaller"],
        ["ending", "no room"],
    ]
    assert outside.changes == [{Tier.COMPACT}]
    outside.turn(leads=False)  # the policy does not brake any more
    assert not outside.guard.can and not outside.guard.tell("tell", text="smaller")
    wait_for(lambda: heard(container)[6:] == [["led_no_more"], ["brakes", True]], what="the guard on its own")
    outside.until(lambda: outside.guard.can, "it stands back again")


def test_a_daemon_that_was_killed_or_hangs_leads_no_longer(container, outside, run):
    run(guard_inside())
    told_read, told_write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            outside.until(lambda: outside.guard.can, "somebody who can")
            os.write(told_write, b"leads")
            signal.pause()
        os._exit(1)
    assert os.read(told_read, 16) == b"leads"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: heard(container)[2:] == [["led_no_more"], ["brakes", True]], what="the guard on its own")


def test_who_says_nothing_for_too_long_leads_no_longer(container, outside, run, monkeypatch):
    monkeypatch.setattr("governor.inside_guard._LEAD_S", 0.5)
    run(guard_inside())
    outside.until(lambda: outside.guard.can, "somebody who can")
    wait_for(lambda: heard(container)[2:] == [["led_no_more"], ["brakes", True]], what="the guard on its own")
    outside.until(lambda: not outside.guard.can, "hung up on")


def test_nobody_inside_leads(container, outside, run):
    """Not even as the same user, by the same socket, with the same words."""

    guard = guard_inside()

    def serve():
        child(guard)
        while not os.path.exists(f"{DIRECTORY}/{NAME}"):
            time.sleep(0.01)
        time.sleep(0.1)
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(f"{DIRECTORY}/{NAME}")
        connection.sendall(b'{"type": "lead", "for_s": 30}\n')
        told = b""
        while data := connection.recv(4096):
            told += data
        Path("/tmp/cut-off").write_bytes(told)
        time.sleep(1000)

    run(serve)
    cut_off = wait_for(lambda: container.path("/tmp/cut-off").exists() and container.path("/tmp/cut-off"))
    assert b"hello" in cut_off.read_bytes() and b"led" not in cut_off.read_bytes()
    assert heard(container) == []


def says(*said, listens=listen, then=None):
    """Somebody who listens in its place and says this to whoever comes."""

    def serve():
        server = listens()
        connection, _ = server.accept()
        connection.sendall(b'{"type": "led", "can": ["compact"]}\n')
        with contextlib.suppress(OSError):
            for each in said:
                connection.sendall(each)
        time.sleep(1000)

    return serve


def flood():
    line = b'{"type": "ack", "id": 1, "status": "delivered"}\n'
    return says(*[line * 100] * 1000)


@pytest.mark.parametrize(
    "serve",
    [
        says(b"no json\n"),
        says(b"[]\n"),
        says(b'{"type": "lead"}\n'),
        says(b'{"type": "led", "can": ["terminate"]}\n'),
        says(b'{"type": "led", "can": 7}\n'),
        says(b'{"type": "ack", "id": 1, "status": "thawed"}\n'),
        says(b'{"type": "ack", "id": {}, "status": "delivered", "reason": 7}\n'),
        says(b"x" * (40 << 10)),
        says(b"[" * 3000 + b"\n"),
        says(b"\xff\xfe\n"),
        flood(),
    ],
    ids=lambda serve: "",
)
def test_who_says_no_line_of_the_protocol_is_hung_up_on_for_long(outside, run, serve):
    run(serve)
    outside.until(lambda: any("no line of the protocol" in text for text in outside.notes), "an end of it")
    assert not outside.guard.can and not outside.ask()
    assert outside.guard._due_ns - time.monotonic_ns() > 200 * SECOND
    for _ in range(20):
        outside.turn(now_ns=outside.guard._due_ns - 1)
    assert outside.guard._socket is None
    assert outside.longest_ns < SECOND


def test_a_lie_ends_a_request_and_steers_nothing(outside, run):
    lie = {"type": "ack", "id": 1, "status": "delivered", "reason": "\x1b[2J\n" + "x" * 1000}

    def serve():
        connection, _ = listen().accept()
        connection.sendall(b'{"type": "led", "can": ["compact", "clear"]}\n')
        while b"deliver" not in connection.recv(4096):
            pass
        for number in (7, 1, 1):
            connection.sendall(json.dumps(lie | {"id": number}).encode() + b"\n")
        time.sleep(1000)

    run(serve)
    outside.until(lambda: outside.guard.can, "somebody who can")
    assert outside.ask()
    outside.until(lambda: outside.answers, "an answer")
    for _ in range(10):
        outside.turn()
    [(tier, status, reason)] = outside.answers
    assert (tier, status, len(reason)) == (Tier.COMPACT, Status.DELIVERED, 300)
    assert reason.startswith("\\x1b[2J\\nxxx")


def test_who_never_answers_or_reads_keeps_nobody_waiting(outside, run):
    run(says())
    outside.until(lambda: outside.guard.can, "somebody who can")
    assert outside.ask(for_ns=SECOND)
    outside.guard.prolong(SECOND)  # frozen meanwhile
    begun = time.monotonic()
    outside.until(lambda: outside.answers, "the deadline")
    assert time.monotonic() - begun > 1.9
    assert outside.answers == [(Tier.COMPACT, Status.FAILED, "the guard in the container did not answer in time")]
    for _ in range(2000):
        outside.guard.tell("event", kind="braked", text="x" * 1000)
    assert any("does not read" in text for text in outside.notes)
    assert outside.longest_ns < SECOND


def test_who_hangs_up_has_not_delivered(outside, run):
    def serve():
        connection, _ = listen().accept()
        connection.sendall(b'{"type": "led", "can": ["compact"]}\n')
        while b"deliver" not in connection.recv(4096):
            pass
        connection.close()
        time.sleep(1000)

    run(serve)
    outside.until(lambda: outside.guard.can, "somebody who can")
    assert outside.ask()
    outside.until(lambda: outside.answers, "an answer")
    assert outside.answers == [(Tier.COMPACT, Status.FAILED, "the guard in the container is gone")]
    outside.turn()
    assert outside.changes == [{Tier.COMPACT}, frozenset()]


def test_a_link_to_a_socket_of_the_host_leads_nowhere(container, outside, run, tmp_path):
    """Neither by its path on the host nor through /proc: who goes there has the container's root, user and rights."""
    tmp_path.chmod(0o777)
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(tmp_path / NAME))
    (tmp_path / NAME).chmod(0o777)
    server.listen()
    server.setblocking(False)

    def serve():
        os.makedirs(DIRECTORY)
        os.symlink(f"/proc/1/root/../../..{tmp_path}/{NAME}", f"{DIRECTORY}/{NAME}")
        time.sleep(1000)

    run(serve)
    for number in range(len(inside_guard._AGAIN_NS)):
        outside.until(lambda count=number: outside.guard._failures > count, "an attempt")
        outside.guard._due_ns = 0
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()
    assert any("cannot connect" in text for text in outside.notes)


@pytest.fixture
def memcg():
    made = Path(cgroup.memcg_of("self", V1), f"test-{os.getpid()}")
    made.mkdir()
    yield made
    wait_for(lambda: not subtree.memcg_pids(str(made)), what="the end of its processes")
    made.rmdir()


def test_a_socket_of_another_memcgs_process_is_hung_up_on_before_a_word(container, outside, memcg, run):
    """As a volume that two containers share may hold one."""
    server = socket.socket(socket.AF_UNIX)
    container.path("/tmp/shared").mkdir(mode=0o777)
    os.symlink("/tmp/shared", container.path(f"/tmp/governor-{containers.AGENT_UID}"))
    container.path("/tmp/shared/governor").mkdir()
    here = os.open(container.path("/tmp/shared/governor"), os.O_PATH)
    server.bind(f"/proc/self/fd/{here}/{NAME}")
    os.chmod(f"/proc/self/fd/{here}/{NAME}", 0o777)
    server.listen()
    try:
        outside.guard._memcg.path = str(memcg)
        run(lambda: time.sleep(1000), memcg=memcg)
        outside.until(lambda: any("none of the container" in text for text in outside.notes), "a refusal")
        connection, _ = server.accept()
        assert connection.recv(4096) == b""
        connection.close()
    finally:
        server.close()
        os.close(here)


@pytest.mark.parametrize("how", ["full", "fuse", "fifo", "nobody"])
def test_a_way_that_leads_nowhere_holds_up_nobody(container, outside, run, how):
    fuse_fd = -1
    if how == "fuse":
        fuse_fd = container.mount_fuse(f"/tmp/governor-{containers.AGENT_UID}")

    def serve():
        if how == "full":
            server = listen(backlog=0)
            held = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) for _ in range(4)]
            with contextlib.suppress(BlockingIOError):
                for each in held:
                    each.connect(f"{DIRECTORY}/{NAME}")
            assert server
        elif how == "fifo":
            os.makedirs(DIRECTORY)
            os.mkfifo(f"{DIRECTORY}/{NAME}")
        time.sleep(1000)

    try:
        run(serve)
        outside.until(lambda: outside.guard._failures == 1, "an end of it")
        assert not outside.guard.can and outside.guard._socket is None
        assert outside.longest_ns < SECOND  # a visit has two
    finally:
        if fuse_fd >= 0:
            os.close(fuse_fd)


def test_without_a_governor_run_nobody_goes_there(container, outside, run):
    run(guard_inside(), name="bash")
    for _ in range(20):
        outside.turn(now_ns=time.monotonic_ns() + 60 * SECOND)
    assert outside.guard._failures == 0 and outside.guard._socket is None and outside.children.are_none


@pytest.mark.parametrize(
    ("who", "spared"), [("a guard", True), ("who is too large", False), ("the agent itself", False)]
)
def test_tier_3_spares_the_guard_that_stands_back_and_who_keeps_it_but_nobody_who_hides_there(
    outside, memcg, run, monkeypatch, who, spared
):
    guard = guard_inside()
    own_bytes = processes.read_process(os.getpid()).rss_bytes  # which they have as well: forks of us
    monkeypatch.setattr("governor.inside_guard._FAMILY_BYTES", own_bytes + (64 << 20))

    def serve():
        hidden = bytearray(b"x") * (160 << 20) if who == "who is too large" else b""
        guard()
        assert hidden

    outside.guard._memcg.path = str(memcg)
    one = run(serve, memcg=memcg)
    outside.until(lambda: outside.guard.can, "somebody who can")
    family = outside.guard.family(one.pid if who == "the agent itself" else one.agent_pid)
    assert family == ([one.pid, one.outer_pid] if spared else [])
    if spared:
        monkeypatch.setattr(os, "getpid", lambda: 1)  # they are no children of governor's, which are spared
        hit = processes.kill_all_but(str(memcg), family)
        assert one.agent_pid in {process.pid for process in hit}
        assert processes.read_process(one.pid).comm == "governor-run"
        outside.turn()
        assert outside.guard.can
        outside.guard.close()  # as it ends with its agent
        assert outside.guard.family(one.agent_pid) == family
        outside.agent.pid = 0
        outside.turn(leads=False)
        assert outside.guard.family(0) == []
