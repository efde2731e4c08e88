"""Hypothesis without deadlines: how long an example takes says more about the machine than about the code."""

import os

import pytest
from hypothesis import settings

settings.register_profile("governor", deadline=None)
settings.load_profile("governor")


@pytest.fixture
def governor_is_elsewhere(monkeypatch):
    """The processes that a test starts are not governor's children, which are spared."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
