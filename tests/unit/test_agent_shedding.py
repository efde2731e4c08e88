"""Load shedding: the decorator and the semaphore over a fixture tree, the ASGI parts under a real uvicorn."""

import asyncio
import contextlib
import gc
import json
import os
import pickle
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from governor.agent import Overloaded, Probes, ShedLoad, ShrinkingSemaphore, Status, StoppedByPressure, sheds
from tests.fakes.memory_tree import limited, run, until
from tests.waiting import wait_for

ROOT = Path(__file__).parent.parent.parent
HELD_MIB = {Status.OK: 100, Status.WARNING: 780, Status.SHEDDING: 900, Status.CRITICAL: 950}


@pytest.fixture
def tree(monkeypatch):
    monkeypatch.delenv("MEMORY_LIMIT_MB", raising=False)
    with limited() as made:
        made.be = lambda status: made.hold(HELD_MIB[status])
        yield made


@pytest.fixture
def pressure(tree):
    made = tree.pressure(governor=False, gives_back=False)
    made.be = lambda status: (tree.be(status), made.look())
    return made


def test_a_decorated_function_is_not_called_while_nothing_is_accepted(pressure):
    calls = []

    @sheds(pressure, retry_after_s=7)
    def plain(number, *, more):
        calls.append((number, more))
        return number

    @sheds(pressure)
    async def later(number):
        """What it does."""
        await asyncio.sleep(0)
        return plain(number, more=1)

    assert later.__doc__ == "What it does."
    assert asyncio.iscoroutinefunction(later)
    pressure.be(Status.WARNING)
    assert plain(1, more=2) == 1
    assert asyncio.run(later(3)) == 3
    pressure.be(Status.SHEDDING)
    with pytest.raises(Overloaded, match=r"shedding.*not begun.*7 s") as refused:
        plain(4, more=5)
    assert refused.value.retry_after_s == 7
    begun = later(6)  # refused when it is awaited, not before
    pressure.be(Status.OK)
    assert asyncio.run(begun) == 6
    assert calls == [(1, 2), (3, 1), (6, 1)]


def test_the_semaphore_shrinks_and_grows_again(pressure):
    async def main():
        semaphore = ShrinkingSemaphore(pressure, 5)
        inside, highest = [], {}

        async def work(number):
            async with semaphore:
                inside.append(number)
                highest[pressure.status] = max(highest.get(pressure.status, 0), len(inside))
                await release[number].wait()
                inside.remove(number)

        async with pressure:
            release = [asyncio.Event() for _ in range(12)]
            tasks = [asyncio.create_task(work(number)) for number in range(12)]
            await until(lambda: len(inside) == 5)
            pressure.be(Status.WARNING)
            assert semaphore.capacity == 3
            for number in (0, 1):  # who is inside stays, who leaves is not replaced
                release[number].set()
            await until(lambda: inside == [2, 3, 4])
            release[2].set()
            await until(lambda: inside == [3, 4, 5])  # in order
            pressure.be(Status.SHEDDING)
            for number in (3, 4):
                release[number].set()
            await until(lambda: inside == [5])
            pressure.be(Status.CRITICAL)
            assert semaphore.capacity == 0
            release[5].set()
            await until(lambda: not inside)
            await asyncio.sleep(0.05)
            assert not inside
            pressure.be(Status.OK)
            await until(lambda: inside == [6, 7, 8, 9, 10])
            for event in release:
                event.set()
            await asyncio.gather(*tasks)
        assert highest[Status.OK] == 5

    run(main())


def test_who_is_cancelled_while_waiting_takes_no_place(pressure):
    async def main():
        semaphore = ShrinkingSemaphore(pressure, 1)

        async def work():
            async with semaphore:
                await asyncio.sleep(3600)

        tasks = [asyncio.create_task(work()) for _ in range(4)]
        await asyncio.sleep(0)
        tasks[1].cancel()  # waits
        await asyncio.sleep(0)
        tasks[0].cancel()  # is inside
        await asyncio.wait({tasks[0]})
        tasks[2].cancel()  # let in, and cancelled before it runs
        await asyncio.wait({tasks[2]})
        await asyncio.sleep(0)
        tasks[3].cancel()
        await asyncio.wait(tasks)
        async with asyncio.timeout(5), semaphore:
            pass

    run(main())


def test_who_waits_when_the_watch_is_left_is_let_in_all_the_same(pressure, tree, monkeypatch):
    monkeypatch.setattr("governor.agent.shedding._LOOK_AGAIN_S", 0.01)

    async def main():
        semaphore = ShrinkingSemaphore(pressure, 1)
        pressure.be(Status.CRITICAL)

        async def work():
            async with semaphore:
                pass

        async with pressure:
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
        assert not task.done()
        tree.be(Status.OK)
        async with asyncio.timeout(5):
            await task

    run(main())


def test_a_semaphore_that_is_dropped_is_not_told_any_more(pressure):
    for _ in range(10):
        ShrinkingSemaphore(pressure, 1)
    gc.collect()
    assert not pressure._callbacks


@pytest.mark.parametrize("error", [Overloaded(Status.SHEDDING, 5), StoppedByPressure(0.9, 0.85, 10)])
def test_what_is_raised_comes_out_of_another_process(error):
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), vars(found)) == (type(error), str(error), vars(error))


def test_a_semaphore_of_none_is_refused(pressure):
    with pytest.raises(ValueError, match="found count 0"):
        ShrinkingSemaphore(pressure, 0)


def test_a_websocket_is_told_to_come_again_later(pressure):
    """By the messages of ASGI: uvicorn itself speaks WebSocket only with a library that is no dependency here."""

    async def main():
        sent = []

        async def receive():
            return {"type": "websocket.connect"}

        async def send(message):
            sent.append(message)

        async def app(scope, receive, send):
            await send("the app's")

        shedding = ShedLoad(app, pressure)
        await shedding({"type": "websocket", "path": "/"}, receive, send)
        pressure.be(Status.CRITICAL)
        await shedding({"type": "websocket", "path": "/"}, receive, send)
        close = {"type": "websocket.close", "code": 1013, "reason": "memory is short"}
        assert sent == ["the app's", {"type": "websocket.accept"}, close]

    run(main())


async def asserts_http(scope, receive, send):
    assert scope["type"] == "http"


async def takes_the_first_message(scope, receive, send):
    await receive()


async def has_its_own(scope, receive, send):
    for what in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{what}.complete"})


async def cannot_start(scope, receive, send):
    await receive()
    await send({"type": "lifespan.startup.failed"})
    raise RuntimeError("no database")


COMPLETE = ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.parametrize("part", [Probes, ShedLoad])
@pytest.mark.parametrize(
    ("app", "expected"),
    [
        (asserts_http, COMPLETE),
        (takes_the_first_message, COMPLETE),
        (has_its_own, COMPLETE),
        (cannot_start, ["lifespan.startup.failed"]),
    ],
)
def test_the_watch_lives_as_long_as_the_server_whatever_the_app_knows(pressure, part, app, expected):
    async def main():
        sent, watched = [], []
        messages = iter(["lifespan.startup", "lifespan.shutdown"])

        async def receive():
            return {"type": next(messages)}

        async def send(message):
            sent.append(message["type"])
            watched.append(pressure._entered)

        made = part(pressure, app) if part is Probes else part(app, pressure)
        with pytest.raises(RuntimeError, match="no database") if app is cannot_start else contextlib.nullcontext():
            await made({"type": "lifespan"}, receive, send)
        assert (sent, set(watched), pressure._entered) == (expected, {1}, 0)

    run(main())


# Under uvicorn


@pytest.fixture(scope="module")
def serve():
    """Starts uvicorn with one of the apps over a tree; each tree once."""
    started = []

    def start(app, tree):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [sys.executable, "-m", "uvicorn", f"tests.fakes.shedding_server:{app}", "--port", str(port)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "SHEDDING_TREE": str(tree.root)}
        process = subprocess.Popen([*command, "--log-level", "warning"], cwd=ROOT, env=environment)
        started.append(process)
        wait_for(lambda: process.poll() is not None or ask(port, "/health"), what="uvicorn")
        return port

    yield start
    for process in started:
        process.terminate()
        assert process.wait(timeout=20) == -15 or process.returncode == 0


def ask(port, path):
    """Status, headers and body; None where nobody listens yet."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers, error.read()
    except urllib.error.URLError:
        return None


def test_an_app_behind_both_parts(serve, tree):
    port = serve("app", tree)
    assert ask(port, "/")[0::2] == (200, b"done")
    assert ask(port, "/ready")[0] == 200
    slow = []
    thread = threading.Thread(target=lambda: slow.append(ask(port, "/slow")))
    thread.start()
    wait_for(lambda: ask(port, "/begun")[0] == 200)
    tree.be(Status.SHEDDING)
    wait_for(lambda: ask(port, "/ready")[0] == 503)
    status, headers, body = ask(port, "/")
    assert status == 503
    assert 5 <= int(headers["retry-after"]) <= 10
    assert json.loads(body) == {"error": "memory is short, try again later"}
    assert ask(port, "/spared")[0] == 200
    status, headers, body = ask(port, "/health")
    assert (status, headers["cache-control"]) == (200, "no-store")
    assert json.loads(body) == {"status": "shedding", "unreclaimable_bytes": 900 << 20, "max_bytes": 1000 << 20}
    thread.join()
    assert slow[0][0] == 200  # it was begun before
    tree.be(Status.WARNING)
    wait_for(lambda: ask(port, "/ready")[0] == 200)
    assert ask(port, "/")[0] == 200


def test_the_probes_alone(serve, tree):
    port = serve("probes", tree)
    assert [ask(port, path)[0] for path in ("/health", "/ready", "/other")] == [200, 200, 404]
    tree.be(Status.CRITICAL)
    wait_for(lambda: ask(port, "/ready")[0] == 503)
    assert ask(port, "/health")[0] == 200
