"""The native extension, which may be missing."""

from __future__ import annotations

import importlib
from types import ModuleType


def native_module() -> ModuleType:
    """The compiled extension; raises ImportError with the cause if it is not there."""
    return importlib.import_module("pyflocality._C")
