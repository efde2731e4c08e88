"""MemoryPressure over a fixture tree."""

import asyncio
import contextlib
import gc
import resource
import shutil
import threading
import time

import pytest

from governor.agent import Status
from tests.fakes.memory_tree import limited, run, until


@pytest.fixture
def tree(monkeypatch):
    monkeypatch.delenv("MEMORY_LIMIT_MB", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    with limited() as made:
        yield made


def test_changes_are_iterated_and_called_back(tree):
    async def main():
        called, awaited = [], []

        async def later(change):
            awaited.append(change.after)
            await asyncio.sleep(0)

        pressure = tree.pressure(governor=False)
        pressure.on_change(lambda change: called.append(str(change.after)))
        async with pressure:
            end = pressure.on_change(later)
            changes = aiter(pressure)
            for mib, before, after in [(760, 0, 1), (930, 1, 3), (600, 3, 0)]:
                tree.hold(mib)
                change = await anext(changes)
                assert (change.before, change.after) == (before, after)
                assert change.reading.unreclaimable_bytes == mib << 20
            await until(lambda: awaited[-1:] == [Status.OK])
            end()
            tree.hold(800)
            await anext(changes)
        assert called == ["warning", "critical", "ok", "warning"]
        assert awaited == [Status.WARNING, Status.CRITICAL, Status.OK]
        with pytest.raises(StopAsyncIteration):
            await anext(changes)

    run(main())


def test_who_is_slow_hears_several_changes_as_one(tree):
    async def main():
        async with tree.pressure(governor=False) as pressure:
            told = []
            pressure.on_change(lambda change: told.append(change.after))
            changes = aiter(pressure)
            tree.hold(800)
            assert (await anext(changes)).after is Status.WARNING
            for mib, status in [(950, Status.CRITICAL), (100, Status.OK), (860, Status.SHEDDING)]:
                tree.hold(mib)
                await until(lambda status=status: told[-1:] == [status])
            change = await anext(changes)
            assert (change.before, change.after) == (Status.WARNING, Status.SHEDDING)

    run(main())


def test_there_and_back_at_once_is_heard(tree):
    async def main():
        async with tree.pressure(governor=False) as pressure:
            changes = aiter(pressure)
            for mib, status in [(800, Status.WARNING), (100, Status.OK)] * 3:
                tree.hold(mib)
                pressure.look()
                assert (await anext(changes)).after is status

    run(main())


def test_an_object_may_be_a_coroutine_function(tree):
    async def main():
        heard = []

        class Hears:
            async def __call__(self, change):
                heard.append(change.after)

        async with tree.pressure(governor=False) as pressure:
            pressure.on_change(Hears())
            tree.hold(800)
            await until(lambda: heard == [Status.WARNING])

    run(main())


def test_who_comes_late_hears_that_it_is_late(tree):
    async def main():
        tree.hold(950)
        async with tree.pressure(governor=False, gives_back=False) as pressure:
            change = await anext(aiter(pressure))
            assert (change.before, change.after) == (Status.OK, Status.CRITICAL)

    run(main())


def test_a_callback_that_fails_ends_nothing(tree, caplog):
    async def main():
        heard = []

        async def fails(change):
            raise KeyError("awaited")

        def fails_at_once(change):
            raise KeyError("called")

        async with tree.pressure(governor=False) as pressure:
            for callback in (fails, fails_at_once, heard.append):
                pressure.on_change(callback)
            tree.hold(800)
            await until(lambda: len(heard) == 1)
            tree.hold(100)
            await until(lambda: len(heard) == 2)

    run(main())
    assert {str(record.exc_info[1]) for record in caplog.records} == {"'awaited'", "'called'"}


def test_without_an_event_loop_and_in_a_blocked_one_whoever_asks_looks(tree):
    pressure = tree.pressure()
    assert pressure.accepting()
    tree.hold(900)
    time.sleep(0.9)  # 820 MiB of room at the pace of 1 GiB in a second
    assert not pressure.accepting()
    assert pressure.status is Status.SHEDDING
    assert pressure.ratio == 0.9

    async def main():
        async with pressure:
            tree.hold(100)
            time.sleep(0.3)  # blocks it
            assert pressure.accepting()

    run(main())


def test_asking_is_cheap_between_two_looks(tree, monkeypatch):
    pressure = tree.pressure()
    looks = []
    monkeypatch.setattr(pressure, "look", lambda: looks.append(1))
    for _ in range(10_000):
        pressure.accepting()
    assert len(looks) <= 1


def test_what_is_asked_in_a_thread_is_told_in_the_event_loop(tree):
    async def main():
        async with tree.pressure(governor=False) as pressure:
            threads = []
            pressure.on_change(lambda _: threads.append(threading.current_thread()))
            tree.hold(800)
            thread = threading.Thread(target=pressure.look)
            thread.start()
            thread.join()
            await until(lambda: threads)
            assert threads == [threading.main_thread()]

    run(main())


def test_it_may_be_entered_several_times_and_again(tree):
    async def main():
        pressure = tree.pressure(governor=False)
        tasks = asyncio.all_tasks()
        for _ in range(2):
            async with pressure:
                async with pressure:
                    pass
                tree.hold(800)
                assert (await anext(aiter(pressure))).after is Status.WARNING
                tree.hold(100)
                await until(lambda: pressure.status is Status.OK)
        assert asyncio.all_tasks() == tasks

    run(main())


def test_waiting_until_work_may_begin(tree):
    async def main():
        tree.hold(900)
        async with tree.pressure() as pressure:
            waiting = asyncio.create_task(pressure.wait_until_accepting())
            await asyncio.sleep(0.05)
            assert not waiting.done()
            tree.hold(790)
            await waiting

    run(main())


def test_cycles_are_collected_on_critical_after_the_callbacks(tree):
    async def main():
        class Node:
            pass

        kept = []
        gc.disable()
        try:
            for _ in range(1000):
                node = Node()
                node.itself, node.payload = node, bytearray(20_000)
                kept.append(node)
            del node
            async with tree.pressure(governor=False) as pressure:
                pressure.on_change(lambda change: kept.clear())
                tree.hold(800)
                await until(lambda: not kept)
                assert pressure.last_freed is None
                tree.hold(950)
                await until(lambda: pressure.last_freed)
                freed = pressure.last_freed
                assert freed.collected >= 1000
                assert freed.trimmed
                assert freed.freed_bytes > 10 << 20
                await until(lambda: pressure.last_freed is not freed)  # it stays critical: again, later
        finally:
            gc.enable()

    run(main())


def test_a_memcg_that_is_gone_is_no_end_of_the_watch(tree):
    async def main():
        async with tree.pressure(governor=False) as pressure:
            shutil.rmtree(tree.memcg)
            await until(lambda: pressure.reading.bound_by == "RAM")
            tree.hold(800)
            await until(lambda: pressure.look() and pressure.status is Status.WARNING)

    run(main())


def test_no_descriptor_left_is_no_end_of_the_watch(tree, caplog):
    """What is looked at cannot be opened, whenever that begins: the last reading stands, said once."""

    async def main():
        async with tree.pressure(governor=True) as pressure:
            await until(lambda: len(asyncio.all_tasks()) == 4)
            for when in ("in the midst", "as it is entered"):
                with no_descriptors():
                    pressure._look_again.set()
                    if when == "as it is entered":
                        await pressure.__aexit__(None, None, None)
                        await pressure.__aenter__()
                    await asyncio.sleep(0.05)
                    pressure._due_s = 0.0
                    assert pressure.accepting() and pressure.reading.bound_by == "/sys/fs/cgroup/a"
                tree.hold(950)
                await until(lambda: pressure._told is Status.CRITICAL and pressure.last_freed)
                tree.hold(100)
                await until(lambda: pressure.look() and pressure._told is Status.OK)
                pressure.last_freed = None
                assert all(not task.done() for task in pressure._tasks)

    run(main())
    assert caplog.text.count("Too many open files") == 2


@contextlib.contextmanager
def no_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
