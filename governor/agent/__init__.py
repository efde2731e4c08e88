"""Memory protection from inside an agent that is a Python program: needs no root, nothing of the rest of governor.

The names below are imported when they are first used (PEP 562), so that an agent loads only what it needs: the
standard library, psutil, and for some of them the extras `http`, `json` or `arrays`.
"""

from __future__ import annotations

TYPE_CHECKING = False  # as typing has it, whose import would take longer than all of this
if TYPE_CHECKING:
    from governor.agent.accumulator import Accumulator, AccumulatorError  # noqa: F401
    from governor.agent.container import Container, Reading  # noqa: F401
    from governor.agent.extras import MissingExtra  # noqa: F401
    from governor.agent.heap import Freed, give_back  # noqa: F401
    from governor.agent.hearing import Announcement, Crossing, Hooks, NotNow, Request  # noqa: F401
    from governor.agent.history import BoundedHistory, HistoryFull, Turn  # noqa: F401
    from governor.agent.history_spill import SpillError  # noqa: F401
    from governor.agent.leak import Leak, Verdict  # noqa: F401
    from governor.agent.levels import Levels, Status  # noqa: F401
    from governor.agent.payloads import PayloadError, batches, batches_async, items, items_async  # noqa: F401
    from governor.agent.pressure import Change, MemoryPressure  # noqa: F401
    from governor.agent.profiling import Place, Profiler  # noqa: F401
    from governor.agent.runtime import Setting, configure_runtime, environment  # noqa: F401
    from governor.agent.shedding import Overloaded, Probes, ShedLoad, ShrinkingSemaphore, sheds  # noqa: F401
    from governor.agent.spool import Spool, SpoolError  # noqa: F401
    from governor.agent.stopping import StoppedByPressure  # noqa: F401
    from governor.agent.stream_text import ServerSentEvent, TextError, events  # noqa: F401
    from governor.agent.streaming import Downloaded, StreamError, chunks, deliver, download  # noqa: F401

_MODULES = {
    "accumulator": ("Accumulator", "AccumulatorError"),
    "container": ("Container", "Reading"),
    "extras": ("MissingExtra",),
    "heap": ("Freed", "give_back"),
    "hearing": ("Announcement", "Crossing", "Hooks", "NotNow", "Request"),
    "history": ("BoundedHistory", "HistoryFull", "Turn"),
    "history_spill": ("SpillError",),
    "leak": ("Leak", "Verdict"),
    "levels": ("Levels", "Status"),
    "payloads": ("PayloadError", "batches", "batches_async", "items", "items_async"),
    "pressure": ("Change", "MemoryPressure"),
    "profiling": ("Place", "Profiler"),
    "runtime": ("Setting", "configure_runtime", "environment"),
    "shedding": ("Overloaded", "Probes", "ShedLoad", "ShrinkingSemaphore", "sheds"),
    "spool": ("Spool", "SpoolError"),
    "stopping": ("StoppedByPressure",),
    "stream_text": ("ServerSentEvent", "TextError", "events"),
    "streaming": ("Downloaded", "StreamError", "chunks", "deliver", "download"),
}
_PLACES = {name: module for module, names in _MODULES.items() for name in names}
__all__ = sorted(_PLACES)


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
