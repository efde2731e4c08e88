"""Facts about this machine, and what follows from them. Facts first, in `probe`; the rules are below, in `decide`.

Presence says little about BPF: some functions are listed and can be hooked by nothing. So `try_load` attaches for
real, in the loader process, and takes it back.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from governor import bpflib, cgroup, pins

LOAD_TIMEOUT_S = 300
_NO_CGROUP2 = "cgroup v2 is not mounted at /sys/fs/cgroup: boot with systemd.unified_cgroup_hierarchy=1"
_NO_CONTROLLER = "the memory controller is off: remove cgroup_disable=memory from the kernel's command line"
_CAP_SYS_ADMIN, _CAP_SYS_NICE, _CAP_BPF, _CAP_PERFMON = 21, 23, 39, 38


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found; every field on its own, nothing concluded."""

    kernel: str
    cgroup2: bool  # unified hierarchy at /sys/fs/cgroup
    cgroup1_memory: bool  # the memory controller of cgroup v1
    memory_controller: bool
    cgroup_writable: bool
    freezer: bool | None  # cgroup.freeze, 5.2; None: no memcg to look at
    cgroup_kill: bool | None  # 5.14; as above
    psi: bool
    btf: bool
    bpffs: bool
    libbpf: bool
    bcc: str  # "ok", "missing", or the path of the wrong one
    headers: str  # where BCC finds kernel headers, "" if nowhere
    capabilities: int
    perf_event_paranoid: int | None
    locked_memory: bool  # RLIMIT_MEMLOCK is infinite
    memory_bytes: int  # of the machine
    swap_bytes: int
    loaded: dict[str, str] = field(default_factory=dict)  # what try_load said of each module


@dataclass(frozen=True, slots=True)
class Verdict:
    """The source and brake that governor would use, why, and what to do for better ones."""

    source: str  # "bpf", "psi", "poll" or "none"
    brake: str  # "freeze", "stop" or "none"
    reason: str
    missing: list[str]


def probe() -> Facts:
    """Look; changes nothing and raises nothing."""
    import psutil  # only doctor needs it: 20 ms and 4 MiB

    root = Path(cgroup.ROOT)
    example = _example_memcg(root)
    headers = next((str(path) for path in _header_places() if path.exists()), "")
    return Facts(
        kernel=platform.release(),
        cgroup2=(root / "cgroup.controllers").exists(),
        cgroup1_memory=Path(cgroup.ROOT_V1, "memory.limit_in_bytes").exists(),
        memory_controller="memory" in _read(root / "cgroup.controllers").split(),
        cgroup_writable=os.access(root / "cgroup.procs", os.W_OK),
        freezer=(example / "cgroup.freeze").exists() if example else None,
        cgroup_kill=(example / "cgroup.kill").exists() if example else None,
        psi=Path("/proc/pressure/memory").exists(),
        btf=Path("/sys/kernel/btf/vmlinux").exists(),
        bpffs=os.path.ismount(pins.BPFFS),
        libbpf=_has_libbpf(),
        bcc=_find_bcc(),
        headers=headers,
        capabilities=_capabilities(),
        perf_event_paranoid=_number(Path("/proc/sys/kernel/perf_event_paranoid")),
        locked_memory=_memlock_is_infinite(),
        memory_bytes=psutil.virtual_memory().total,
        swap_bytes=psutil.swap_memory().total,
    )


def decide(facts: Facts) -> Verdict:
    """Which source and which brake these facts allow, for a memcg that governor itself is not in."""
    missing = _missing_for_bpf(facts)
    freezes = facts.cgroup2 and facts.memory_controller and facts.freezer is not False and facts.cgroup_writable
    brake = "freeze" if freezes else "stop"
    lacks = [] if freezes else [_missing_for_freeze(facts)]
    if not missing:
        how = facts.loaded.get(pins.REQUIRED_MODULE)
        optional = [f"{name}: {why}" for name, why in facts.loaded.items() if why.startswith("unavailable")]
        reason = f"the charge programs attach by {how}" if how else "everything that BPF needs is there (not tried)"
        return Verdict("bpf", brake, reason, optional + lacks)
    lacks += [line for line in missing if line not in lacks]
    if facts.cgroup2 and facts.memory_controller:
        if facts.psi and facts.cgroup_writable:
            return Verdict("psi", brake, f"no BPF: {missing[0]}", lacks)
        return Verdict("poll", brake, f"no BPF: {missing[0]}; PSI triggers need PSI and a writable cgroup", lacks)
    if facts.cgroup1_memory:
        return Verdict("poll", brake, "cgroup v1 is read and polled, never frozen", lacks)
    return Verdict("none", "none", missing[0], lacks)


def _missing_for_freeze(facts: Facts) -> str:
    if not facts.cgroup2:
        return _NO_CGROUP2
    if not facts.memory_controller:
        return _NO_CONTROLLER
    if facts.freezer is False:
        return "memcgs cannot be frozen: needs cgroup.freeze (Linux 5.2)"
    return f"{cgroup.ROOT} is not writable: freezing needs root or a delegated memcg; the agent is stopped instead"


def _missing_for_bpf(facts: Facts) -> list[str]:
    missing: list[str] = []
    if not facts.cgroup2:
        missing.append(_NO_CGROUP2)
    elif not facts.memory_controller:
        missing.append(_NO_CONTROLLER)
    if not facts.btf:
        missing.append("the kernel has no BTF: install one built with CONFIG_DEBUG_INFO_BTF=y")
    if not facts.bpffs:
        missing.append(f"no bpffs at {pins.BPFFS}: mount -t bpf bpf {pins.BPFFS}")
    if facts.bcc == "missing":
        missing.append("BCC is missing: apt-get install python3-bpfcc")
    elif facts.bcc != "ok":
        missing.append(f"the bcc at {facts.bcc} is another project: pip uninstall bcc; apt-get install python3-bpfcc")
    if not facts.libbpf:
        missing.append("libbpf is missing: apt-get install libbpf1")
    if not facts.headers:
        missing.append(f"no kernel headers for {facts.kernel}: apt-get install linux-headers-{facts.kernel}")
    if not has_bpf_capabilities(facts.capabilities):
        missing.append("no right to load BPF programs: run as root, or with CAP_BPF and CAP_PERFMON")
    if error := facts.loaded.get("error"):
        missing.append(f"the programs do not load: {error}")
    return missing


def try_load() -> dict[str, str]:
    """Attach all modules in an instance of their own and take them back; what the loader said."""
    instance = f"doctor-{os.getpid()}"
    try:
        return run_loader(instance)
    finally:
        with suppress(OSError):
            pins.unload(instance)


def run_loader(instance: str, attach: str = "auto") -> dict[str, str]:
    """Run the loader process; for each module how it is attached, or {"error": why}."""
    try:
        done = subprocess.run(
            loader_command(instance, attach), stdout=subprocess.PIPE, timeout=LOAD_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"the loader did not end within {LOAD_TIMEOUT_S} s"}
    return parse_loaded(done.stdout, done.returncode)


def loader_command(instance: str, attach: str = "auto") -> list[str]:
    """How the loader process is started."""
    return [sys.executable, "-P", "-m", "governor.loader", instance, attach]


def parse_loaded(output: bytes, status: int) -> dict[str, str]:
    """What the loader said, in its last line (BCC may say something before), as run_loader returns it."""
    try:
        result: dict[str, str] = json.loads((output.splitlines() or [b""])[-1])
    except ValueError:
        return {"error": f"the loader ended with status {status} and said nothing"}
    return result


def has_bpf_capabilities(capabilities: int) -> bool:
    """CAP_SYS_ADMIN, or CAP_BPF with CAP_PERFMON (5.8)."""
    has = [bool(capabilities >> bit & 1) for bit in (_CAP_SYS_ADMIN, _CAP_BPF, _CAP_PERFMON)]
    return has[0] or (has[1] and has[2])


def _example_memcg(root: Path) -> Path | None:
    """Any memcg below the root: the root itself lacks the files that are asked about."""
    with suppress(OSError):
        return next((path for path in root.iterdir() if (path / "cgroup.procs").exists()), None)
    return None


def _header_places() -> list[Path]:
    named = os.environ.get("BCC_KERNEL_SOURCE")
    built = Path(f"/lib/modules/{platform.release()}/build")
    return [*([Path(named)] if named else []), built, Path("/sys/kernel/kheaders.tar.xz")]


def _find_bcc() -> str:
    from governor.loader import SYSTEM_PACKAGES

    if SYSTEM_PACKAGES not in sys.path:
        sys.path.append(SYSTEM_PACKAGES)
    spec = importlib.util.find_spec("bcc")
    if spec is None or not spec.origin:
        return "missing"
    return "ok" if (Path(spec.origin).parent / "libbcc.py").exists() else spec.origin


def _has_libbpf() -> bool:
    try:
        bpflib.open_libbpf()
    except OSError:
        return False
    return True


def _capabilities() -> int:
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _memlock_is_infinite() -> bool:
    import resource

    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] == resource.RLIM_INFINITY


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.lstrip("-").isdigit() else None
