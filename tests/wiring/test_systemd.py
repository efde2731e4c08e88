"""governor as a service of systemd: in front of an agent, and beside a service that stays as it is."""

import shutil
from pathlib import Path

import pytest
from conftest import WIRING, archived, checked, sh, wait_for

UNITS = Path("/etc/systemd/system")
HOME = Path("/home/agent")
PLAIN = """
[Service]
User=agent
MemoryMax=256M
ExecStart=/usr/local/bin/my-agent
Restart=on-failure
[Install]
WantedBy=multi-user.target
"""


def shown(unit, name):
    return checked("systemctl", "show", "--value", "-p", name, unit).strip()


def log(unit):
    return sh("journalctl", "--quiet", "--output", "cat", "--unit", unit).stdout


@pytest.fixture
def unit():
    """Installs a unit, and takes it away again."""
    made = []
    shutil.rmtree(HOME / ".claude", ignore_errors=True)  # of the desk's user

    def install(name, source):
        if isinstance(source, Path):
            shutil.copy(source, UNITS / name.replace("plain.", "."))
        else:
            (UNITS / name).write_text(source)
        made.append(name)
        checked("systemctl", "daemon-reload")

    yield install
    for name in reversed(made):
        print(log(name))
        checked("systemctl", "disable", "--now", name)
    for name in made:
        (UNITS / name.replace("plain.", ".")).unlink(missing_ok=True)
    shutil.rmtree(HOME / ".local", ignore_errors=True)
    shutil.rmtree(HOME / ".claude", ignore_errors=True)


def protected(unit, times):
    """Whether the guard that was started then protects."""
    before = log(unit).split("reflex runs as process")
    return len(before) == times + 1 and "protecting" in before[-1]


def ready(unit, times):
    return f"\n{log(unit)}".count("\nready\n") == times


def saved():
    path = HOME / ".claude/projects/p/s.jsonl.saved"
    return path.read_text().count("saved") if path.exists() else 0


def test_in_front_of_an_agent_it_comes_back_after_a_burst_and_stops_cleanly(unit):
    unit("agent.service", WIRING / "agent.service")
    checked("systemctl", "start", "agent.service")
    wait_for(lambda: ready("agent", 1) and protected("agent", 1), what="protection")
    assert "brake: stop; limit: its own limit" in log("agent")
    assert list(Path("/run/governor-agent/governor").glob("memcg-*.sock"))
    (HOME / "begin").touch()
    wait_for(lambda: shown("agent", "NRestarts") == "1", what="a restart")
    assert saved() == 1
    assert archived(HOME)
    wait_for(lambda: ready("agent", 2) and protected("agent", 2), what="protection again")
    checked("systemctl", "stop", "agent.service")
    assert (shown("agent", "ActiveState"), shown("agent", "Result")) == ("inactive", "success")
    assert saved() == 2
    assert "OOM killer" not in log("agent")


def test_beside_a_service_it_freezes_and_comes_and_goes_with_it(unit):
    unit("plain.service", PLAIN)
    unit("governor-guard@plain.service", WIRING / "governor-guard@.service")
    checked("systemctl", "enable", "--now", "plain.service", "governor-guard@plain.service")
    guard = "governor-guard@plain"
    wait_for(lambda: "protecting: BPF" in log(guard), 200, "BPF")
    assert "brake: freeze; limit: its own limit" in log(guard)
    (HOME / "begin").touch()
    wait_for(lambda: shown("plain", "NRestarts") == "1", what="a restart")
    assert "braked: frozen" in log(guard)
    assert saved() == 1
    assert [each for each in archived(Path("/root")) if str(HOME) in each.read_text()]
    wait_for(lambda: protected(guard, 2), what="the next guard")
    checked("systemctl", "stop", "plain.service")
    wait_for(lambda: shown(guard, "ActiveState") == "inactive", what="the end of the guard")
    assert shown(guard, "Result") == "success"
