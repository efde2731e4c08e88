"""`governor daemon` with one, a hundred and a thousand containers: what each further one costs, and what leaks.

Memcgs need no process in them to be governed. One burster goes up and down over the first level, slowly enough not to
be braked; agents that burst all at once come last.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benches.common import AGENT, MIB, at, loaded, table, where
from benches.footprint import resident_kib
from benches.kubepods import INSTANCE, Daemon, Kubepods, Pod, lines

QUIET_MIB, BURST_MIB = 4096, 64
ADOPTED_ONE_BY_ONE = 20
RISE_FROM, RISE_TO, STEP_BYTES, STEP_S = 0.60, 0.76, 256 << 10, 0.008  # 32 MB/s: half a second to max
CHURN_PER_S, CHURN_LIFE_S = 50, 5.0
RISING = 1


def node(quick: bool) -> None:
    from governor import pins, probe

    has_bpf = probe.decide(probe.probe()).source == "bpf"
    print(f"{where()}; {'BPF' if has_bpf else 'polled: no BPF here'}\n", flush=True)
    if has_bpf:
        loaded(INSTANCE)
    try:
        with tempfile.TemporaryDirectory(prefix="governor-bench-") as scratch:
            kubepods = Kubepods(Path(scratch))
            try:
                measured(Path(scratch), kubepods, quick)
            finally:
                kubepods.close()
    finally:
        if has_bpf:
            pins.unload(INSTANCE)


def measured(scratch: Path, kubepods: Kubepods, quick: bool) -> None:
    daemon = Daemon(scratch, kubepods.host)
    try:
        head = ["memcgs", "governor RSS, KiB", "reflex", "governor CPU, %", "reflex", "adopted, ms p50", "p99"]
        head += ["all adopted, s", "crossings", "to callback, ms p50", "p99", "descriptors", "psimon"]
        rows = []
        for count in (1, 100) if quick else (1, 100, 1000):
            rows.append(costs(daemon, kubepods, count, idle_s=10 if quick else 30, crossings=10 if quick else 40))
            print(", ".join(f"{name}: {value}" for name, value in zip(head, rows[-1], strict=True)), flush=True)
        print()
        table(head, rows)
        for pod in kubepods.pods[10:]:
            kubepods.remove(pod)
        churn(daemon, kubepods, 20 if quick else 60)
        bursts(daemon, kubepods, scratch, 10 if quick else 30)
        told_of = daemon.node_lines("fault", "not_governed", "busy", "dropped", "reflex_gone", "reflex_silent")
        for line in told_of[:20]:
            print(f"{line['kind']}: {line['text']}")
        print(f"{len(told_of)} lines of faults, reflex's end or containers not governed")
    finally:
        daemon.stop()


# What one more costs


def costs(daemon: Daemon, kubepods: Kubepods, count: int, idle_s: float, crossings: int) -> list[object]:
    """One row of the table."""
    begun_s = time.monotonic()
    burst = kubepods.make(BURST_MIB)
    while len(kubepods.pods) < count:
        kubepods.make(QUIET_MIB)
    daemon.protected(kubepods.pods)
    all_s = time.monotonic() - begun_s
    adopted = []
    for _ in range(ADOPTED_ONE_BY_ONE):
        one = kubepods.make(QUIET_MIB)
        adopted += daemon.protected([one]).values()
        kubepods.remove(one)
    adopted.sort()
    settled(daemon)
    before = {name: cpu_ns(pid) for name, pid in daemon.pids.items()}
    since_ns = time.monotonic_ns()
    time.sleep(idle_s)
    passed_ns = time.monotonic_ns() - since_ns
    spent = {name: f"{100 * (cpu_ns(pid) - before[name]) / passed_ns:.2f}" for name, pid in daemon.pids.items()}
    heard = heard_ms(daemon, burst, kubepods.v1, crossings)
    kubepods.remove(burst)
    resident = {name: resident_kib(pid)[0] for name, pid in daemon.pids.items()}
    return [
        *(count, resident["governor"], resident["reflex"], spent["governor"], spent["reflex"]),
        *(f"{at(adopted, 0.5):.0f}", f"{at(adopted, 0.99):.0f}", f"{all_s:.1f}", f"{len(heard)} of {crossings}"),
        *((f"{at(heard, 0.5):.2f}", f"{at(heard, 0.99):.2f}") if heard else ("", "")),
        " + ".join(map(str, open_files(daemon).values())),
        psi_threads(),
    ]


def settled(daemon: Daemon) -> None:
    """Wait until nothing is opened or closed any more."""
    before, until = (), time.monotonic() + 60
    while (now := tuple(open_files(daemon).values())) != before and time.monotonic() < until:
        before = now
        time.sleep(5)


def entries(directory: Path) -> int:
    return sum(1 for _ in directory.iterdir())


def open_files(daemon: Daemon) -> dict[str, int]:
    return {name: entries(Path(f"/proc/{pid}/fd")) for name, pid in daemon.pids.items()}


def cpu_ns(pid: int) -> int:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0])


def psi_threads() -> int:
    """Threads of the kernel, one for each memcg with a PSI trigger of a short window (psi_trigger_create)."""
    found = 0
    for process in Path("/proc").glob("[0-9]*/comm"):
        try:
            found += process.read_text().startswith("psimon")
        except OSError:
            continue
    return found


def heard_ms(daemon: Daemon, pod: Pod, v1: bool, crossings: int) -> list[float]:
    """From the kernel's stamp of each crossing to reflex's callback, sorted."""
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write_fd)
        (pod.memcg / "cgroup.procs").write_text(str(os.getpid()))
        rise_and_fall(pod.memcg / ("memory.usage_in_bytes" if v1 else "memory.current"), crossings)
        os._exit(0)
    os.close(write_fd)
    os.close(read_fd)
    os.waitpid(pid, 0)
    time.sleep(2)
    told = lines(daemon.journal(pod), ("crossing",))
    rising = [line for line in told if line["record"]["flags"] & RISING and line["record"]["level"] == 1]
    return sorted((line["called_back_ns"] - line["record"]["ktime_ns"]) / 1e6 for line in rising)


def rise_and_fall(usage: Path, times: int) -> None:
    """Over the first level and under its release level, so often."""
    libc = ctypes.CDLL(None)
    libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    limit_bytes = BURST_MIB * MIB
    libc.prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: a huge page is eight steps at once
    below = mmap.mmap(-1, limit_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(below))
    libc.memset(base, 1, int(RISE_FROM * limit_bytes) - int(usage.read_text()))
    for _ in range(times):
        above = mmap.mmap(-1, limit_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = ctypes.c_char.from_buffer(above)
        for offset in range(0, int((RISE_TO - RISE_FROM) * limit_bytes), STEP_BYTES):
            libc.memset(ctypes.addressof(view) + offset, 1, STEP_BYTES)
            time.sleep(STEP_S)
        del view
        above.close()
        time.sleep(0.3)


# Come and go


def churn(daemon: Daemon, kubepods: Kubepods, for_s: float) -> None:
    """Containers made and removed, CHURN_PER_S of each a second, and what is left of them."""
    warm = [kubepods.make(QUIET_MIB) for _ in range(int(CHURN_PER_S * CHURN_LIFE_S))]  # as many as will live at once
    daemon.protected(warm)
    for pod in warm:
        kubepods.remove(pod)
    settled(daemon)
    before, found = leavings(daemon), daemon.counted("governor_containers_found_total")
    made: list[Pod] = []
    living: list[Pod] = []
    cpu = {name: cpu_ns(pid) for name, pid in daemon.pids.items()}
    begun_s = time.monotonic()
    while (passed_s := time.monotonic() - begun_s) < for_s:
        if len(made) < passed_s * CHURN_PER_S:
            made.append(kubepods.make(QUIET_MIB))
            living.append(made[-1])
        if living and time.monotonic_ns() - living[0].made_ns > CHURN_LIFE_S * 1e9:
            kubepods.remove(living.pop(0))
        elif len(made) >= passed_s * CHURN_PER_S:
            time.sleep(0.002)
    cpu = {name: (cpu_ns(pid) - cpu[name]) / 1e7 / passed_s for name, pid in daemon.pids.items()}
    time.sleep(CHURN_LIFE_S)
    for pod in living:
        kubepods.remove(pod)
    settled(daemon)
    governed = {line["container"]["container_id"]: line["monotonic_ns"] for line in daemon.node_lines("governed")}
    took = sorted((governed[p.container_id] - p.made_ns) / 1e6 for p in made if p.container_id in governed)
    seen = min(len(made), daemon.counted("governor_containers_found_total") - found)
    print(f"{len(made)} containers made and removed in {passed_s:.0f} s, each lived {CHURN_LIFE_S:g} s: {seen} seen,")
    print(f"{len(took)} governed, after {at(took, 0.5):.0f} ms (p50), {at(took, 0.99):.0f} ms (p99);")
    each = {name: percent / 100 * passed_s * 1000 / len(took) for name, percent in cpu.items()}
    for name, percent in cpu.items():
        print(f"CPU of {name}: {percent:.1f} %, {each[name]:.1f} ms for each governed, with its life and its end")
    print()
    after = leavings(daemon)
    table(["left of them", "before", "after"], [[name, before[name], after[name]] for name in before])


def leavings(daemon: Daemon) -> dict[str, int]:
    """What grows if something leaks."""
    from governor import instance

    found = {f"descriptors of {name}": count for name, count in open_files(daemon).items()}
    found |= {f"RSS of {name}, KiB": resident_kib(pid)[0] for name, pid in daemon.pids.items()}
    found["inotify watches"] = inotify_watches(daemon.pids["governor"])
    found["elements of BPF maps"] = map_elements()
    found["run-time files"] = entries(instance.run_directory())
    found["states"] = len(list(daemon.state.parent.glob("governor/state-*")))
    found["journals"] = entries(daemon.state / "containers")
    return found


def inotify_watches(pid: int) -> int:
    found = 0
    for info in Path(f"/proc/{pid}/fdinfo").iterdir():
        try:
            found += info.read_text().count("inotify wd:")
        except OSError:
            continue
    return found


def map_elements() -> int:
    from governor import bpflib, pins, record

    directory = pins.current(INSTANCE)
    if not directory:
        return 0
    lib, found = bpflib.open_libbpf(), 0
    for pin in [*directory.glob("*/watch"), *directory.glob("*/track")]:
        fd = lib.bpf_obj_get(str(pin).encode())
        key, following = None, ctypes.create_string_buffer(record.CGROUP_ID.size)
        while lib.bpf_map_get_next_key(fd, key, following) == 0:
            found += 1
            key = ctypes.create_string_buffer(following.raw, record.CGROUP_ID.size)
        os.close(fd)
    return found


# All at once


def bursts(daemon: Daemon, kubepods: Kubepods, scratch: Path, count: int) -> None:
    """Agents that burst within the same second."""
    begin = scratch / "begin"
    agents: dict[Pod, subprocess.Popen[str]] = {}
    for number in range(count):
        pod = kubepods.make(BURST_MIB)
        words = [
            sys.executable,
            AGENT,
            scratch / f"agent-{number}.jsonl",
            "touch",
            "--begin",
            begin,
            "--total-mb",
            1024,
        ]

        def enter(pod: Pod = pod) -> None:
            (pod.memcg / "cgroup.procs").write_text(str(os.getpid()))

        command = [str(word) for word in words]
        agents[pod] = subprocess.Popen(command, preexec_fn=enter, stdout=subprocess.PIPE, text=True)
    for agent in agents.values():
        assert agent.stdout
        agent.stdout.readline()
    daemon.protected(agents)
    daemon.wait_for(lambda: all(lines(daemon.journal(pod), ("agent",)) for pod in agents), "found all agents")
    go_ns = time.monotonic_ns()
    begin.touch()
    statuses = {pod: ended(agent) for pod, agent in agents.items()}
    time.sleep(2)

    def first_ms(pod: Pod, kind: str, field: str = "monotonic_ns") -> float:
        told = [line for line in lines(daemon.journal(pod), (kind,)) if line[field]]
        return (told[0][field] - go_ns) / 1e6 if told else float("nan")

    order = sorted(agents, key=lambda pod: first_ms(pod, "braked", "crossed_ns"))
    rows: list[list[object]] = []
    for number, pod in enumerate(order):
        session = scratch / f"agent-{list(agents).index(pod)}.jsonl.saved"
        what = "saved" if statuses[pod] == 128 + signal.SIGTERM and session.exists() else f"status {statuses[pod]}"
        told = (
            ("braked", "crossed_ns"),
            ("braked", "frozen_ns"),
            ("archived", "monotonic_ns"),
            ("terminating", "monotonic_ns"),
        )
        kills = len(lines(daemon.journal(pod), ("oom_kill",)))
        rows.append([number + 1, *(f"{first_ms(pod, *each):.0f}" for each in told), what, kills])
    archived = sum(row[3] != "nan" for row in rows)
    saved = sum(row[-2] == "saved" for row in rows)
    print(f"{count} agents of {BURST_MIB} MiB that burst at once: {archived} archived, the handler of {saved} ran;")
    print("ms since they were let go\n")
    table(["by crossing", "crossed", "frozen", "archived", "SIGTERM", "became", "OOM kills"], rows)
    for agent in agents.values():
        agent.kill()
        agent.wait()


def ended(agent: subprocess.Popen[str]) -> int | None:
    try:
        return agent.wait(timeout=120)
    except subprocess.TimeoutExpired:
        return None
