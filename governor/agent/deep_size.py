"""How many bytes a value holds, all that it refers to included: what tracemalloc would show if it went away.

`sys.getsizeof` gives a list's own pointers and says nothing of the strings behind them. Here everything that can be
reached is counted, each object once. Not counted: what the interpreter or the program has anyway (types, functions,
modules, small integers). An object that refers to a whole application (a client, an open session) counts with all of
that: measure data, not machinery. A text that is not ASCII grows later by its UTF-8 where C code asks for that
(orjson, sqlite3): CPython keeps the copy as long as the text. It is counted once it is there.
"""

from __future__ import annotations

import gc
import sys
import types
from collections import deque
from collections.abc import Iterable
from typing import Any

# Nothing is behind these. Exact types: what is derived from them may have attributes.
_LEAVES = frozenset({str, bytes, bytearray, int, float, complex})
_SHARED = (
    *(type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.CodeType, types.FrameType),
    *(types.GetSetDescriptorType, types.MemberDescriptorType, types.MethodDescriptorType),
    *(type(None), bool, type(Ellipsis), type(NotImplemented)),
)
_CONTAINERS = (dict, list, set, frozenset, deque)  # what they refer to are not (only) attributes
_POINTER_BYTES = 8
_INT_BYTES = 32  # _PyLong_FromMedium: a whole PyLongObject, of which sys.getsizeof counts the digits
_MANAGED_DICT = 1 << 4  # Py_TPFLAGS_MANAGED_DICT (3.11 on): attributes are in an array, and no dict until asked for
_SPARE_VALUES = 1 if sys.version_info < (3, 13) else 2
_HELD_ONCE = 3  # sys.getrefcount of what one container refers to, a variable here and the call itself


def deep_size(value: object, shared: Iterable[object] = ()) -> int:
    """Bytes held by `value` and all that it refers to, but for the `shared` objects and what only they refer to.

    About a microsecond an object. What it takes itself: 8 bytes for each object of the largest container, and
    about 100 for each that more than one refers to, or that is a container.
    """
    if type(value) is str and not shared:
        return sys.getsizeof(value)  # as most turns of a conversation are
    seen = {id(each) for each in shared}
    pending: list[Any] = [value]
    total_bytes = 0
    while pending:
        current = pending.pop()
        kind = type(current)
        leaf = kind in _LEAVES
        if not leaf or sys.getrefcount(current) > _HELD_ONCE:
            if id(current) in seen:
                continue
            seen.add(id(current))
        if leaf:
            if kind is not int:
                total_bytes += sys.getsizeof(current)
            elif not -5 <= current <= 256:  # these the interpreter has
                total_bytes += max(sys.getsizeof(current), _INT_BYTES)
        elif not isinstance(current, _SHARED):
            total_bytes += sys.getsizeof(current)
            behind = gc.get_referents(current)
            if isinstance(current, dict):
                behind += dict.keys(current)  # dict_traverse passes over them where all are texts
            elif isinstance(current, tuple) and kind is not tuple:
                total_bytes += _POINTER_BYTES  # PyType_GenericAlloc: one item more
            elif kind.__flags__ & _MANAGED_DICT and not isinstance(current, _CONTAINERS):
                total_bytes += _values_bytes(behind)
            if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
                behind += _behind_array(current)
            pending += behind
            del behind  # or each would be referred to once more
    return total_bytes


def _values_bytes(behind: list[Any]) -> int:
    """The array with an instance's attributes (new_values in CPython's dictobject.c), which sys.getsizeof leaves out.

    Asking for `__dict__` would make one. Where somebody has, that is all that the instance refers to, and it has
    taken the array over; from 3.13 on the array is part of the object and stays.
    There the dict is mostly not told of (PyObject_VisitManagedDict), and its 64 bytes are left out.
    """
    attributes = [each for each in behind if not isinstance(each, type)]
    if len(attributes) == 1 and type(attributes[0]) is dict:
        attributes = [] if sys.version_info < (3, 13) else list(attributes[0])
    if not attributes:
        return 0
    slots = len(attributes) + _SPARE_VALUES
    return _POINTER_BYTES * slots + (slots + 2 + 7) // 8 * 8  # with the order in which they were set, a byte each


def _behind_array(array: Any) -> list[Any]:
    """NumPy's arrays tell the collector nothing: the array that a view looks at, and the objects of object arrays."""
    behind = [] if array.base is None else [array.base]
    return behind + (list(array.flat) if array.dtype.hasobject else [])
