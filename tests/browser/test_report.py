"""A report in a real browser: nothing is loaded, nothing in it runs, the picture is there, it fits a phone."""

import http.server
import json
import re
import threading
import zlib
from itertools import pairwise
from pathlib import Path

import pytest

from governor import report_html, report_read, report_words

JOURNAL = Path(__file__).parent.parent / "journals" / "burst.ndjson"
NOISE = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
OWNED = "document.title = 'owned'"


@pytest.fixture(scope="module")
def heard():
    """A server on the loopback, and the paths that it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    server.server_close()


def hostile(address):
    """Names as a process may choose them; longer than a comm is, as a journal can be forged."""
    return [
        f'<script>{OWNED}</script><img src="{address}/img" onerror="{OWNED}">',
        f'" onload="{OWNED}" x="</title></svg></style><script src={address}/js></script>',
        f'\'><svg onload="{OWNED}"><style>@import url({address}/css)</style>',
        "</dd></article>\x1b[2J\u202e{{ 7*7 }}{% raw %}",
    ]


def forged(names):
    """The journal of a real burst, with such names wherever a container's words come into it."""
    lines = JOURNAL.read_text()
    told = re.compile(r'"(culprit_comm|reason|text|cgroup|archive_directory|name|directory|target|kernel)":"[^"]*"')
    count = iter(range(1 << 30))

    def swap(found):
        name = names[next(count) % len(names)]
        if found[1] == "target":  # one of them all over, or each line would be of another target
            name = names[0]
        return f'"{found[1]}":{json.dumps(name)}'

    return told.sub(swap, lines).encode().splitlines(keepends=True)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    def make(lines):
        path = tmp_path_factory.mktemp("report") / "report.html"
        path.write_text(report_html.render(report_words.document(report_read.read(lines))))
        return path

    return make


def pixels(png):
    """The colours of an 8-bit RGB or RGBA picture that is not interlaced, with how often each is there."""
    width, height, kind = int.from_bytes(png[16:20]), int.from_bytes(png[20:24]), png[25]
    data, at = b"", 8
    while at < len(png):
        length = int.from_bytes(png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            data += png[at + 8 : at + 8 + length]
        at += 12 + length
    deep = {2: 3, 6: 4}[kind]
    raw, stride = zlib.decompress(data), width * deep
    above, counts = bytearray(stride), {}
    for row in range(height):
        how, line = raw[row * (stride + 1)], bytearray(raw[row * (stride + 1) + 1 : (row + 1) * (stride + 1)])
        for x in range(stride):
            left = line[x - deep] if x >= deep else 0
            corner = above[x - deep] if x >= deep else 0
            if how == 1:
                line[x] = line[x] + left & 255
            elif how == 2:
                line[x] = line[x] + above[x] & 255
            elif how == 3:
                line[x] = line[x] + (left + above[x]) // 2 & 255
            elif how == 4:
                near = left + above[x] - corner
                line[x] = line[x] + min((left, above[x], corner), key=lambda one: abs(near - one)) & 255
        for x in range(0, stride, deep):
            colour = bytes(line[x : x + 3])
            counts[colour] = counts.get(colour, 0) + 1
        above = line
    return counts


def colour(browser, selector):
    """What an area is filled with, as bytes."""
    said = browser.value(f"getComputedStyle(document.querySelector('{selector}')).fill")
    return bytes(int(part) for part in re.findall(r"\d+", said)[:3])


def larger(data, times):
    """The same journal of a container so many times as large."""
    return re.sub(
        rb'(_bytes":|_pages":)(\d{1,15})(?!\d)', lambda found: found[1] + b"%d" % (int(found[2]) * times), data
    )


@pytest.mark.parametrize(
    ("width", "shown", "scheme", "times"),
    [
        (1200, "wide", "light", 1),
        (1200, "wide", "dark", 11),
        (360, "narrow", "light", 700),
        (360, "narrow", "dark", 6),
    ],
)
def test_the_picture_is_there_and_nothing_is_loaded(browser, page, width, shown, scheme, times):
    path = page(larger(JOURNAL.read_bytes(), times).splitlines(keepends=True))
    browser.look(width, 900, scheme)
    browser.open(path.as_uri())
    assert {said["request"]["url"] for said in browser.named("Network.requestWillBeSent")} <= {
        path.as_uri(),
        "data:,",
    }
    assert browser.named(*NOISE) == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    visible = "[...document.querySelectorAll('figure svg')].filter(one => one.getBoundingClientRect().width > 0)"
    assert set(browser.value(f"{visible}.map(one => one.getAttribute('class'))")) == {shown}
    outside = """.flatMap(svg => [...svg.querySelectorAll('text')].filter(text => {
        const [inner, outer] = [text.getBoundingClientRect(), svg.getBoundingClientRect()];
        return inner.left < outer.left - 1 || inner.right > outer.right + 1 || inner.top < outer.top - 1;
    }).map(text => text.textContent))"""
    assert browser.value(visible + outside) == []
    filled = pixels(browser.picture(f"figure svg.{shown}"))
    anonymous = colour(browser, f"svg.{shown} .area.anon")
    assert filled.get(anonymous, 0) > 0.05 * sum(filled.values()), (anonymous, filled)


def test_everything_has_a_name_for_who_cannot_see_it(browser, page):
    browser.look(1200, 900)
    browser.open(page(JOURNAL.read_bytes().splitlines(keepends=True)).as_uri())
    tree = browser.ask("Accessibility.getFullAXTree")["nodes"]
    named = {}
    for node in tree:
        if not node.get("ignored"):
            named.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    pictures = [*named.get("img", []), *named.get("image", [])]
    assert pictures and all("Memory over" in name and "% (" in name for name in pictures), pictures
    assert all(named["heading"]) and all(named["article"][:1]) and all(named["table"])
    headings = browser.value("[...document.querySelectorAll('h1,h2,h3')].map(one => +one.tagName[1])")
    assert headings[0] == 1 and all(after - before <= 1 for before, after in pairwise(headings))


def test_hostile_names_do_not_run_and_call_nobody(browser, page, heard, tmp_path):
    address, asked = heard
    names = hostile(address)
    control = tmp_path / "control.html"
    control.write_text(f"<title>control</title>{names[0]}")  # what they do where they are not escaped
    browser.open(control.as_uri())
    assert browser.value("document.title") == "owned" and asked == ["/img"]
    asked.clear()

    path = page(forged(names))
    browser.open(path.as_uri())
    assert names[0] in browser.value("document.body.innerText")
    assert browser.value("document.title").startswith("governor report: <script>")
    assert asked == [] and browser.named(*NOISE) == []
    assert {said["request"]["url"] for said in browser.named("Network.requestWillBeSent")} <= {
        path.as_uri(),
        "data:,",
    }
    assert (
        browser.value("document.querySelectorAll('script, img, article [onload], link:not([rel=icon])').length") == 0
    )
    assert "\x1b" not in path.read_text() and "\u202e" not in path.read_text()


def test_the_pages_own_policy_would_stop_what_was_not_escaped(browser, page, heard):
    address, asked = heard
    path = page(JOURNAL.read_bytes().splitlines(keepends=True))
    path.write_text(path.read_text().replace("<main>", f"<main>{hostile(address)[0]}"))
    browser.open(path.as_uri())
    assert browser.value("document.title").startswith("governor report") and asked == []
    assert browser.named("Log.entryAdded")
