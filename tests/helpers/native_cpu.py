"""Whether this machine has the native extension."""

from __future__ import annotations

import pytest

from pyflocality.backends import machine_reason

# None, or why the CPU kernels cannot run here.
NO_CPU = machine_reason("cpu")
needs_cpu = pytest.mark.skipif(NO_CPU is not None, reason=str(NO_CPU))
