"""The native extension, which may be missing."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType


@functools.cache
def native_module() -> ModuleType:
    """The compiled extension; raises ImportError with the cause if it is not there."""
    return importlib.import_module("pyflocality._C")
