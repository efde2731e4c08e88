"""Where run-time files and state are, also for users without a home, as in containers."""

import os
from pathlib import Path

import pytest

from governor import instance


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
