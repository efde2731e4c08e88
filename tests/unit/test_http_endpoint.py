"""The HTTP endpoint: what it answers, and that nobody who is slow or hostile delays the others or the loop."""

import os
import socket
import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from governor import health, http_endpoint
from governor.children import Children
from governor.health import Vitals
from governor.http_endpoint import HttpEndpoint
from governor.metrics import Exported, exposition
from governor.policy import SECOND
from governor.poller import Poller
from governor.tally import Tally

PATIENCE_S = 20


class Served:
    """An endpoint on a poller that the test turns, as the loop does."""

    def __init__(self):
        self.poller, self.notes, self.sockets = Poller(), [], []
        self.children = Children(self.poller)
        self.endpoint = HttpEndpoint(
            self.poller, self.children, lambda kind, text, **fields: self.notes.append((kind, text))
        )
        self.port = self.endpoint.listen("127.0.0.1:0")

    def connect(self, data=b""):
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(data)
        connection.setblocking(False)
        self.sockets.append(connection)
        self.turn()
        return connection

    def turn(self):
        now_ns = time.monotonic_ns()
        self.children.check_deadlines(now_ns)
        self.endpoint.check_deadlines(now_ns)
        self.poller.wait(10_000_000)

    def read(self, connection):
        """All that it is answered until the end, while the loop turns."""
        answer, until_s = b"", time.monotonic() + PATIENCE_S
        while time.monotonic() < until_s:
            self.turn()
            try:
                data = connection.recv(1 << 20)
            except BlockingIOError:
                continue
            except ConnectionResetError:
                return answer
            if not data:
                return answer
            answer += data
        raise AssertionError(f"no end of {answer[:200]!r}")

    def get(self, path, accept=""):
        connection = self.connect(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: {accept}\r\n\r\n".encode())
        head, _, body = self.read(connection).partition(b"\r\n\r\n")
        return int(head.split()[1]), head.decode(), body.decode()

    def close(self):
        self.endpoint.close()
        self.children.abandon()
        for connection in self.sockets:
            connection.close()


@pytest.fixture
def served():
    made = Served()
    yield made
    made.close()


def test_metrics_are_answered_by_a_child_and_can_be_parsed(served):
    tally, pid = Tally(), os.getpid()
    tally.adopt(0, ("shop", "agent-0", "agent"), 0)
    exported = Exported(tally, [], time.monotonic_ns())
    served.endpoint.exposition = lambda accept: exposition(exported, pid, pid, accept)
    status, head, body = served.get("/metrics")
    found = {family.name: family for family in text_string_to_metric_families(body)}
    assert status == 200
    assert "text/plain; version=0.0.4" in head
    assert f"Content-Length: {len(body)}" in head
    assert found["governor_container_brakes"].samples[0].labels["pod"] == "agent-0"
    assert found["process_resident_memory_bytes"].samples[0].value > 1 << 20
    assert found["governor_reflex_process_cpu_seconds"].samples[0].value > 0
    time.sleep(1)
    status, head, body = served.get("/metrics", "application/openmetrics-text; version=1.0.0")
    assert "application/openmetrics-text" in head
    assert body.endswith("# EOF\n")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", 200),
        (b"GET /healthz?verbose=1 HTTP/1.0\r\n\r\n", 200),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"GET /../../etc/passwd HTTP/1.1\r\nHost: x\r\n\r\n", 404),
        (b"HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n", 405),
        (b"POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n", 405),
        (b"\x16\x03\x01\x02\x00\x01 no http\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nX: " + b"a" * 8000, 431),
    ],
)
def test_what_is_asked(served, request_, status):
    answer = served.read(served.connect(request_))
    assert answer.startswith(f"HTTP/1.1 {status} ".encode())


def vitals(**changed):
    well = {"reflex_runs": True, "reflex_silent": False, "had_bpf": True, "has_bpf": True, "scanned": True}
    return Vitals(**(well | {"late_ns": 0, "waiting": 0} | changed))


@pytest.mark.parametrize(
    ("changed", "healthy", "ready", "said"),
    [
        ({}, 200, 200, "ok"),
        ({"late_ns": 29 * SECOND}, 200, 200, "ok"),
        ({"had_bpf": False, "has_bpf": False}, 200, 200, "ok"),
        ({"reflex_runs": False}, 503, 503, "does not run"),
        ({"reflex_silent": True}, 503, 503, "says nothing"),
        ({"has_bpf": False}, 503, 503, "programs are gone"),
        ({"late_ns": 41 * SECOND}, 503, 503, "41 s late"),
        ({"scanned": False}, 200, 503, "first scan"),
        ({"waiting": 3}, 200, 503, "3 targets"),
    ],
)
def test_health(served, changed, healthy, ready, said):
    found = vitals(**changed)
    served.endpoint.faults = lambda: health.faults(found)
    served.endpoint.not_ready = lambda: health.not_ready(found)
    assert served.get("/healthz")[0] == healthy
    status, _, body = served.get("/readyz")
    assert status == ready
    assert said in body


@pytest.mark.parametrize(
    "accept",
    [
        "text/plain;version=x",
        "application/openmetrics-text;version=1.0.0\t",
        "application/openmetrics-text;version=9.x;escaping=a",
        "a," * 1500,
    ],
)
def test_no_scraper_can_ask_for_what_breaks_the_answer_of_others(served, accept):
    exported = Exported(Tally(), [], 0)
    served.endpoint.exposition = lambda wanted: exposition(exported, os.getpid(), None, wanted)
    status, _, body = served.get("/metrics", accept)
    assert status == 200
    assert "governor_build_info" in body


def test_who_never_ends_its_request_loses_its_place_in_time_and_to_who_comes_later(served, monkeypatch):
    monkeypatch.setattr(http_endpoint, "_REQUEST_NS", SECOND // 2)
    slow = [served.connect(b"GET /healthz HTTP/1.1\r\nHo") for _ in range(40)]
    assert served.get("/healthz")[0] == 200
    assert [served.read(one) for one in slow] == [b""] * 40
    assert not served.endpoint._clients


def test_a_scraper_that_does_not_read_delays_no_other_for_long_and_no_probe_at_all(served, monkeypatch):
    monkeypatch.setattr(http_endpoint, "_READ_S", 1.0)
    served.endpoint.exposition = lambda accept: ("text/plain", b"x" * (16 << 20))
    deaf = served.connect(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    while not served.endpoint._is_formatting:
        served.turn()
    assert served.get("/healthz")[0] == 200
    assert served.endpoint._is_formatting, "a probe waited for the metrics"
    assert len(served.get("/metrics")[2]) == 16 << 20
    assert len(served.read(deaf)) < 16 << 20
    assert served.notes == []


def test_scrapers_that_wait_are_few(served):
    served.endpoint._not_before_ns = time.monotonic_ns() + 3600 * SECOND
    for _ in range(http_endpoint._SCRAPERS_LIMIT):
        served.connect(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert served.get("/metrics")[0] == 503
    assert served.get("/healthz")[0] == 200


def test_metrics_that_cannot_be_formatted_are_said_once(served, monkeypatch):
    monkeypatch.setattr(http_endpoint, "_GAP_NS", 0)

    def broken(accept):
        raise ValueError("no such thing")

    served.endpoint.exposition = broken
    for _ in range(2):
        assert served.read(served.connect(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")) == b""
        while served.endpoint._is_formatting:
            served.turn()
    assert [kind for kind, _ in served.notes] == ["no_metrics"]
    assert "no such thing" in served.notes[0][1]


@pytest.mark.parametrize(
    "address", ["", "9464", ":9464", "localhost:9464", "127.0.0.1:http", "127.0.0.1:99999", "[::1"]
)
def test_what_is_no_address(address):
    with pytest.raises(ValueError, match="expected ADDRESS:PORT"):
        HttpEndpoint(Poller(), None, None).listen(address)


def test_a_scrape_leaves_the_resident_process_without_the_library():
    imported = "governor.guard_process, governor.http_endpoint, governor.health, governor.tally"
    code = f"import sys, {imported}; print(*sys.modules)"
    import subprocess
    import sys

    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "governor.http_endpoint" in modules
    assert not {"prometheus_client", "governor.metrics", "http.server", "typer", "rich"} & set(modules)
