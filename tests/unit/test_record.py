"""record.py against bpf/record.h, compiled by a real C compiler; purity; what the real-time process imports."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from governor import link, record
from governor.cgroup import MemoryState
from governor.pins import sources

HEADER = sources() / "record.h"
PACKAGE = Path(record.__file__).parent


def c_fields(struct: str) -> list[tuple[str, int]]:
    """Name and element count of each field of a struct in the header."""
    body = re.search(rf"struct {struct} \{{(.*?)\n\}};", HEADER.read_text(), re.DOTALL).group(1)
    body = re.sub(r"/\*.*?\*/", "", body, flags=re.DOTALL)
    found = re.findall(r"u(?:32|64) (\w+)(\[LEVELS\])?;", body)
    return [(name, record.LEVELS if array else 1) for name, array in found]


def c_layout(tmp_path: Path) -> dict[str, int]:
    """sizeof and offsetof as the C compiler sees them, constants as well."""
    lines = []
    for struct in ("record", "config", "watch", "track"):
        lines.append(f'printf("{struct} %zu\\n", sizeof(struct {struct}));')
        for name, _ in c_fields(struct):
            lines.append(f'printf("{struct}.{name} %zu\\n", offsetof(struct {struct}, {name}));')
    for name in ("LEVELS", "CROSSING", "VERIFY", "STALL", "OOM_KILL", "RISING", "HORIZON"):
        lines.append(f'printf("{name} %d\\n", (int){name});')
    for name in ("HAS_MEMORY", "HAS_RATE", "HAS_STALL", "HAS_TREND", "PPM"):
        lines.append(f'printf("{name} %d\\n", (int){name});')
    source = tmp_path / "layout.c"
    includes = '#define GOVERNOR_HOST_TYPES\n#include <stdio.h>\n#include <stddef.h>\n#include "record.h"\n'
    source.write_text(includes + "int main(void) {" + "\n".join(lines) + "}")
    subprocess.run(["cc", "-Wall", "-Werror", f"-I{HEADER.parent}", "-o", tmp_path / "layout", source], check=True)
    printed = subprocess.check_output([tmp_path / "layout"], text=True)
    return {name: int(value) for name, value in (line.split() for line in printed.splitlines())}


def marked(struct: str, size: int, layout: dict[str, int]) -> bytes:
    """A struct whose every element holds a number of its own, laid out as C does it."""
    data, number = bytearray(size), 0
    names = [name for name, _ in c_fields(struct)]
    for index, (name, count) in enumerate(c_fields(struct)):
        offset = layout[f"{struct}.{name}"]
        end = layout[f"{struct}.{names[index + 1]}"] if index + 1 < len(names) else size
        width = (end - offset) // count
        for element in range(count):
            number += 1
            start = offset + element * width
            data[start : start + width] = number.to_bytes(width, sys.byteorder)
    return bytes(data)


def test_header_and_record_py_agree(tmp_path):
    layout = c_layout(tmp_path)
    for name in ("LEVELS", "CROSSING", "VERIFY", "STALL", "OOM_KILL", "RISING", "HORIZON", "HAS_MEMORY", "PPM"):
        assert getattr(record, name) == layout[name]
    assert layout["HAS_RATE"] == record.HAS_RATE and layout["HAS_STALL"] == record.HAS_STALL
    assert layout["HAS_TREND"] == record.HAS_TREND

    assert [name for name, _ in c_fields("record")] == list(record.Record._fields)
    assert record.decode(marked("record", layout["record"], layout)) == tuple(range(1, 17))

    assert [name for name, _ in c_fields("config")] == list(record.Config._fields)
    assert record.Config(1, 2, 3, 4, 5).encode() == marked("config", layout["config"], layout)
    assert layout["config"] == record.Config.size_bytes()

    levels = record.Levels((2, 3, 4, 5), (6, 7, 8, 9), 10, 11, 15, 1)
    watch = record.encode_watch(levels, record.Verified(12, 13, 14), 16)
    assert watch == marked("watch", layout["watch"], layout)

    track = marked("track", layout["track"], layout)
    assert len(track) == record.TRACK.size
    names = [name for name, _ in c_fields("track")]
    assert record.charged_pages(track) == names.index("charged_pages") + 1
    assert record.stall_ns(track) == names.index("stall_ns") + 1


def test_a_record_of_another_size_is_refused():
    with pytest.raises(ValueError, match="expected 104"):
        record.decode(bytes(88))


def test_what_is_unknown_is_not_zero():
    found = record.Record(1, 2, record.STALL, record.RISING, record.HAS_STALL, 0, 1, 1, 0, 0, 0, 0, 0, 0, 5, 0)
    assert found.fill_rate_bytes is None
    assert found.bound_ratio == 0.0


@pytest.mark.parametrize(
    "message",
    [
        link.Braked(1, 2, 3, MemoryState(4, 5, 6, 7, 8), -1, 10, 9, True, False),
        link.Thawed(1, 2, link.LOAN_OVER),
        link.Alive(1, 2),
        link.Adopted(1, True, 2, 3),
        link.Source(1, 2, 3),
        link.Refused("no rights"),
    ],
)
def test_what_reflex_says_arrives(message):
    assert link.decode_from_reflex(message.encode()) == message


def test_levels_arrive_and_garbage_does_not():
    levels = record.Levels(max_pages=7, stall_engage_ns=9)
    assert link.decode_levels(link.encode_levels(link.ADOPT, 3, levels)) == (3, levels)
    thaw = link.Thaw(1, 900_000, -1, False, True)
    assert link.decode_thaw(thaw.encode()) == thaw
    with pytest.raises(ValueError, match="from reflex"):
        link.decode_from_reflex(b"\xff123")


PURE = (
    "record",
    "policy",
    "model",
    "tiers",
    "ladder",
    "ladder_state",
    "ladder_brake",
    "ladder_climb",
    "levels",
    "codec",
    "schedule",
    "pods",
    "container",
    "selection",
)
IMPURE = {"os", "time", "logging", "ctypes", "socket", "subprocess", "pathlib", "random"}
REAL_TIME = (
    *("record", "cgroup", "limits", "levels", "subtree", "brake", "loan"),
    *("link", "bpflib", "bpf_source", "poll_source", "poller", "schedule", "governed", "bpf_watches"),
    *("braking", "real_time", "reflex"),
)
HEAVY = {"dataclasses", "json", "pathlib", "subprocess", "logging", "socket", "asyncio", "typer", "psutil", "orjson"}


def imports(module: str) -> set[str]:
    tree = ast.parse((PACKAGE / f"{module}.py").read_text())
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
            if node.module == "governor":
                found |= {f"governor.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_touch_nothing(module):
    assert not imports(module) & IMPURE


def test_what_the_real_time_process_imports():
    for module in REAL_TIME:
        ours = {name for name in imports(module) if name.startswith("governor.")}
        assert ours <= {f"governor.{name}" for name in REAL_TIME}, module
    code = f"import sys; sys.path.insert(0, {str(PACKAGE.parent)!r}); import governor.reflex; print(*sys.modules)"
    loaded = subprocess.check_output([sys.executable, "-I", "-S", "-c", code], text=True).split()
    assert not HEAVY & set(loaded)


def test_only_the_loader_imports_bcc():
    importing = {path.stem for path in PACKAGE.rglob("*.py") if re.search(r"^\s*import bcc", path.read_text(), re.M)}
    assert importing == {"loader"}
