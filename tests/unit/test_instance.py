"""Where run-time files and state are, also for users without a home, as in containers."""

import os
from pathlib import Path

import pytest

from governor import instance, run_cli


def no_home():
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("environment", "home", "writable", "expected"),
    [
        ({"XDG_STATE_HOME": "{}/state"}, None, True, "{}/state/governor"),
        ({}, "{}/home", True, "{}/home/.local/state/governor"),
        ({}, "{}/home", False, "{}/run/governor/state"),
        ({}, None, True, "{}/run/governor/state"),
    ],
)
def test_state_is_kept_where_it_can_be(monkeypatch, tmp_path, environment, home, writable, expected):
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(tmp_path))
    monkeypatch.setattr(instance, "run_directory", lambda: tmp_path / "run" / "governor")
    monkeypatch.setattr(Path, "home", (lambda: Path(home.format(tmp_path))) if home else no_home)
    usual = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: (mode == os.F_OK or writable) and usual(path, mode))
    assert instance.state_directory() == Path(expected.format(tmp_path))


def test_where_nothing_may_be_written_an_agent_can_still_be_run(monkeypatch):
    def read_only():
        raise OSError(30, "Read-only file system", "/tmp/governor-1000")

    monkeypatch.delenv("XDG_STATE_HOME", raising=False)
    monkeypatch.setattr(instance, "run_directory", read_only)
    monkeypatch.setattr(Path, "home", no_home)
    assert run_cli._log_path(os.getpid()) == run_cli._socket_path(os.getpid()) == ""
