"""Values of ours as JSON and back: dataclasses, named tuples, enums, tuples. Pure.

For the state file and the journal: what comes back is checked against the types, because a file may be of another
version, damaged, or not ours at all.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints

import orjson

_LARGEST = 1 << 62  # what is larger was not written by us, and JSON could not hold what comes of it
_hints = cache(get_type_hints)  # a tenth of a millisecond each time


def plain(value: Any) -> Any:
    """What JSON can hold; raises nothing for the values of `model` and `policy`."""
    return orjson.loads(orjson.dumps(value, default=lambda named: named._asdict()))  # a tenth of walking it here


def restored(kind: Any, value: Any) -> Any:
    """The value of type `kind` that plain() turned into `value`; raises ValueError for anything else.

    Fields that are missing get their default; fields that `kind` does not have are refused.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (kind,) = (argument for argument in arguments if argument is not type(None))
        return restored(kind, value)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"found {value!r}, expected a list")
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        if len(inner) != len(value):
            raise ValueError(f"found {len(value)} items, expected {len(inner)}")
        return tuple(restored(one, item) for one, item in zip(inner, value, strict=True))
    if is_dataclass(kind) or hasattr(kind, "_fields"):
        return _object(kind, value)
    if issubclass(kind, Enum):
        return kind(value)
    if type(value) is int and kind is float:
        return float(value)
    if type(value) is not kind or (kind is int and abs(value) > _LARGEST):
        raise ValueError(f"found {value!r}, expected {kind.__name__}")
    return value


def _object(kind: Any, value: Any) -> Any:
    hints = _hints(kind)
    names = {field.name for field in fields(kind)} if is_dataclass(kind) else set(kind._fields)
    if not isinstance(value, dict) or not set(value) <= names:
        raise ValueError(f"found {value!r}, expected an object with {', '.join(sorted(names))}")
    try:
        return kind(**{name: restored(hints[name], item) for name, item in value.items()})
    except TypeError as error:  # a field without a default is missing
        raise ValueError(str(error)) from error
