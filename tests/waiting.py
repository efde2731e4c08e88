"""Waiting for what other processes do."""

import time


def wait_for(condition, seconds=30.0, what="the condition"):
    """Poll until the condition is true and return its value; fail after `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError(f"{what} did not come within {seconds} s")
