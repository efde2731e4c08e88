"""governor's own subscribers' socket, heard and answered by governor.agent."""

import asyncio
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from governor.agent import Announcement, Hooks, NotNow, Status
from governor.agent.hearing import socket_paths
from governor.model import Tier
from governor.poller import Poller
from governor.record import CROSSING, LEVEL_COMPACT, RISING, Record
from governor.subscribers import Subscribers
from tests.fakes.memory_tree import CG, PATIENCE_S, limited, run, until


@pytest.fixture
def tree(monkeypatch):
    monkeypatch.delenv("MEMORY_LIMIT_MB", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with limited() as made:
        yield made


class Governor(threading.Thread):
    """governor's own socket, served as its loop does."""

    def __init__(self, root, memcg):
        super().__init__(daemon=True)
        directory = Path(root) / "run" / "governor"
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / f"memcg-{os.stat(memcg).st_ino}.sock"
        self.answers, self.orders, self.is_over = [], [], False
        self.poller = Poller()
        self.subscribers = Subscribers(self.poller, lambda: {"cgroup": str(memcg), "agent_pid": os.getpid()})
        self.subscribers.on_answer = lambda *answer: self.answers.append(answer)
        self.subscribers.listen(self.path)
        self.start()

    def run(self):
        while not self.is_over:
            self.poller.wait(5_000_000)
            for order in [self.orders.pop(0) for _ in list(self.orders)]:
                order()
            self.subscribers.check_deadlines(time.monotonic_ns())
        self.subscribers.close()

    def ask(self, what, within_s=5.0):
        now_ns = time.monotonic_ns()
        self.orders.append(lambda: self.subscribers.ask(what, "it is time", now_ns + int(within_s * 1e9), now_ns))

    def tell(self, kind):
        self.orders.append(lambda: self.subscribers.tell("event", kind=kind, text=f"about {kind}"))

    def cross(self):
        about = {"kind": CROSSING, "flags": RISING, "level": LEVEL_COMPACT, "bound_pages": 180, "max_pages": 250}
        found = Record(**(dict.fromkeys(Record._fields, 0) | about))
        self.orders.append(lambda: self.subscribers.tell_level(found))

    def end(self):
        self.is_over = True
        self.join()


@contextlib.contextmanager
def governor_of(tree):
    governor = Governor(tree.root, tree.memcg)
    try:
        yield governor
    finally:
        governor.end()


async def fine(request):
    return f"summarised for {request.what}: {request.reason}"


def plain(request):
    return f"no coroutine: {request.what}"


async def not_now(request):
    raise NotNow("in the middle of a turn")


async def fails(request):
    raise KeyError("turn")


async def long(request):
    await asyncio.sleep(PATIENCE_S)


@pytest.mark.parametrize(
    ("hook", "status", "reason"),
    [
        (fine, "delivered", "summarised for compact: it is time"),
        (plain, "delivered", "no coroutine: compact"),
        (not_now, "deferred", "in the middle of a turn"),
        (fails, "failed", "KeyError: 'turn'"),
        (long, "delivered", "begun, and not done yet"),
    ],
)
def test_a_request_runs_its_hook_and_is_acknowledged(tree, hook, status, reason):
    async def main():
        with governor_of(tree) as governor:
            async with tree.pressure(hooks=Hooks(compact=hook)) as pressure:
                await until(lambda: governor.subscribers.can)
                assert governor.subscribers.can == {Tier.COMPACT}
                await until(lambda: pressure.hears_governor)
                governor.ask(Tier.COMPACT, 0.5)
                await until(lambda: governor.answers)
                assert [(tier, got.value, why) for tier, got, why in governor.answers] == [
                    (Tier.COMPACT, status, reason)
                ]

    run(main())


def test_a_request_while_the_last_one_is_at_work_is_deferred(tree):
    async def main():
        with governor_of(tree) as governor:
            async with tree.pressure(hooks=Hooks(clear=long)):
                await until(lambda: governor.subscribers.can)
                for count in (1, 2):
                    governor.ask(Tier.CLEAR, 0.2)
                    await until(lambda count=count: len(governor.answers) == count)
                assert [answer[1].value for answer in governor.answers] == ["delivered", "deferred"]

    run(main())


def test_what_is_announced_reaches_its_hooks(tree):
    async def main():
        heard = {"announced": [], "warning": [], "archive": []}

        def hook(name):
            async def hear(announcement):
                heard[name].append(announcement)

            return hear

        async def broken(announcement):
            raise ValueError

        with governor_of(tree) as governor:
            hooks = Hooks(announced=hook("announced"), warning=heard["warning"].append, archive=hook("archive"))
            async with tree.pressure(hooks=hooks) as pressure, tree.pressure(hooks=Hooks(announced=broken)):
                await until(lambda: pressure.hears_governor and not governor.subscribers.can)
                for kind in ("warning", "archived", "shed"):
                    governor.tell(kind)
                await until(lambda: len(heard["announced"]) == 3)
        assert heard["warning"] == [Announcement("warning", "about warning")]
        assert heard["archive"] == [Announcement("archived", "about archived")]

    run(main())


def test_a_crossing_is_looked_into_at_once(tree):
    async def main():
        crossings = []
        (tree.root / "proc/meminfo").write_text("MemTotal: 999999999 kB\nMemAvailable: 99999 kB\nMemFree: 9999 kB\n")
        tree.v2(f"{CG}/a", 100_000, 100)  # it looks again in 30 s: more than the patience
        with governor_of(tree) as governor:
            async with tree.pressure(hooks=Hooks(crossed=crossings.append)) as pressure:
                await until(lambda: pressure.hears_governor)
                tree.v2(f"{CG}/a", 100_000, 76_000)
                governor.cross()
                assert (await anext(aiter(pressure))).after is Status.WARNING
        assert (crossings[0].level, crossings[0].rising) == ("compact", True)
        assert crossings[0].unreclaimable_bytes == 180 * 4096

    run(main())


def test_a_hook_for_crossings_that_fails_ends_nothing(tree):
    async def main():
        failed = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, about: failed.append(about["exception"]))

        def fails(crossing):
            raise KeyError(crossing.level)

        with governor_of(tree) as governor:
            async with tree.pressure(hooks=Hooks(crossed=fails)) as pressure:
                for count in (1, 2):
                    await until(lambda: pressure.hears_governor)
                    governor.cross()
                    await until(lambda count=count: len(failed) == count)
        assert [str(error) for error in failed] == ["'compact'"] * 2

    run(main())


def test_a_governor_that_goes_is_no_end_of_the_watch_and_one_that_comes_is_heard(tree):
    async def main():
        async with tree.pressure(hooks=Hooks(compact=fine)) as pressure:
            for _ in range(2):
                with governor_of(tree) as governor:
                    await until(lambda: pressure.hears_governor)
                    governor.ask(Tier.COMPACT)
                await until(lambda: not pressure.hears_governor)
                tree.hold(800)
                await until(lambda: pressure.status is Status.WARNING)
                tree.hold(100)
                await until(lambda: pressure.status is Status.OK)

    run(main())


@pytest.mark.parametrize(
    "said",
    [
        b"no json\n",
        b"[1]\n",
        b'{"type": "hello", "version": 99}\n',
        b'{"type": "hello", "version": 1}\n{"type": "memory", "level": 4}\n',
        b'{"type": "event", "kind": 1, "text": "x"}\n',
        b'{"type": "request", "what": "compact", "reason": "", "deadline_s": 1}\n',
        b"x" * (3 << 20),
        b'{"type": "event"',
        b"",
    ],
)
def test_who_does_not_speak_the_protocol_is_left(tree, said):
    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError):
            writer.write(said)
            await writer.drain()
            if said:
                await reader.read()
        left.append(1)
        writer.close()

    left = []

    async def main():
        directory = tree.root / "run" / "governor"
        directory.mkdir(parents=True)
        path = directory / f"memcg-{os.stat(tree.memcg).st_ino}.sock"
        server = await asyncio.start_unix_server(serve, path)
        asked = []

        async def compact(request):
            asked.append(request)

        async with server, tree.pressure(hooks=Hooks(compact=compact)) as pressure:
            if not said.endswith(b'"event"'):  # half a line: it waits for the rest
                await until(lambda: left)
            tree.hold(800)
            await until(lambda: pressure.status is Status.WARNING)
            assert not pressure.hears_governor
        assert not asked

    run(main())


def test_more_than_is_known_may_be_said(tree):
    heard = []

    async def hear(announcement):
        heard.append(announcement)

    async def serve(reader, writer):
        for line in (
            {"type": "hello", "version": 1, "mood": "fine"},
            {"type": "novelty"},
            {"type": "event", "kind": "shed", "text": "t", "more": 1},
        ):
            writer.write(json.dumps(line).encode() + b"\n")
        await reader.read()

    async def main():
        directory = tree.root / "run" / "governor"
        directory.mkdir(parents=True)
        path = directory / f"memcg-{os.stat(tree.memcg).st_ino}.sock"
        async with await asyncio.start_unix_server(serve, path), tree.pressure(hooks=Hooks(announced=hear)):
            await until(lambda: heard)

    run(main())
    assert heard == [Announcement("shed", "t")]


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@needs_root
def test_another_users_socket_is_not_heard(tree):
    """Neither one in a directory that is theirs, nor one that they serve in ours."""
    memcg = tree.memcg
    directory = tree.root / "run" / "governor"
    directory.mkdir(parents=True)
    path = directory / f"memcg-{os.stat(memcg).st_ino}.sock"
    code = """
import json, os, socket, sys
os.setgid(65534); os.setuid(65534)
server = socket.socket(socket.AF_UNIX); server.bind(sys.argv[1]); server.listen()
print("listening", flush=True)
connection, _ = server.accept()
hello, request = {"type": "hello", "version": 1}, {"type": "request", "id": 1, "what": "clear", "deadline_s": 1}
connection.sendall(f'{json.dumps(hello)}\\n{json.dumps(request | {"reason": ""})}\\n'.encode())
print(connection.recv(1000), flush=True)
"""
    directory.chmod(0o777)
    tree.root.chmod(0o755)
    with subprocess.Popen([sys.executable, "-c", code, path], stdout=-1, text=True) as process:
        process.stdout.readline()
        assert socket_paths([f"{CG}/a"], str(tree.root)) == [str(path)]
        asked = []

        async def clear(request):
            asked.append(request)

        async def main():
            async with tree.pressure(hooks=Hooks(clear=clear)) as pressure:
                said = await asyncio.to_thread(process.stdout.readline)
                assert "subscribe" not in said
                assert not pressure.hears_governor

        run(main())
        assert not asked
    os.chown(directory, 65534, 65534)
    assert socket_paths([f"{CG}/a"], str(tree.root)) == []


def test_the_nearest_memcgs_governor_is_heard_first(tree):
    tree.v2(CG, None, 3000)
    directory = tree.root / "run" / "governor"
    directory.mkdir(parents=True)
    places = [f"{CG}/a", CG]
    expected = [str(directory / f"memcg-{os.stat(str(tree.root) + place).st_ino}.sock") for place in places]
    for path in expected:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
    assert socket_paths(places, str(tree.root)) == expected
