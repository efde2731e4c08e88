"""Hypothesis without deadlines: how long an example takes says more about the machine than about the code. And usual
signals: what started the tests (nohup, a shell with &) may ignore some, and what is ignored stays so in children.
"""

import signal

import pytest
from hypothesis import settings

from governor import run_memcg

settings.register_profile("governor", deadline=None)
settings.load_profile("governor")
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture
def memcg():
    """Where governor can make a memcg for its agent; elsewhere the test is skipped."""
    try:
        run_memcg.remove(run_memcg.make(64 << 20))
    except run_memcg.NoMemcg as error:
        pytest.skip(str(error))
