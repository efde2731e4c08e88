"""A headless Chromium, driven over its own pipe (the DevTools protocol, JSON ended by a zero byte)."""

import base64
import fcntl
import json
import os
import shutil
import subprocess
import time

import pytest

PATIENCE_S = 20
OPTIONS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    "--remote-debugging-pipe",
]


class Browser:
    """One page. `events` has all that it said, by method."""

    def __init__(self, directory):
        there, self._commands = os.pipe()
        self._answers, back = os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 20) for fd in (there, back)]

        def wire():
            os.dup2(high[0], 3)
            os.dup2(high[1], 4)

        command = [shutil.which("chromium"), *OPTIONS, f"--user-data-dir={directory}"]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "stdin": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=wire, close_fds=False, **quiet)
        for fd in (there, back, *high):
            os.close(fd)
        os.set_blocking(self._answers, False)
        self._unread, self._number, self._session = b"", 0, None
        self.events = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            self.ask(f"{domain}.enable")

    def ask(self, method, **parameters):
        """The answer to one command; what else is said meanwhile goes into `events`."""
        self._number += 1
        command = {"id": self._number, "method": method, "params": parameters}
        command |= {"sessionId": self._session} if self._session else {}
        os.write(self._commands, json.dumps(command).encode() + b"\0")
        answer = self._until(lambda said: said.get("id") == self._number, method)
        assert "error" not in answer, (method, answer)
        return answer["result"]

    def open(self, url):
        """Load it, and wait until it is there with all that it wants."""
        self.events.clear()
        self.ask("Page.navigate", url=url)
        if not self.named("Page.loadEventFired"):
            self._until(lambda said: said.get("method") == "Page.loadEventFired", url)
        self.value("new Promise(done => setTimeout(done, 200))")

    def value(self, expression):
        """What a script of ours says of the page."""
        said = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in said, said
        return said["result"].get("value")

    def named(self, *methods):
        return [said["params"] for said in self.events if said["method"] in methods]

    def look(self, width, height, scheme="light"):
        """As a window of that size shows it."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def picture(self, selector):
        """A small PNG of the first such element."""
        box = self.value(f"document.querySelector('{selector}').getBoundingClientRect().toJSON()")
        top = self.value("window.scrollY")
        clip = {"x": box["x"], "y": box["y"] + top, "width": box["width"], "height": box["height"], "scale": 0.5}
        shot = self.ask("Page.captureScreenshot", clip=clip, captureBeyondViewport=True)
        return base64.b64decode(shot["data"])

    def close(self):
        self._process.terminate()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._commands)
        os.close(self._answers)

    def _until(self, is_it, what):
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            whole, zero, rest = self._unread.partition(b"\0")
            if not zero:
                try:
                    data = os.read(self._answers, 1 << 20)
                except BlockingIOError:
                    time.sleep(0.005)
                    continue
                assert data, f"chromium ended while it was asked for {what}"
                self._unread += data
                continue
            self._unread = rest
            said = json.loads(whole)
            if "method" in said:
                self.events.append(said)
            if is_it(said):
                return said
        raise AssertionError(f"chromium says nothing to {what}")


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """Chromium is a system package, which scripts/test installs."""
    assert shutil.which("chromium"), "found no chromium, expected Debian's package: apt-get install chromium"
    one = Browser(tmp_path_factory.mktemp("chromium"))
    yield one
    one.close()
