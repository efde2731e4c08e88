"""Discovery on a real cgroup tree: kernfs tells a watch less than other file systems do."""

import os
import select
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from governor import cgroup
from governor.discovery import Appeared, Discovery, Gone

pytestmark = pytest.mark.any_kernel

UID = "1d2e-4f30-a1b2-c3d4e5f60718"
COUNT, PER_SECOND, AT_ONCE = 1000, 50, 100  # each lives two seconds
# Another process makes pods with a container each and removes them again, and says when it made which.
CHURN = f"""
import os, struct, sys, time
root, there, began = sys.argv[1], [], time.monotonic()
def remove(pod, path):
    os.rmdir(path)
    os.rmdir(pod)
for number in range({COUNT}):
    pod = f"{{root}}/burstable/pod{{number:08x}}-{UID}"
    path = f"{{pod}}/{{number:064x}}"
    os.mkdir(pod)
    begin_ns = time.monotonic_ns()
    os.mkdir(path)
    os.write(1, struct.pack("qq", number, begin_ns))
    there.append((pod, path))
    if len(there) > {AT_ONCE}:
        remove(*there.pop(0))
    time.sleep(max(0, began + number / {PER_SECOND} - time.monotonic()))
for each in there:
    remove(*each)
"""


def test_fifty_a_second_none_missed_no_watch_left():
    kubepods = Path(cgroup.ROOT, "kubepods")
    for path in (kubepods, kubepods / "burstable"):
        path.mkdir(exist_ok=True)
    found = Discovery(cgroup.ROOT, 0)
    found.drain(0)
    watches = found.watches
    appeared, gone = {}, 0
    process = subprocess.Popen([sys.executable, "-c", CHURN, str(kubepods)], stdout=subprocess.PIPE)
    ended = False
    while not ended:
        ended = process.poll() is not None
        select.select([found.fd], [], [], 0.1)
        for event in found.drain(1):  # the clock stands still: no rescan helps
            if isinstance(event, Appeared):
                appeared[int(event.place.container_id, 16)] = time.monotonic_ns()
            else:
                assert isinstance(event, Gone)
                gone += 1
    made = dict(struct.iter_unpack("qq", process.stdout.read()))
    assert process.returncode == 0
    assert appeared.keys() == made.keys()
    assert gone == len(made) == COUNT
    waited_ms = sorted((appeared[number] - made[number]) / 1e6 for number in made)
    print(
        f"\nmkdir to seen, ms: p50 {waited_ms[COUNT // 2]:.2f} p99 {waited_ms[COUNT * 99 // 100]:.2f} "
        f"max {waited_ms[-1]:.2f}"
    )
    left = Path(f"/proc/self/fdinfo/{found.fd}").read_text().count("inotify wd:")
    assert left == found.watches == watches
    found.close()
    for path in (kubepods / "burstable", kubepods):
        os.rmdir(path)
