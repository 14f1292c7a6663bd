"""Whose call a warning is about, the first frame outside of the library; what is told once."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_told: set[str] = set()


def caller_level() -> int:
    """The `stacklevel` of the first frame outside the library, for a warning of the caller."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and (
        frame.f_code.co_filename.startswith(_PACKAGE)
        or frame.f_code.co_filename == contextlib.__file__
    ):
        level, frame = level + 1, frame.f_back
    return level


def warn_once(message: str) -> None:
    """Warn the caller of the library, once in a process of each thing."""
    if message not in _told:
        _told.add(message)
        warnings.warn(message, stacklevel=caller_level())
