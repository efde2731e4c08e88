"""Offsets of kernel structs from the running kernel's own type information (BTF), for the BPF programs.

Used by the short-lived loader only. With these no kernel header is needed for any kernel struct, a compile takes
a tenth of the time, and the offsets are those of the kernel that runs, not of the headers that happen to be
installed.
"""

from __future__ import annotations

import ctypes
import struct
from dataclasses import dataclass
from pathlib import Path

from governor.bpflib import open_libbpf

_KIND_STRUCT, _KIND_ARRAY, _KIND_ENUM = 4, 3, 6
_KIND_UNION, _SKIPPED_KINDS = 5, (8, 9, 10, 11, 18)  # typedef, volatile, const, restrict, type tag

_LRUGEN_TYPES = 2  # anon and file: ANON_AND_FILE in the kernel's mmzone.h


class BtfError(Exception):
    """The kernel's BTF is missing, or lacks something that the programs cannot do without."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where a member lies in its struct, and its type."""

    offset_bytes: int
    type_id: int


class KernelTypes:
    """The kernel's BTF."""

    def __init__(self) -> None:
        """Raises BtfError when the kernel exports no BTF."""
        self._lib = open_libbpf()
        for name in ("btf__load_vmlinux_btf", "btf__type_by_id"):
            getattr(self._lib, name).restype = ctypes.c_void_p
        self._lib.btf__name_by_offset.restype = ctypes.c_char_p
        self._lib.btf__name_by_offset.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._lib.btf__type_by_id.argtypes = [ctypes.c_void_p, ctypes.c_uint32]
        self._lib.btf__find_by_name_kind.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint32]
        if not Path("/sys/kernel/btf/vmlinux").exists():
            raise BtfError("this kernel has no /sys/kernel/btf/vmlinux (CONFIG_DEBUG_INFO_BTF)")
        self._btf = self._lib.btf__load_vmlinux_btf()
        if not self._btf:
            raise BtfError("libbpf could not read /sys/kernel/btf/vmlinux")

    def _type(self, type_id: int) -> tuple[int, int, int, int]:
        """(address, kind, number of members, size or type) of a type, typedefs and qualifiers resolved."""
        while True:
            address = self._lib.btf__type_by_id(self._btf, type_id)
            if not address:
                raise BtfError(f"the kernel's BTF has no type {type_id}")
            _, info, size_or_type = struct.unpack("III", ctypes.string_at(address, 12))
            kind = info >> 24 & 0x1F
            if kind not in _SKIPPED_KINDS:
                return address, kind, info & 0xFFFF, size_or_type
            type_id = size_or_type

    def _name(self, offset: int) -> str:
        return bytes(self._lib.btf__name_by_offset(self._btf, offset) or b"").decode()

    def _find(self, type_id: int, name: str) -> Member | None:
        address, kind, count, _ = self._type(type_id)
        if kind not in (_KIND_STRUCT, _KIND_UNION):
            return None
        bitfields = struct.unpack("I", ctypes.string_at(address + 4, 4))[0] >> 31
        for index in range(count):
            name_offset, member_type, offset = struct.unpack("III", ctypes.string_at(address + 12 + 12 * index, 12))
            offset_bytes = (offset & 0xFFFFFF if bitfields else offset) // 8
            found = self._name(name_offset)
            if found == name:
                return Member(offset_bytes, member_type)
            if not found and (inner := self._find(member_type, name)):
                return Member(offset_bytes + inner.offset_bytes, inner.type_id)
        return None

    def member(self, path: str) -> Member:
        """A member by path, as in "mem_cgroup.css.cgroup"; raises BtfError when the kernel has no such member."""
        struct_name, *names = path.split(".")
        type_id: int = self._lib.btf__find_by_name_kind(self._btf, struct_name.encode(), _KIND_STRUCT)
        offset_bytes = 0
        for name in names:
            found = self._find(type_id, name) if type_id > 0 else None
            if not found:
                raise BtfError(f"this kernel has no {path}")
            offset_bytes, type_id = offset_bytes + found.offset_bytes, found.type_id
        return Member(offset_bytes, type_id)

    def elements(self, member: Member) -> int:
        """How many elements an array member has; pahole flattens arrays of arrays, so only their product counts."""
        address, kind, _, _ = self._type(member.type_id)
        if kind != _KIND_ARRAY:
            return 1
        element, _, length = struct.unpack("III", ctypes.string_at(address + 12, 12))
        return int(length) * self.elements(Member(0, element))

    def enumerator(self, enum: str, name: str) -> int:
        """The value of one name of an enum; raises BtfError."""
        type_id = self._lib.btf__find_by_name_kind(self._btf, enum.encode(), _KIND_ENUM)
        if type_id > 0:
            address, _, count, _ = self._type(type_id)
            for index in range(count):
                name_offset, value = struct.unpack("Ii", ctypes.string_at(address + 12 + 8 * index, 8))
                if self._name(name_offset) == name:
                    return int(value)
        raise BtfError(f"this kernel has no {enum}.{name}")


def macros(module: str) -> dict[str, int]:
    """The macros that one of the modules in bpf/ is compiled with; raises BtfError."""
    types = KernelTypes()
    common = {
        "OFF_MEMCG_CGROUP": types.member("mem_cgroup.css.cgroup").offset_bytes,
        "OFF_CGROUP_KN": types.member("cgroup.kn").offset_bytes,
        "OFF_KN_ID": types.member("kernfs_node.id").offset_bytes,
    }
    if module == "charge":
        return common | _charge_macros(types)
    if module == "victim":
        return common | {
            "OFF_OOM_MEMCG": types.member("oom_control.memcg").offset_bytes,
            "OFF_OOM_CHOSEN": types.member("oom_control.chosen").offset_bytes,
            "OFF_TASK_TGID": types.member("task_struct.tgid").offset_bytes,
            "OFF_TASK_PID": types.member("task_struct.pid").offset_bytes,
        }
    return common


def _charge_macros(types: KernelTypes) -> dict[str, int]:
    zones = types.member("mem_cgroup_per_node.lru_zone_size")
    num_zones = types.enumerator("zone_type", "__MAX_NR_ZONES")
    found = {
        "OFF_MEMCG_MEMORY": types.member("mem_cgroup.memory").offset_bytes,
        "OFF_MEMCG_NODEINFO": types.member("mem_cgroup.nodeinfo").offset_bytes,
        "OFF_CGROUP_SUBSYS": types.member("cgroup.subsys").offset_bytes,
        "OFF_COUNTER_USAGE": types.member("page_counter.usage").offset_bytes,
        "OFF_COUNTER_MAX": types.member("page_counter.max").offset_bytes,
        "OFF_COUNTER_PARENT": types.member("page_counter.parent").offset_bytes,
        "OFF_NODE_LRU_ZONE_SIZE": zones.offset_bytes,
        "MEMORY_CGRP_ID": types.enumerator("cgroup_subsys_id", "memory_cgrp_id"),
        "NUM_NODES": _possible_nodes(),
        "NUM_ZONES": num_zones,
        "NUM_LRU_LISTS": types.elements(zones) // num_zones,
        "NUM_GENERATIONS": 0,
        "OFF_NODE_LRUGEN_PAGES": 0,
    }
    try:
        generations = types.member("mem_cgroup_per_node.lruvec.lrugen.nr_pages")
    except BtfError:  # a kernel without multi-generational LRU
        return found
    found["OFF_NODE_LRUGEN_PAGES"] = generations.offset_bytes
    found["NUM_GENERATIONS"] = types.elements(generations) // (num_zones * _LRUGEN_TYPES)
    return found


def _possible_nodes() -> int:
    listed = Path("/sys/devices/system/node/possible")
    if not listed.exists():  # a kernel without NUMA has one node
        return 1
    return int(listed.read_text().strip().replace("-", ",").split(",")[-1]) + 1
