"""The examples of governor.agent, in the README and in its modules' docstrings, run as they stand."""

import ast
import asyncio
import http.server
import inspect
import json
import re
import textwrap
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

import governor.agent

PACKAGE = Path(governor.agent.__file__).parent
README = PACKAGE.parent.parent / "README.md"
ROWS = [{"id": number} for number in range(250)]
BODY = json.dumps({"rows": ROWS}).encode()
ANSWER = b"data: Hello\n\ndata: world\n\n"


class Cleared(Exception):
    """Where an example would go on for ever."""


class Server(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(BODY)

    def do_POST(self):
        assert json.loads(self.rfile.read(int(self.headers["Content-Length"]))) == {"stream": True}
        self.answer(ANSWER)

    def answer(self, body):
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples speak of and do not make; `said` is what came out."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEMORY_LIMIT_MB", "1")  # so that a watch has something to say at once
    (tmp_path / "export.json").write_bytes(BODY)
    said = []

    def clear():
        raise Cleared

    async def summarise(_history):
        pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield {
            **{name: getattr(governor.agent, name) for name in governor.agent.__all__},
            "said": said,
            "url": f"http://127.0.0.1:{server.server_address[1]}/",
            "request": {"stream": True},
            "question": "why?",
            "turn_is_running": True,
            "history": None,
            "summarise": summarise,
            "pressure": governor.agent.MemoryPressure(limit_bytes=1 << 50, governor=False),
            "cache": SimpleNamespace(clear=clear),
            "agent": SimpleNamespace(warm_up=list, work=list),
            "app": None,
            **dict.fromkeys(("embed", "show", "print"), said.append),
        }
        server.shutdown()


def of_readme():
    text = README.read_text().partition("\n## From inside a Python agent\n")[2].partition("\n## ")[0]
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def of_docstring(module):
    """Its indented blocks."""
    docstring = inspect.cleandoc(ast.get_docstring(ast.parse((PACKAGE / f"{module}.py").read_text())))
    blocks = re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", docstring, re.MULTILINE)
    return [textwrap.dedent(block) for block in blocks]


MODULES = [path.stem for path in sorted(PACKAGE.glob("*.py"))]
EXAMPLES = {f"README {place}": text for place, text in enumerate(of_readme(), 1)} | {
    module: text for module in MODULES for text in of_docstring(module)
}
# What each says to its stand-ins, by the bodies of the server above; None: it goes on until the cache is cleared.
SAID = {
    "README 1": None,
    "README 2": [],
    "README 3": [ROWS[:100], ROWS[100:200], ROWS[200:], "Hello", "world"],
    "payloads": [*ROWS, ROWS[:100], ROWS[100:200], ROWS[200:]],
    "pressure": None,
    "streaming": ["Hello", "world"],
}


def run(example, names):
    """As a script would with `await` at its top level (`python -m asyncio`)."""
    code = compile(EXAMPLES[example], example, "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    waiting = eval(code, names)
    if waiting is not None:
        asyncio.run(asyncio.wait_for(waiting, 60))


def test_every_example_is_known():
    assert EXAMPLES.keys() == {*SAID, "profiling"}


@pytest.mark.parametrize("example", SAID)
def test_what_an_example_says(example, names):
    with pytest.raises(Cleared) if SAID[example] is None else nullcontext():
        run(example, names)
    assert names["said"] == (SAID[example] or [])
    downloaded = Path("corpus.bin")
    assert downloaded.exists() == ("download(" in EXAMPLES[example])
    assert not downloaded.exists() or downloaded.read_bytes() == BODY


def test_the_hook_of_the_readme(names):
    with pytest.raises(Cleared):
        run("README 1", names)
    with pytest.raises(governor.agent.NotNow, match="in the middle of a turn"):
        asyncio.run(names["compact"](None))
    names["turn_is_running"] = False
    assert asyncio.run(names["compact"](None)) == "summarised 40 turns"
    with pytest.raises(governor.agent.Overloaded):
        asyncio.run(names["embed"]("a document"))


def test_the_report_of_the_profiler(names):
    run("profiling", names)
    [report] = names["said"]
    assert "most in use:" in report
