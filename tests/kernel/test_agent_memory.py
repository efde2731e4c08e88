"""What governor.agent does in a container that is too small for it all; then, in the same process, the naive way."""

import hashlib
import http.server
import json
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest
from conftest import MIB

from tests.waiting import wait_for

pytestmark = pytest.mark.any_kernel

LIMIT_MIB = 32
TURNS = 20_000
BLOCK = bytes(range(256)) * 4096

ITEMS = """
import sys
from governor.agent.payloads import items
found = sum(item["id"] for item in items(sys.argv[1]))
print(found, flush=True)
sys.stdin.readline()
import json
json.load(open(sys.argv[1], "rb"))
"""

DOWNLOAD = """
import asyncio, sys
from governor.agent.streaming import download
found = asyncio.run(download(sys.argv[1], sys.argv[2]))
print(found.size_bytes, found.requests, found.resumed_bytes, flush=True)
sys.stdin.readline()
import httpx
httpx.get(sys.argv[1]).content
"""

STREAM = """
import asyncio, sys
from governor.agent.payloads import items_async
from governor.agent.streaming import chunks
async def total():
    found = 0
    async for item in items_async(chunks(sys.argv[1])):
        found += item["id"]
    return found
print(asyncio.run(total()), flush=True)
sys.stdin.readline()
import httpx
httpx.get(sys.argv[1]).content
"""

TALK = f"""
import sys
from governor.agent.history import BoundedHistory
turns = lambda: (("assistant" if i % 2 else "user", f"{{i:05}}" * 400) for i in range({TURNS}))
most_bytes = 0
with BoundedHistory(8 << 20, spill=sys.argv[1]) as history:
    for role, content in turns():
        history.append(role, content)
        most_bytes = max(most_bytes, history.size_bytes)
    read = [turn.number for turn in history.spilled()]
    assert read == list(range(len(read))) and len(read) + len(history) == {TURNS}
print(most_bytes, len(history), flush=True)
sys.stdin.readline()
naive = [{{"role": role, "content": content}} for role, content in turns()]
"""


ITEM = json.dumps({"id": 7, "text": "plain words and größere " * 1000}).encode()
BODIES = {
    "/corpus": BLOCK * 128,
    "/small": BLOCK,
    "/array": b"[" + b",".join([ITEM] * (33 * MIB // len(ITEM))) + b"]",
    "/none": b"[]",
}
cuts = {"/corpus": [80 * MIB]}  # where an answer ends, the first time


class Server(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        body = BODIES[self.path]
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        end = cuts[self.path].pop() if cuts.get(self.path) else len(body)
        self.send_response(206 if begin else 200)
        self.send_header("ETag", '"one"')
        self.send_header("Content-Length", str(len(body) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        with suppress(OSError):  # its reader was killed
            self.wfile.write(memoryview(body)[begin:end])
        self.close_connection = True

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    """On loopback, in this process: outside the container."""
    served = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=served.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{served.server_address[1]}"
    served.shutdown()
    thread.join()
    served.server_close()


def bounded(script):
    """The part of a script before the naive way."""
    return script.partition("sys.stdin")[0]


def compiled(script, *arguments):
    """Run outside on little, so that all that it imports is compiled: not in 32 MiB."""
    subprocess.run([sys.executable, "-c", bounded(script), *arguments], check=True)


def both_ways(container, script, *arguments, meanwhile=lambda _: None):
    """What the script says of the bounded way; asserts that the kernel lets it, and kills the naive one."""
    pod = container(LIMIT_MIB)
    process = pod.start(sys.executable, "-c", script, *arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    meanwhile(pod)
    said = process.stdout.readline()
    assert said and pod.events()["oom_kill"] == 0, of_its_end(pod, process)
    print(f"peak {int(pod.read('memory.peak')) / MIB:.1f} MiB with cache, unreclaimable ratio now {pod.ratio():.2f}")
    process.stdin.write("\n")
    process.stdin.close()
    assert process.wait(timeout=120) == -9
    assert pod.events()["oom_kill"] >= 1
    return [int(word) for word in said.split()]


def of_its_end(pod, process):
    """What there is to know: after an OOM kill the kernel's log has what was held, memory.stat what is left."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5)
    log = subprocess.run(["dmesg"], capture_output=True, text=True).stdout.rpartition("invoked oom-killer")[2]
    return "\n".join(
        [
            f"exit status {process.poll()}, {pod.events()}, peak {int(pod.read('memory.peak')):,} bytes",
            *("memory.stat:", pod.read("memory.stat"), "the last OOM in the kernel's log:", log[:8000]),
        ]
    )


def test_a_json_array_of_64_mib(container, tmp_path):
    path, count = tmp_path / "array.json", 0
    text = json.dumps('größer 🙂 [\\] "quoted" and many plain words ' * 400, ensure_ascii=False)
    with path.open("w") as file:
        while file.tell() < 64 * MIB:
            file.write(f"{',' if count else '['}" + f'{{"id": {count}, "text": {text}, "vector": [1.5, 2.5]}}')
            count += 1
        file.write("]")
    assert both_ways(container, ITEMS, path) == [count * (count - 1) // 2]
    path.unlink()


def test_a_download_of_128_mib(container, server, tmp_path):
    path = tmp_path / "corpus"
    held_bytes = []

    def nobody_reads(pod):
        """Frozen for a moment: the socket goes on receiving."""
        part = tmp_path / ".corpus.part"
        wait_for(lambda: not pod.read("cgroup.procs") or (part.exists() and part.stat().st_size > 40 * MIB), 60)
        pod.write("cgroup.freeze", 1)
        time.sleep(1)
        held_bytes.append(int(dict(line.split() for line in pod.read("memory.stat").splitlines())["sock"]))
        pod.write("cgroup.freeze", 0)

    compiled(DOWNLOAD, f"{server}/small", tmp_path / "small")
    said = both_ways(container, DOWNLOAD, f"{server}/corpus", path, meanwhile=nobody_reads)
    assert said == [128 * MIB, 2, 0]
    print(f"{held_bytes[0] / MIB:.2f} MiB in the socket while nobody read")
    rmem_max_bytes = int(Path("/proc/sys/net/core/rmem_max").read_text())
    most_bytes = 2 * min(LIMIT_MIB * MIB // 32, rmem_max_bytes)
    assert 0 < held_bytes[0] <= most_bytes + MIB // 4  # its last packet may be over it
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == hashlib.sha256(BODIES["/corpus"]).digest()
    path.unlink()


def test_a_streamed_array_of_33_mib_through_the_spool(container, server):
    compiled(STREAM, f"{server}/none")
    assert both_ways(container, STREAM, f"{server}/array") == [7 * (33 * MIB // len(ITEM))]


def test_a_conversation_of_20000_turns(container, tmp_path):
    most_bytes, left = both_ways(container, TALK, tmp_path / "spill")
    assert 6 * MIB < most_bytes <= 8 * MIB
    assert 2000 < left < 5000
