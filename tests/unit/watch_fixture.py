"""A cgroup v2 tree of plain files, and pictures that are always the same; for the tests of `governor watch`."""

import time

from governor.attribution import Held
from governor.cgroup import MemoryState
from governor.watch_model import NOT_YET, Entry, Model
from governor.watch_sample import Sample, Stalls

MIB, SECOND = 1 << 20, 1_000_000_000
NOON_S = time.mktime((2026, 1, 2, 12, 0, 0, 0, 0, -1))


def make_memcg(path, usage_mib=60, limit_mib=128, anon_mib=40, file_mib=10, pids=(), **files):
    path.mkdir(parents=True, exist_ok=True)
    written = {
        "memory.current": usage_mib * MIB,
        "memory.max": limit_mib * MIB if limit_mib else "max",
        "memory.high": "max",
        "memory.stat": f"anon {anon_mib * MIB}\nshmem 0\ninactive_file {file_mib * MIB}\nactive_file 0\n",
        "memory.events": "low 0\nhigh 0\nmax 3\noom 0\noom_kill 0\n",
        "memory.pressure": "some avg10=1.50 avg60=0 total=9000\nfull avg10=0.50 avg60=0 total=4000\n",
        "cgroup.events": "populated 1\nfrozen 0\n",
        "cgroup.procs": "".join(f"{pid}\n" for pid in pids),
        **{name.replace("_", "."): text for name, text in files.items()},
    }
    for name, text in written.items():
        (path / name).write_text(str(text))
    return path


def sample(second, held_mib, limit_mib=128, file_mib=6, **fields):
    memory = MemoryState(
        (held_mib + file_mib) * MIB, limit_mib * MIB if limit_mib else -1, (held_mib - 2) * MIB, file_mib * MIB, 0
    )
    return Sample(second * SECOND, memory, limit="its own limit", **fields)


def governed_burst():
    """A pod that burst for ten seconds and is held; a second one before, without a governor, is in `ungoverned`."""
    model = Model(
        "agents/claude-0/agent", "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-3f.scope"
    )
    model.untold = NOT_YET
    model.source = "governor 4242"
    model.note(Entry(NOON_S, "source", "governor 4242"))
    processes = [
        Held(4822, "python3", 81 * MIB, 9 * MIB, False, True),
        Held(4711, "claude", 30 * MIB, 1 << 17, True, False),
        Held(4713, "bash", 1 * MIB, 0, False, True),
    ]
    for second in range(1, 11):
        stalls = Stalls(0.02 * second, 0.01 * second, 2000 * second, 900 * second)
        events = {"high": 0, "max": 4 * second if second > 8 else 32, "oom": 0, "oom_kill": 0}
        model.see(sample(second, 20 + 10 * second, stalls=stalls, events=events, frozen=second == 10), processes)
    model.govern(standing())
    model.note(Entry(NOON_S + 7, "crossing", "rising to compact: 70.3 % of max", {"rising": True}))
    model.note(Entry(NOON_S + 9, "braked", "braked: frozen 0.61 ms after the crossing at 90.0 % of 128 MiB"))
    warning = (
        "warning: the agent is ended in 5 s; to forbid it: governor hold 10m; why: braked at 92.4 % of max, again"
    )
    model.note(Entry(NOON_S + 9, "warning", warning))
    return model


def standing(**other):
    return {
        "cgroup": "/sys/fs/cgroup/kubepods.slice/kubepods-pod1.slice/cri-containerd-3f.scope",
        "cgroup_id": 77,
        "namespace": "agents",
        "pod": "claude-0",
        "container": "agent",
        "policy": "default",
        "dry_run": False,
        "agent_pid": 4711,
        "source": "bpf",
        "brake": "freeze",
        "memory": {"unreclaimable_ratio": 0.9375, "max_bytes": 128 * MIB, "unreclaimable_bytes": 120 * MIB},
        "phase": "held",
        "in_episode": True,
        "frozen_for_ms": 412,
        "tiers": {"compact": "delivered", "recycle": "none", "clear": "none"},
        "decided": {"what": "archive", "reason": "braked at 90.0 % of max", "ago_s": 0},
        "levels": {"compact": 0.7, "arm": 0.85, "brake": 0.9, "last": 0.97},
        "freed_bytes": {"shed": 210 * MIB},
        **other,
    }
