"""Whether this machine has the native extension, and the instruction sets that it has here."""

from __future__ import annotations

import pytest

from pyflocality.backends.selection import machine_reason, native_module

# None, or why the CPU kernels cannot run here.
NO_CPU = machine_reason("cpu")
needs_cpu = pytest.mark.skipif(NO_CPU is not None, reason=str(NO_CPU))
ISAS = native_module().instruction_sets() if NO_CPU is None else []
