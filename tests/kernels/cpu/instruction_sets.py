"""The instruction sets that the native kernels have on this machine."""

from __future__ import annotations

from native_cpu import NO_CPU

from pyflocality._support.native import native_module

ISAS = native_module().instruction_sets() if NO_CPU is None else []
