"""CUDA kernels without a GPU: compiled for the host and run by a simulator of blocks and barriers.

`simulated_cupy` stands in for the part of CuPy that the launch layer uses, so that launchers are
tested whole, from checked arguments to results, on CPU tensors.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

HOST = Path(__file__).resolve().parents[2] / "csrc" / "cuda" / "host"
ENTRY = re.compile(r'extern "C" __global__ void __launch_bounds__\([^{]*?\)\s+(\w+)\(')

need_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or not sys.platform.startswith("linux"),
    reason="the simulator of CUDA kernels is compiled with g++, on Linux",
)


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp(prefix="cuda_simulator"))


@functools.cache
def compile_for_host(code: str, options: tuple[str, ...]) -> ctypes.CDLL:
    """The source of kernels as a library of functions `simulate_<kernel>`."""
    kernels = ENTRY.findall(code)
    text = "\n".join(
        ['#include "simulator.h"', code, *(f"PYFLOCALITY_SIMULATE({name})" for name in kernels)]
    )
    key = hashlib.sha256("\n".join([text, *options]).encode()).hexdigest()[:16]
    source, library = _folder() / f"{key}.cpp", _folder() / f"{key}.so"
    source.write_text(text)
    command = ["g++", "-O1", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    # Constants that only a pragma of the device compiler names.
    command += ["-Wno-unused-variable", "-Werror"]
    done = subprocess.run(
        [*command, f"-I{HOST}", *options, "-o", str(library), str(source)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    return ctypes.CDLL(str(library))


class SimulatedKernel:
    """What `cupy.RawModule.get_function` returns, as far as the launch layer uses it."""

    order = 0

    def __init__(self, library: ctypes.CDLL, name: str) -> None:
        self._run = getattr(library, f"simulate_{name}")
        self.name = name
        self.max_dynamic_shared_size_bytes = 48 * 1024
        self.launches: list[tuple[tuple[int, ...], tuple[int, ...], int]] = []

    def __call__(self, grid, block, args, *, shared_mem=0):
        assert shared_mem <= self.max_dynamic_shared_size_bytes
        assert all(isinstance(arg, np.generic) for arg in args)
        holders = [np.array([arg]) for arg in args]
        pointers = (ctypes.c_void_p * len(args))(*(holder.ctypes.data for holder in holders))
        sizes = (ctypes.c_uint * 3)(*grid, *[1] * (3 - len(grid)))
        code = self._run(
            sizes, block[0], ctypes.c_size_t(shared_mem), SimulatedKernel.order, pointers
        )
        assert code == 0, f"{self.name} wrote beyond its shared memory" if code == 2 else code


class CompileException(Exception):
    """Named as CuPy's."""


class _RawModule:
    def __init__(self, *, code: str, options: tuple[str, ...], backend: str) -> None:
        assert backend == "nvrtc"
        self._code, self._options = code, options

    def get_function(self, name: str) -> SimulatedKernel:
        try:
            library = compile_for_host(self._code, self._options)
        except RuntimeError as error:
            raise CompileException(str(error)) from error
        return SimulatedKernel(library, name)


@contextmanager
def _nothing(*arguments: object) -> Iterator[None]:
    yield


def simulated_cupy() -> types.ModuleType:
    """A module to enter as `sys.modules["cupy"]`."""
    module = types.ModuleType("cupy")
    module.RawModule = _RawModule
    module.cuda = types.SimpleNamespace(
        Device=_nothing,
        Stream=types.SimpleNamespace(from_external=_nothing),
        compiler=types.SimpleNamespace(CompileException=CompileException),
    )
    return module
