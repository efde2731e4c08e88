"""The program under test: scripts/agents installs it."""

import os

import pytest


@pytest.fixture(scope="session")
def program():
    if given := os.environ.get("GOVERNOR_CLAUDE"):
        return given
    return pytest.skip("GOVERNOR_CLAUDE names no Claude Code: use scripts/agents, which installs it")
