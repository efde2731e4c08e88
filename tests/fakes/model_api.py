"""A stand-in for the model API that Claude Code speaks to, on loopback: POST /v1/messages as server-sent events.

    model_api.py PORT_FILE REQUESTS_FILE

Writes the port that it listens on to PORT_FILE and a line of JSON for every request to REQUESTS_FILE: the last text
of the user, what came of a tool, and what was answered. A line of the last text decides the answer: "SLOW n" takes n
seconds, "TOOL command" asks for the Bash tool to run the command ("SLOW n TOOL command": after n seconds), "BIG n" is
a list of n MB (the agent takes 300 MB for it), a compaction request gets a summary, all else a short text.
Standard library only.
"""

from __future__ import annotations

import json
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count, islice
from pathlib import Path
from typing import Any

PIECE = 16 << 10  # characters of one event


def last_blocks(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The content of all messages since the model's last: the user's words, a tool's result, and reminders."""
    blocks: list[dict[str, Any]] = []
    for message in reversed(body.get("messages") or []):
        if message.get("role") == "assistant":
            break
        content = message.get("content", "")
        blocks[:0] = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return blocks


def last_text(body: dict[str, Any]) -> str:
    return "\n".join(str(block.get("text", "")) for block in last_blocks(body))


def last_results(body: dict[str, Any]) -> str:
    results = [block.get("content", "") for block in last_blocks(body) if block.get("type") == "tool_result"]
    return "\n".join(each if isinstance(each, str) else json.dumps(each) for each in results)


def wish(body: dict[str, Any]) -> tuple[str, str, str]:
    """Seconds, a command and MB that the newest wish asks for, each "" for none; a tool's result fulfils it."""
    for block in reversed(last_blocks(body) if body.get("tools") else []):
        wished = r"^(?:SLOW ([0-9.]+))? ?(?:TOOL (.+))?(?:BIG ([0-9.]+))?$"
        wishes = re.findall(wished, str(block.get("text", "")), re.MULTILINE)
        if found := [wish for wish in wishes if any(wish)]:
            return found[-1]
        if block.get("type") == "tool_result":
            break
    return "", "", ""


def decide(body: dict[str, Any]) -> tuple[str, dict[str, Any], float]:
    """What to answer: a name for the record, a content block, and the seconds that it takes."""
    text = last_text(body)
    if "summary of the conversation" in text or "<summary>" in text:
        return "compaction", {"type": "text", "text": "<summary>We talked about little.</summary>"}, 0.0
    seconds, command, megabytes = wish(body)
    if command:
        tool = {"type": "tool_use", "id": f"toolu_{time.time_ns()}", "name": "Bash"}
        return "tool", {**tool, "input": {"command": command, "description": "a command"}}, float(seconds or 0)
    if seconds:
        return "slow", {"type": "text", "text": "That took a while."}, float(seconds)
    if megabytes:
        lines = (
            f"- **item {number}** of `a list` with *words* and [a link](http://example/{number})"
            for number in count(1)
        )
        text = "\n".join(islice(lines, int(float(megabytes) * 15_000)))
        return "big", {"type": "text", "text": text}, 0.0
    return "text", {"type": "text", "text": "It is done."}, 0.0


def events(model: str, block: dict[str, Any], wait_s: float) -> Any:
    """The server-sent events of one answer; the wait is in the middle of the stream."""
    usage = {"input_tokens": 1000, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 0, "output_tokens": 1}
    message = {"id": f"msg_{time.time_ns()}", "type": "message", "role": "assistant", "model": model, "content": []}
    message |= {"stop_reason": None, "stop_sequence": None, "usage": usage}
    yield "message_start", {"message": message}
    if block["type"] == "tool_use":
        deltas = [{"type": "input_json_delta", "partial_json": json.dumps(block["input"])}]
        start = {**block, "input": {}}
    else:
        text = block["text"]
        deltas = [{"type": "text_delta", "text": text[at : at + PIECE]} for at in range(0, len(text), PIECE)]
        start = {**block, "text": ""}
    yield "content_block_start", {"index": 0, "content_block": start}
    until = time.monotonic() + wait_s
    while (left := until - time.monotonic()) > 0:
        time.sleep(min(left, 1.0))
        yield "ping", {}
    for delta in deltas:
        yield "content_block_delta", {"index": 0, "delta": delta}
    yield "content_block_stop", {"index": 0}
    reason = "tool_use" if block["type"] == "tool_use" else "end_turn"
    yield "message_delta", {"delta": {"stop_reason": reason, "stop_sequence": None}, "usage": {"output_tokens": 20}}
    yield "message_stop", {}


class Handler(BaseHTTPRequestHandler):
    record: Path

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        if "count_tokens" in self.path:
            self._json({"input_tokens": 1000})
            return
        if not self.path.split("?")[0].endswith("/v1/messages"):
            self._json({})
            return
        name, block, wait_s = decide(body)
        line = {"answer": name, "text": last_text(body)[-2000:], "result": last_results(body)[-2000:]}
        with self.record.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if not body.get("stream"):
            self._json(
                {
                    "id": "msg_1",
                    "type": "message",
                    "role": "assistant",
                    "model": body.get("model", ""),
                    "content": [block],
                    "stop_reason": "end_turn",
                    "stop_sequence": None,
                    "usage": {"input_tokens": 10, "output_tokens": 10},
                }
            )
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for kind, data in events(body.get("model", ""), block, wait_s):
                self.wfile.write(f"event: {kind}\ndata: {json.dumps({'type': kind, **data})}\n\n".encode())
                self.wfile.flush()
        except OSError:
            return  # the agent went away, or interrupted the turn

    def do_GET(self) -> None:
        self._json({})

    do_HEAD = do_GET

    def _json(self, value: dict[str, Any]) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        return


if __name__ == "__main__":
    Handler.record = Path(sys.argv[2])
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Path(sys.argv[1]).write_text(str(server.server_address[1]))
    server.serve_forever()
