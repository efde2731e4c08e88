"""Compiles bpf/ with BCC, attaches the programs, pins them, and exits.

The only module that imports bcc (70-90 MiB resident, twice that after a compile), so it runs as a process of its
own: `python -m governor.loader INSTANCE`. Prints one JSON object: for each module "fentry", "kprobe" or why it is
missing. Exits 1 when the charge module could not be attached.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import signal
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from governor import btf, pins
from governor.bpflib import open_libbpf

SYSTEM_PACKAGES = "/usr/lib/python3/dist-packages"  # where Debian and Ubuntu put python3-bpfcc
# 7.2's headers want the first two; an enum that a kernel adds to a switch of BCC's headers is not ours to fix.
_CFLAGS = ["-fms-extensions", "-Wno-microsoft-anon-tag", "-Wno-unknown-warning-option"]
_KPROBE_FUNCTIONS = {"charge": (b"on_charge_kprobe", b"page_counter_try_charge")}
_MAPS = ("config", "watch", "track", "ring", "dropped")
_BPF_PERF_EVENT = 41  # enum bpf_attach_type
_PR_SET_PDEATHSIG = 1
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}


class LoadError(Exception):
    """The programs could not be loaded; says what was found and what to do."""


def import_bcc() -> Any:
    """BCC's Python module; raises LoadError, also for the unrelated project of the same name."""
    if SYSTEM_PACKAGES not in sys.path:
        sys.path.append(SYSTEM_PACKAGES)
    spec = importlib.util.find_spec("bcc")
    if spec is None:
        raise LoadError("found no BCC; install the system package python3-bpfcc (not PyPI's bcc)")
    try:
        import bcc
    except ImportError as error:
        raise LoadError(f"BCC at {spec.origin} cannot be imported: {error}; reinstall python3-bpfcc") from error
    if not hasattr(bcc, "BPF"):
        raise LoadError(
            f"found another project named bcc at {spec.origin} (PyPI's); uninstall it (pip uninstall bcc) and "
            "install the system package python3-bpfcc"
        )
    return bcc


def load(instance: str, attach: str = "auto") -> dict[str, str]:
    """Attach and pin all modules; how each is attached, or why not.

    Pins of this version are kept as they are. `attach` is "auto" (fentry, else kprobe), "fentry" or "kprobe".
    Raises LoadError when the charge module cannot be attached.
    """
    parent = pins.INSTANCES / instance
    if not os.path.ismount(pins.BPFFS):
        raise LoadError(f"{pins.BPFFS} is no bpffs; mount one: mount -t bpf bpf {pins.BPFFS}")
    pins.remove_other_versions(instance)
    if kept := pins.current(instance):
        return pins.attached(kept)
    bcc = import_bcc()
    building = parent / f"building-{os.getpid()}"
    building.mkdir(parents=True, mode=0o700)
    result: dict[str, str] = {}
    try:
        for module in pins.MODULES:
            try:
                result[module] = _load_module(bcc, module, building / module, attach)
            except (LoadError, btf.BtfError, OSError) as error:
                if module == pins.REQUIRED_MODULE:
                    raise LoadError(f"the {module} programs cannot be loaded: {error}") from error
                result[module] = f"unavailable: {error}"
        building.rename(parent / pins.program_version())
    except BaseException:
        pins.remove(building)
        if not any(parent.iterdir()):
            pins.unload(instance)
        raise
    return result


def _load_module(bcc: Any, module: str, directory: Path, attach: str) -> str:
    if attach in ("auto", "fentry"):
        try:
            program = _compile(bcc, module, kprobe=False)
        except LoadError:
            if attach == "fentry" or module not in _KPROBE_FUNCTIONS:
                raise
        else:
            directory.mkdir(mode=0o700)
            for function, fd in program.kfunc_entry_fds.items():
                _pin(bcc, fd, directory / f"link-fentry-{function.decode().rpartition('__')[2]}")
            return _pin_maps(bcc, program, directory, "fentry")
    if module not in _KPROBE_FUNCTIONS:
        raise LoadError("there is no kprobe variant of this module")
    program = _compile(bcc, module, kprobe=True)
    function, symbol = _KPROBE_FUNCTIONS[module]
    program_fd = program.load_func(function, bcc.BPF.KPROBE).fd
    directory.mkdir(mode=0o700)
    _pin(bcc, _kprobe_link(program_fd, symbol), directory / f"link-kprobe-{symbol.decode()}")
    return _pin_maps(bcc, program, directory, "kprobe")


def _compile(bcc: Any, module: str, kprobe: bool) -> Any:
    macros = btf.macros(module) | ({"USE_KPROBE": 1} if kprobe else {})
    source = pins.sources() / f"{module}.bpf.c"
    flags = [f"-I{source.parent}", *_CFLAGS, *(f"-D{name}={value}" for name, value in macros.items())]

    def build() -> Any:
        return bcc.BPF(text=source.read_bytes(), cflags=flags)

    return _with_stderr(build, f"{source.name} ({'kprobe' if kprobe else 'fentry'})")


def _with_stderr(build: Callable[[], Any], what: str) -> Any:
    """Run `build`, and put what clang and the verifier printed into the error that it raises."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), 2)
        try:
            return build()
        except Exception as error:
            sink.seek(0)
            printed = sink.read()[-2000:].decode(errors="replace").strip()
            raise LoadError(f"{what}: {error}" + (f"\n{printed}" if printed else "")) from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def _pin(bcc: Any, fd: int, path: Path) -> None:
    if bcc.lib.bpf_obj_pin(fd, str(path).encode()):
        code = ctypes.get_errno()
        raise LoadError(f"pin {path}: {os.strerror(code)}")


def _pin_maps(bcc: Any, program: Any, directory: Path, how: str) -> str:
    for name in _MAPS:
        try:
            table = program[name]
        except KeyError:
            continue
        _pin(bcc, table.map_fd, directory / name)
    return how


def _kprobe_link(program_fd: int, symbol: bytes) -> int:
    """A link of a program to a kprobe, which unlike BCC's own perf descriptors can be pinned (5.15 and later)."""
    libc = ctypes.CDLL(None, use_errno=True)
    kprobe_type = int(Path("/sys/bus/event_source/devices/kprobe/type").read_text())
    name = ctypes.create_string_buffer(symbol)
    # struct perf_event_attr: type, size, config, period, sample_type, read_format, flags, wakeup, bp_type,
    # config1 (the symbol's address), config2 (the offset in it)
    attributes = struct.pack("IIQQQQQIIQQ", kprobe_type, 128, 0, 0, 0, 0, 0, 0, 0, ctypes.addressof(name), 0)
    number = _PERF_EVENT_OPEN.get(os.uname().machine)
    if number is None:
        raise LoadError(f"kprobes are not supported on {os.uname().machine}")
    event_fd = libc.syscall(number, attributes.ljust(128, b"\0"), -1, 0, -1, 8)  # 8: PERF_FLAG_FD_CLOEXEC
    if event_fd < 0:
        raise LoadError(f"kprobe on {symbol.decode()}: {os.strerror(ctypes.get_errno())}")
    link_fd = int(open_libbpf().bpf_link_create(program_fd, event_fd, _BPF_PERF_EVENT, None))
    if link_fd < 0:
        raise LoadError(f"link to a kprobe on {symbol.decode()}: {os.strerror(ctypes.get_errno() or -link_fd)}")
    return link_fd


def main() -> int:
    """Entry point of the loader process: INSTANCE [auto|fentry|kprobe]."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)  # nobody would own what it pins
    try:
        result = load(pins.check_instance(sys.argv[1]), *sys.argv[2:3])
    except (LoadError, btf.BtfError, OSError, ValueError) as error:
        sys.stdout.write(json.dumps({"error": str(error)}) + "\n")
        return 1
    sys.stdout.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
