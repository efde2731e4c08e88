"""What is under way in a small container; what it holds there is measured in tests/kernel/test_agent_memory.py."""

import asyncio
import errno
import os
import socket

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent import streaming, under_way
from governor.agent.container import Container
from governor.agent.under_way import GrowingFile, under_way_bytes
from tests.fakes.memory_tree import CG, MIB, V2, Tree

KIB = 1 << 10


@pytest.mark.parametrize(
    ("max_mib", "chosen_mb", "expected_bytes"),
    [(32, "", 2 * MIB), (512, "", 32 * MIB), (None, "", None), (None, "64", None), (32, "8", 2 * MIB)],
)
def test_a_share_of_what_the_kernel_enforces(tmp_path, monkeypatch, max_mib, chosen_mb, expected_bytes):
    monkeypatch.setenv("MEMORY_LIMIT_MB", chosen_mb)
    tree = Tree(tmp_path, "0::/a", V2.format(root="/", place=CG))
    tree.v2(f"{CG}/a", max_mib, 10)
    monkeypatch.setattr(under_way, "Container", lambda limit_bytes: Container(limit_bytes, str(tmp_path)))
    assert under_way_bytes() == expected_bytes


def test_no_proc_is_no_bound(monkeypatch):
    monkeypatch.setattr(under_way, "Container", lambda limit_bytes: Container(limit_bytes, "/nowhere"))
    assert under_way_bytes() is None


@pytest.fixture(scope="module")
def waits():
    """Spans that a file waited for; the kernel still does it."""
    spans, write_out = [], under_way._write_out

    def spied(fd, begin, end):
        spans.append((begin, end))
        write_out(fd, begin, end)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(under_way, "_write_out", spied)
        patch.setattr(under_way, "under_way_bytes", lambda: 100)
        yield spans


@given(st.lists(st.binary(max_size=250)), st.binary(max_size=300))
def test_never_more_than_its_share_is_dirty(waits, tmp_path_factory, written, before):
    path = tmp_path_factory.getbasetemp() / "growing"
    path.write_bytes(before)
    waits.clear()
    with path.open("r+b") as opened:
        file = GrowingFile(opened.fileno(), len(before))
        for data in written:
            file.write(data)
            assert file.size_bytes - (waits[-1][1] if waits else len(before)) < 100
        assert path.read_bytes() == before + b"".join(written)
        assert [begin for begin, _ in waits] == [len(before), *(end for _, end in waits)][: len(waits)]
        file.clear()
        file.write(b"anew")
        assert path.read_bytes() == b"anew"


def test_a_disk_that_lost_it_is_said_and_one_that_knows_no_waiting_is_not(tmp_path, monkeypatch):
    reading, writing = os.pipe()
    under_way._write_out(writing, 0, 100)  # ESPIPE
    monkeypatch.setattr(under_way, "_LOST", under_way._LOST | {errno.ESPIPE})
    with pytest.raises(OSError, match="Illegal seek"):
        under_way._write_out(writing, 0, 100)
    os.close(reading)
    os.close(writing)


@pytest.mark.parametrize(("most_bytes", "bounded"), [(None, False), (64 * KIB, True), (8 * MIB, False)])
def test_a_sockets_buffer_is_bounded_where_that_is_less_than_it_takes(monkeypatch, most_bytes, bounded):
    monkeypatch.setattr(streaming, "under_way_bytes", lambda: most_bytes)

    async def answer(reader, writer):
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 x\r\nContent-Length: 20\r\n\r\n1234567890")  # and no more
        await reader.read()
        writer.close()

    async def buffer_bytes():
        responses = []

        async def keep(response):
            responses.append(response)

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/"
        async with server, httpx.AsyncClient(event_hooks={"response": [keep]}) as client:
            body = streaming.chunks(url, client=client)
            assert await anext(body) == b"1234567890"
            sock = responses[0].extensions["network_stream"].get_extra_info("socket")
            found = sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            await body.aclose()
        return found

    assert (asyncio.run(buffer_bytes()) == 64 * KIB) == bounded
