"""`governor run` at a desk: in sessions of logind, as root and as an ordinary user."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
from conftest import CGROUPS, WIRING, wait_for

DESK = WIRING / "desk"


class Session:
    """A command in a login session of a user, as pam_systemd makes it."""

    def __init__(self, tmp_path, user, *words):
        self.home = Path(f"~{user}").expanduser()
        self.log_path = tmp_path / "log"
        login = [
            "systemd-run",
            "--quiet",
            "--pipe",
            "--wait",
            "--collect",
            "-p",
            "PAMName=login",
            "-p",
            f"User={user}",
        ]
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [*login, "-p", f"WorkingDirectory={self.home}", *map(str, words)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )

    def log(self):
        return self.log_path.read_text()

    def await_log(self, *texts):
        try:
            wait_for(lambda: all(text in self.log() for text in texts))
        except AssertionError:
            raise AssertionError(f"found not all of {texts} in:\n{self.log()}") from None


@pytest.fixture
def session(tmp_path):
    made = []

    def start(*words):
        made.append(Session(tmp_path, *words))
        return made[-1]

    yield start
    for one in made:
        print(one.log())
        if one.process.poll() is None:
            for pid in runs():
                os.kill(pid, signal.SIGTERM)
        one.process.wait(timeout=60)


def runs():
    comms = Path("/proc").glob("[0-9]*/comm")
    return [int(comm.parent.name) for comm in comms if comm.exists() and comm.read_text() == "governor-run\n"]


@pytest.mark.parametrize(
    ("user", "where"),
    [("root", "user.slice/user-0.slice"), ("agent", "user.slice/user-1500.slice/user@1500.service/app.slice")],
)
def test_in_a_memcg_of_its_own_it_is_frozen(session, user, where):
    one = session(user, DESK, "200MiB", "my-agent")
    one.await_log("ready", "brake: freeze; limit: its own limit")
    [governor] = runs()
    [made] = CGROUPS.glob(f"**/governor-run-{governor}")
    assert made.parent == CGROUPS / where
    assert (made / "memory.max").read_text() == f"{200 << 20}\n"
    (one.home / "begin").touch()
    assert one.process.wait(timeout=90) == 143, one.log()
    assert "braked: frozen" in one.log()
    assert (one.home / ".claude/projects/p/s.jsonl.saved").exists()
    assert not made.exists()


def test_where_none_may_be_made_it_says_so_and_touches_only_the_subtree(session):
    one = session("agent", "governor", "run", "--memory-max", "200MiB", "--", "my-agent")
    one.await_log("ready", "brake: stop; limit: no limit anywhere: what the machine has available")
    assert "no memcg for --memory-max: " in one.log()
    assert "systemd-run --user --scope" in one.log()
    [governor] = runs()
    assert "/session-" in Path(f"/proc/{governor}/cgroup").read_text()
    os.kill(governor, signal.SIGTERM)
    assert one.process.wait(timeout=60) == 143, one.log()
