"""What is imported only where it is used: httpx, ijson and NumPy are optional.

They come from a checkout: PyPI's `governor` is an unrelated project.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType


class MissingExtra(ImportError):
    """A package that governor does not need by itself; the text says how to get it."""


def load(module: str, extra: str, without: str = "") -> ModuleType:
    """Import it; raises MissingExtra. `without`: a part that it can do without, and that is not imported with it."""
    left_out = {without: None} if without and module not in sys.modules and without not in sys.modules else {}
    try:
        sys.modules.update(left_out)  # type: ignore[arg-type]  # None: what the import system takes for "there is none"
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        how = f"pip install '.[{extra}]' in a checkout of governor"
        raise MissingExtra(f"found no {error.name}, which this needs: {how}") from error
    finally:
        for name in left_out:
            sys.modules.pop(name, None)
