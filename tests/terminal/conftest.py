"""Hypothesis without deadlines: how long an example takes says more about the machine than about the code. And usual
signals: what started the tests (nohup, a shell with &) may ignore some, and what is ignored stays so in children.
"""

import signal

from hypothesis import settings

settings.register_profile("governor", deadline=None)
settings.load_profile("governor")
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
