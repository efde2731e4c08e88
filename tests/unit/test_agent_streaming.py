"""Downloads and streamed answers, from a real server on loopback that cuts, lies and dawdles."""

import asyncio
import io
import json
import os
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from governor.agent import streaming
from governor.agent.partial import Partial
from governor.agent.stopping import StoppedByPressure
from governor.agent.stream_text import ServerSentEvent, TextError, events, lines, text
from governor.agent.streaming import StreamError, chunks, deliver, download
from tests.fakes import full_disk

BODY = bytes(i * i % 251 for i in range(300_000))


@dataclass
class Server:
    """One connection after the other; `answers` says to each what to do, the last one to all that follow."""

    answers: list
    seen: list = field(default_factory=list)
    url: str = ""

    def serve(self, listening):
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                head, _, body = head.partition(b"\r\n\r\n")
                request = dict(line.split(": ", 1) for line in head.decode().split("\r\n")[1:])
                self.seen.append({key.lower(): value for key, value in request.items()})
                while len(body) < int(self.seen[-1].get("content-length", 0)):  # left unread it would be a reset
                    body += connection.recv(65536)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                with suppress(OSError):  # who asked has gone
                    answer(connection, self.seen[-1])


@contextmanager
def server(*answers):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        one = Server(list(answers), url=f"http://127.0.0.1:{listening.getsockname()[1]}/body")
        thread = threading.Thread(target=one.serve, args=[listening], daemon=True)
        thread.start()
        yield one
        listening.shutdown(socket.SHUT_RDWR)
    thread.join(10)


def head(status, **headers):
    named = "".join(f"{key.replace('_', '-')}: {value}\r\n" for key, value in headers.items())
    return f"HTTP/1.1 {status} x\r\nConnection: close\r\n{named}\r\n".encode()


def file(body=BODY, *, cut=None, etag='"one"', ranges=True, **headers):
    """A server of files; `cut` bytes into the answer the connection is gone."""

    def answer(connection, request):
        named = {"ETag": etag} | headers if etag else headers
        begin = 0
        if ranges and "range" in request and request.get("if-range") == etag:
            begin = int(request["range"].removeprefix("bytes=").removesuffix("-"))
        if begin >= len(body) > 0:
            connection.sendall(head(416, Content_Range=f"bytes */{len(body)}", **named))
            return
        rest = body[begin:]
        about = {"Content_Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"} if begin else {}
        connection.sendall(head(206 if begin else 200, Content_Length=len(rest), **about, **named) + rest[:cut])

    return answer


def plain(raw):
    return lambda connection, _request: connection.sendall(raw)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """No backoff."""
    monkeypatch.setattr(streaming, "_BACKOFF_MAX_S", 0.0)


def fetch(url, path, **options):
    return asyncio.run(download(url, path, **options))


def test_whole(tmp_path):
    with server(file()) as one:
        found = fetch(one.url, tmp_path / "body")
    assert (found.path, found.size_bytes, found.resumed_bytes, found.requests) == (tmp_path / "body", len(BODY), 0, 1)
    assert (tmp_path / "body").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["body"]
    assert one.seen[0]["accept-encoding"] == "identity"


CUTS = {
    "goes on where it was cut": ([file(cut=100_000), file(cut=50_000), file()], 3),
    "by the date": ([file(cut=9, etag="", Last_Modified="Sun, 22 Nov 2026 03:00:00 GMT"), file()], 2),
    "anew, where nothing names the version": ([file(cut=100_000, etag=""), file(etag="")], 2),
    "anew, where the ETag is weak": ([file(cut=100_000, etag='W/"one"'), file(etag='W/"one"')], 2),
    "anew, where it has changed": ([file(b"old" * 90_000, cut=100_000, etag='"old"'), file()], 2),
    "anew, where ranges are not known": ([file(cut=100_000), file(ranges=False)], 2),
    "another part than was asked for": (
        [file(cut=9), plain(head(206, Content_Length=5, Content_Range="bytes 7-11/300000") + b"xxxxx"), file()],
        3,
    ),
    "a size of thousands of digits": (
        [file(cut=9), plain(head(206, Content_Length=1, Content_Range=f"bytes 9-9/{'9' * 5000}") + b"x"), file()],
        3,
    ),
    "another version, as a part": (
        [file(cut=9), plain(head(206, ETag='"two"', Content_Length=1, Content_Range="bytes 9-9/10") + b"x"), file()],
        3,
    ),
    "cut after all had come": ([file(cut=len(BODY)), file()], 1),
    "overloaded": ([plain(head(503, Content_Length=0)), plain(head(429, Content_Length=0)), file()], 3),
    "no answer": ([plain(b""), file()], 2),
    "many cuts, each with something": ([*[file(cut=1000)] * 12, file()], 13),
}


@pytest.mark.parametrize("case", CUTS)
def test_cut(tmp_path, case):
    answers, requests = CUTS[case]
    with server(*answers) as one:
        found = fetch(one.url, tmp_path / "body")
    assert found.requests == requests == len(one.seen)
    assert (tmp_path / "body").read_bytes() == BODY
    assert [path.name for path in tmp_path.iterdir()] == ["body"]


def test_the_next_one_goes_on(tmp_path):
    with server(file(cut=100_000), plain(b"")) as one:
        with pytest.raises(httpx.RemoteProtocolError):
            fetch(one.url, tmp_path / "body", attempts=1)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".body.part", ".body.part.json"]
        one.answers[:] = [file()]
        found = fetch(one.url, tmp_path / "body")
    assert (found.resumed_bytes, found.requests) == (100_000, 1)
    assert one.seen[-1]["range"] == "bytes=100000-"
    assert (tmp_path / "body").read_bytes() == BODY


@pytest.mark.parametrize("status", [401, 403, 404, 501])
def test_who_is_refused_keeps_what_has_come(tmp_path, status):
    """A signed URL has expired: with another signature it goes on."""
    with server(file(cut=100_000), plain(head(status, Content_Length=0))) as one:
        with pytest.raises(StreamError, match=f"found status {status}"):
            fetch(one.url, tmp_path / "body")
        one.answers[:] = [file()]
        assert fetch(one.url, tmp_path / "body").resumed_bytes == 100_000
    assert (tmp_path / "body").read_bytes() == BODY


def test_all_was_there_but_the_name(tmp_path):
    with server(file()) as one:
        with Partial(tmp_path / "body", one.url) as partial:
            partial.restart('"one"')
            partial.write(BODY)
        assert fetch(one.url, tmp_path / "body").resumed_bytes == len(BODY)
    assert (tmp_path / "body").read_bytes() == BODY


def test_of_another_url_nothing_is_used(tmp_path):
    with Partial(tmp_path / "body", "http://elsewhere/") as partial:
        partial.restart('"one"')
        partial.write(b"elsewhere")
    with server(file()) as one:
        assert fetch(one.url, tmp_path / "body").resumed_bytes == 0
    assert (tmp_path / "body").read_bytes() == BODY


REFUSED = {
    "not found": (plain(head(404, Content_Length=0)), {}, "found status 404"),
    "too large, by its own word": (file(), {"limit_bytes": 1000}, "found 300,000 bytes, expected at most 1,000"),
    "too large, and it does not say": (plain(head(200) + BODY), {"limit_bytes": 1000}, "more than 1,000 bytes"),
    "compressed all the same": (plain(head(200, Content_Encoding="gzip")), {}, "found Content-Encoding 'gzip'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    answer, options, said = REFUSED[case]
    with server(answer) as one:
        with pytest.raises(StreamError, match=said):
            fetch(one.url, tmp_path / "body", **options)
        assert list(tmp_path.iterdir()) == []
        with pytest.raises(StreamError, match=said):
            asyncio.run(deliver(chunks(one.url, **options), io.BytesIO()))


def test_gives_up(tmp_path):
    with server(plain(b"")) as one, pytest.raises(httpx.RemoteProtocolError):
        fetch(one.url, tmp_path / "body", attempts=3)
    assert len(one.seen) == 3


def test_stops_at_the_pressure_asked_and_goes_on_later(tmp_path):
    ratios = [0.5, 0.5, 0.8]
    with server(file()) as one:
        with pytest.raises(StoppedByPressure, match=r"0\.800 of the memory limit is in use, to stop at 0\.8"):
            fetch(one.url, tmp_path / "body", pressure=lambda: ratios.pop(0), stop_at=0.8)
        kept_bytes = (tmp_path / ".body.part").stat().st_size
        assert 0 < kept_bytes < len(BODY)
        assert fetch(one.url, tmp_path / "body").resumed_bytes == kept_bytes
    assert (tmp_path / "body").read_bytes() == BODY


@pytest.mark.parametrize("what", ["a link", "a fifo", "a second name"])
def test_what_is_no_file_of_ours_is_not_written_to(tmp_path, what):
    precious, part = tmp_path / "precious", tmp_path / ".body.part"
    precious.write_text("precious")
    {"a link": part.symlink_to, "a fifo": lambda _: os.mkfifo(part), "a second name": part.hardlink_to}[what](
        precious
    )
    with server(file()) as one, pytest.raises(OSError, match=r"symbolic links|no regular file of this user alone"):
        fetch(one.url, tmp_path / "body")
    assert precious.read_text() == "precious"


def test_one_at_a_time(tmp_path):
    with Partial(tmp_path / "body", "http://x/"), pytest.raises(BlockingIOError, match="by somebody else"):
        Partial(tmp_path / "body", "http://x/")
    Partial(tmp_path / "body", "http://x/").__exit__()
    assert list(tmp_path.iterdir()) == []


def test_who_takes_sets_the_pace():
    """The server has sent no more than the sockets hold, however long it is waited."""
    sent, body = [0], b"x" * (1 << 16)

    def endless(connection, _request):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 16)
        connection.sendall(head(200))
        while sent[0] < 1 << 28:
            connection.sendall(body)
            sent[0] += len(body)

    async def slowly():
        taken, most = 0, 0

        async def callback(chunk):
            nonlocal taken, most
            taken += len(chunk)
            await asyncio.sleep(0.05)
            most = max(most, sent[0] - taken)
            if taken > 1 << 20:
                raise EOFError

        with pytest.raises(EOFError):
            await deliver(chunks(one.url), callback)
        return most

    with server(endless) as one:
        assert asyncio.run(slowly()) < 16 << 20


def test_memory_does_not_depend_on_the_size(tmp_path):
    def long(connection, _request):
        connection.sendall(head(200, Content_Length=24 << 20))
        for _ in range(24):
            connection.sendall(b"x" * (1 << 20))

    async def taken():
        with (tmp_path / "sink").open("wb") as sink:
            return await deliver(chunks(one.url), sink)

    with server(long) as one:
        asyncio.run(taken())  # what is imported and cached once
        tracemalloc.start()
        try:
            assert asyncio.run(taken()) == 24 << 20
            fetch(one.url, tmp_path / "body")
            most_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert (tmp_path / "sink").stat().st_size == (tmp_path / "body").stat().st_size == 24 << 20
    assert most_bytes < 6 << 20  # of it 1 MiB is the server's, which is in this process


def test_cancelled_while_the_disk_is_slow(tmp_path, monkeypatch):
    """The thread that writes has ended before the file is closed, and what it wrote is resumed."""
    real, writing, closed = os.pwrite, threading.Event(), []

    def slowly(fd, data, offset):
        writing.set()
        time.sleep(0.2)
        closed.append(not os.path.exists(f"/proc/self/fd/{fd}"))
        return real(fd, data, offset)

    async def cancelled():
        task = asyncio.ensure_future(download(one.url, tmp_path / "body"))
        await asyncio.to_thread(writing.wait)
        task.cancel()
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with server(file()) as one:
        monkeypatch.setattr(os, "pwrite", slowly)
        asyncio.run(cancelled())
        monkeypatch.undo()
        assert closed and not any(closed)
        assert fetch(one.url, tmp_path / "body").resumed_bytes >= streaming._WRITE_BYTES
    assert (tmp_path / "body").read_bytes() == BODY


def test_a_disk_that_is_full_once(tmp_path, monkeypatch):
    """What was written of a piece is not written again."""
    with server(file()) as one:
        full_disk.fill(monkeypatch, "pwrite", 100_000)
        with pytest.raises(OSError, match="No space left"):
            fetch(one.url, tmp_path / "body")
        monkeypatch.undo()
        assert fetch(one.url, tmp_path / "body").resumed_bytes == 100_000
    assert (tmp_path / "body").read_bytes() == BODY


def test_httpx_without_its_command_line():
    code = """
import sys
from governor.agent import streaming
httpx = streaming._httpx()
assert httpx.AsyncClient and not {"click", "rich", "httpx._main"} & set(sys.modules)
import httpx._main
assert httpx._main.main
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_httpx():
    code = "import asyncio, sys; sys.modules['httpx'] = None\nfrom governor.agent.streaming import download\n"
    code += "asyncio.run(download('http://x/', '/tmp/x'))"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stderr.endswith(
        "found no httpx, which this needs: pip install '.[http]' in a checkout of governor\n"
    )


# Text


async def pieces(data, sizes):
    begin, at = 0, 0
    while begin < len(data):
        size = sizes[at % len(sizes)]
        yield data[begin : begin + size]
        begin, at = begin + size, at + 1


def collect(made):
    async def all_of():
        return [each async for each in made]

    return asyncio.run(all_of())


sizes = st.lists(st.integers(1, 7), min_size=1, max_size=5)
utf8 = st.text(st.characters(exclude_categories=["Cs"]))


@given(written=utf8, sizes=sizes)
def test_text_borders_anywhere(written, sizes):
    found = collect(text(pieces(written.encode(), sizes)))
    assert "".join(found) == written
    assert all(found)


@given(data=st.binary(), sizes=sizes)
def test_bytes_that_are_no_text(data, sizes):
    """As Python decodes the whole, errors included."""
    assert "".join(collect(text(pieces(data, sizes), "replace"))) == data.decode("utf-8", "replace")
    try:
        whole = data.decode()
    except UnicodeDecodeError:
        with pytest.raises(UnicodeDecodeError):
            collect(text(pieces(data, sizes)))
    else:
        assert "".join(collect(text(pieces(data, sizes)))) == whole


@given(
    written=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n"))),
    ends=st.lists(st.sampled_from(["\n", "\r\n", "\r"]), min_size=1),
    sizes=sizes,
)
def test_line_borders_anywhere(written, ends, sizes):
    joined = "".join(line + ends[at % len(ends)] for at, line in enumerate(written))
    pairs = joined.replace("\r\n", "\n").replace("\r", "\n")  # CR and LF of two empty lines are one end
    assert collect(lines(pieces(joined.encode(), sizes))) == pairs.split("\n")[:-1]


STREAM = '\ufeff: ping\r\nevent: delta\r\nid: 7\r\ndata: {"text": "größer"}\r\ndata: 🙂\r\n\r\n'
STREAM += "data\n\nevent: end\n\nretry: 9\rdata:x"


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
def test_events(size):
    expected = [ServerSentEvent("delta", '{"text": "größer"}\n🙂', "7"), ServerSentEvent("message", "", "7")]
    assert collect(events(pieces(STREAM.encode(), [size]))) == expected


@pytest.mark.parametrize("source", [b"x" * 5000, b"data: x\n" * 1000])
def test_lines_and_events_are_bounded(source):
    with pytest.raises(TextError, match="expected at most 1,000"):
        collect(events(pieces(source, [100]), limit_bytes=1000))


def test_a_models_answer():
    """POSTed, and streamed as server-sent events."""
    said = [{"delta": word} for word in ("one", "größer", "🙂")]
    stream = "".join(f"data: {json.dumps(each, ensure_ascii=False)}\n\n" for each in said).encode()

    def answer(connection, request):
        assert request["content-type"] == "application/json"
        connection.sendall(head(200, Content_Type="text/event-stream", Transfer_Encoding="chunked"))
        for at in range(0, len(stream), 5):
            part = stream[at : at + 5]
            connection.sendall(b"%x\r\n%s\r\n" % (len(part), part))
        connection.sendall(b"0\r\n\r\n")

    with server(answer) as one:
        found = collect(events(chunks(one.url, method="POST", json={"stream": True})))
    assert [json.loads(each.data) for each in found] == said
