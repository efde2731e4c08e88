"""`governor status`: what a governor answers to whom, and what people get to see of it."""

import contextlib
import os
import socket
import threading
import time
from dataclasses import replace

import orjson
import pytest
from typer.testing import CliRunner

from governor import instance, model, status, status_cli, subscribers
from governor.cgroup import MemoryState
from governor.cli import app
from governor.container import Container
from governor.peer import Peer
from governor.poller import Poller
from governor.standing import Decided, Standing
from governor.subscribers import Subscribers

MIB, SECOND = 1 << 20, 1_000_000_000


def standing(number=0, pod=None):
    cgroup = f"/sys/fs/cgroup/kubepods.slice/{number}"
    container = Container(cgroup, f"{number:064x}", "uid", "burstable", "shop", pod or f"agent-{number}", "agent")
    memory = MemoryState(60 * MIB, 100 * MIB, 0, 10 * MIB, 0)
    return Standing(
        cgroup, number, container, "default", False, 4711, "bpf", "freeze", memory, 5 * MIB, 1, model.State()
    )


class Governor:
    """The sockets of a governor, answered by a thread that turns its poller."""

    def __init__(self, directory, standings, name=status.NODE_SOCKET, faults=()):
        self.poller = Poller()
        self.subscribers = Subscribers(self.poller, lambda: {"cgroup": "", "agent_pid": 0})
        standing_of = {slot: lambda one=one: one for slot, one in enumerate(standings)}
        self.subscribers.on_status = lambda after: status.page(standing_of, after, os.getpid(), 100 * SECOND, faults)
        self.subscribers.listen(directory / name)
        self.ends = threading.Event()
        self.thread = threading.Thread(target=self.turn)
        self.thread.start()

    def turn(self):
        while not self.ends.is_set():
            self.poller.wait(10_000_000)

    def close(self):
        self.ends.set()
        self.thread.join()
        self.subscribers.close()


@pytest.fixture
def run_directory(tmp_path, monkeypatch):
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path)
    real = status_cli.Path
    monkeypatch.setattr(status_cli, "Path", lambda path: tmp_path if path == "/run/governor" else real(path))
    return tmp_path


@pytest.fixture
def governors(run_directory):
    running = []

    def start(standings, **options):
        running.append(Governor(run_directory, standings, **options))
        return running[-1]

    yield start
    for one in running:
        one.close()


def asked(*arguments):
    return CliRunner().invoke(app, ["status", *arguments], env={"COLUMNS": "80", "TERM": "dumb"})


def test_nothing_runs(run_directory):
    result = asked()
    assert result.exit_code == 1
    assert "no governor runs here" in result.output


def test_a_socket_that_nobody_listens_at_any_more(run_directory):
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(run_directory / "memcg-7.sock"))
    result = asked()
    assert result.exit_code == 1
    assert "memcg-7.sock: [Errno 111] Connection refused" in result.output


def test_a_table_for_people(governors):
    held = replace(
        standing(1),
        state=model.State(phase=model.Phase.HELD),
        frozen_for_ns=1_300_000_000,
        decided=Decided("archive", "91.2 % of max is in use", 88 * SECOND),
    )
    unread = replace(
        standing(2, pod="a-pod-whose-name-goes-on-for-ever-and-ever-and-ever"), memory=None, dry_run=True
    )
    governors([replace(standing(), state=model.State(in_episode=True)), held, unread])
    result = asked()
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert max(map(len, lines[:-1])) <= 80
    assert [line.split()[1:] for line in lines[2:4]] == [
        ["50", "100", "50.0", "in", "episode", "bpf", "default", "4711"],
        ["50", "100", "50.0", "frozen", "1.3", "s", "bpf", "default", "4711"],
    ]
    assert lines[4].split()[1:7] == ["?", "?", "?", "watching,", "dry", "bpf"]
    name = "".join(line.split()[0] for line in lines[4:-1])
    assert name == "shop/a-pod-whose-name-goes-on-for-ever-and-ever-and-ever/agent"
    assert lines[-1] == "shop/agent-1/agent: archive, 12 s ago: 91.2 % of max is in use"


def test_it_says_who_leads(governors):
    outer, inner = replace(standing(), inside_guard_pid=4711), replace(standing(1), led_from_outside=True)
    governors([outer, inner, standing(2)])
    assert asked().output.splitlines()[-2:] == [
        "shop/agent-0/agent: compact and clear are left to governor run in it (its guard is process 4711)",
        f"shop/agent-1/agent: {status_cli.LED}",
    ]
    [answer] = orjson.loads(asked("--json").output)
    found = [(one["inside_guard_pid"], one["led_from_outside"]) for one in answer["targets"]]
    assert found == [(4711, False), (0, True), (0, False)]


@pytest.mark.parametrize("led", [True, False])
def test_a_hold_where_somebody_outside_leads_says_what_it_does_not_forbid(governors, monkeypatch, led):
    governors([replace(standing(), led_from_outside=led)], name="memcg-77.sock")
    monkeypatch.setattr(instance, "guarded", lambda: {77: 4711})
    result = CliRunner().invoke(app, ["hold", "10m"])
    assert result.output.splitlines() == [
        "process 4711: nothing but the brake for 10m",
        *([f"process 4711: {status_cli.LED}"] if led else []),
    ]
    assert "is over" in CliRunner().invoke(app, ["hold", "0"]).output


def test_a_hold_does_not_wait_for_a_guard_that_is_frozen(run_directory, monkeypatch):
    with socket.socket(socket.AF_UNIX) as frozen:
        frozen.bind(str(run_directory / "memcg-77.sock"))
        frozen.listen()
        monkeypatch.setattr(instance, "guarded", lambda: {77: 4711})
        begun = time.monotonic()
        result = CliRunner().invoke(app, ["hold", "10m"])
    assert (result.exit_code, result.output) == (0, "process 4711: nothing but the brake for 10m\n")
    assert 0.5 < time.monotonic() - begun < 4


def test_names_from_a_container_reach_no_terminal_as_they_are(governors):
    decided = Decided("compact", "\x1b[2J\n[bold]\x9b2J\u202e", 88 * SECOND)
    governors([replace(standing(pod="\x1b]0;x\x07[red]\n\x9b\u202e"), decided=decided, policy="\x9b8m\x1b[8m")])
    for arguments in ((), ("--json",)):
        output = asked(*arguments).output
        assert not set(output) & set("\x1b\x07\x9b\u202e")  # JSON itself escapes the first two only
    assert "[bold]" in asked().output  # no markup is obeyed either


def test_pages_and_json(governors):
    governors([standing(number) for number in range(2 * status.PAGE_TARGETS + 1)])
    [said] = orjson.loads(asked("--json").output)
    assert [one["cgroup_id"] for one in said["targets"]] == list(range(2 * status.PAGE_TARGETS + 1))
    assert said["governor"]["pid"] == os.getpid()
    assert said["governor"]["resident_bytes"] > MIB
    assert said["targets"][0]["memory"]["unreclaimable_ratio"] == 0.5
    assert said["targets"][0]["tiers"] == {"compact": "none", "recycle": "none", "clear": "none"}


def test_a_daemon_that_listens_for_each_target_as_well_is_one(governors):
    governors([standing(0), standing(1)])
    governors([standing(1)], name="memcg-1.sock")
    [said] = orjson.loads(asked("--json").output)
    assert len(said["targets"]) == 2


def test_the_agents_user_may_listen_and_is_not_told_of_others(governors, monkeypatch, run_directory):
    """The uid is what the kernel says of the peer; here it is made to say that of an agent."""
    agent_uid = 12345
    governor = governors([standing()])
    governor.subscribers.allowed_uids |= {agent_uid}
    monkeypatch.setattr(subscribers, "peer_of", lambda connection: Peer(os.getpid(), agent_uid))
    result = asked()
    assert result.exit_code == 1
    assert "it does not tell" in result.output


@pytest.mark.parametrize("after", ["null", '"0"', "[]", "1e400"])
def test_who_asks_for_nonsense_is_cut_off(governors, run_directory, after):
    governors([standing()])
    _, connection = status_cli.connect(run_directory / status.NODE_SOCKET)
    with connection, connection.makefile("rb") as lines:
        connection.sendall(b'{"type":"status","after":' + after.encode() + b"}\n")
        assert len(lines.readlines()) == 1  # hello


@pytest.mark.parametrize(
    "said",
    [b"", b"no json\n", b'{"type":"target"', b"x" * (1 << 20), b'["type"]\n', b'{"type":"hello"}\n'],
)
def test_who_answers_otherwise_is_no_governor(run_directory, said):
    path = run_directory / "memcg-9.sock"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen()

        def answer():
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                with contextlib.suppress(BrokenPipeError):
                    connection.sendall(said)

        thread = threading.Thread(target=answer)
        thread.start()
        result = asked()
        thread.join()
    assert result.exit_code == 1
    assert "no answer from" in result.output
    assert len(result.output) < 2000


def test_one_that_is_not_well_says_so_by_its_exit_status(governors):
    governors([standing()], faults=["reflex does not run"])
    result = asked()
    assert result.exit_code == 3
    assert "not well: reflex does not run" in result.output
