"""Which implementation serves an operation, and the report on this installation.

What is listed here can be relied on, by tests too: the choice, the errors, what this machine has,
and what was done inside a `with` block (`trace_backends`, `trace_blocks`).
"""

from __future__ import annotations

from pyflocality.backends.report import configuration, show_config
from pyflocality.backends.selection import (
    BackendUnavailableError,
    machine_reason,
    trace_backends,
    use_backend,
)
from pyflocality.storage.reader import trace_blocks

__all__ = [
    "BackendUnavailableError",
    "configuration",
    "machine_reason",
    "show_config",
    "trace_backends",
    "trace_blocks",
    "use_backend",
]
