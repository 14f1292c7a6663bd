"""Compilation and launch of CUDA kernels through CuPy.

A kernel is compiled by NVRTC for the GPU of its first use and kept on disk by CuPy, keyed by
source, options, architecture and compiler. It runs on torch's current stream of its device, on
torch's memory by pointer: nothing is copied, and nothing waits. The text of a kernel is one file,
with the headers it includes put in their place: NVRTC gets no include path, so an installed wheel,
a checkout and a zip archive behave alike, and what CuPy keeps on disk is keyed by every line that
was compiled.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from torch import Tensor

PACKAGE = "pyflocality.csrc"
_INCLUDE = re.compile(r'^#include "(pyflocality/[\w/]+\.h)"$', re.MULTILINE)
# What a block may use without asking for more.
_DEFAULT_SHARED = 48 * 1024


class CudaKernelError(RuntimeError):
    """A CUDA kernel could not be compiled or launched.

    Attributes:
        kernel: Its name.
        cause: What the compiler or the driver said.
    """

    def __init__(self, kernel: str, action: str, cause: BaseException) -> None:
        self.kernel, self.cause = kernel, f"{type(cause).__name__}: {cause}"
        super().__init__(f"CUDA kernel {kernel!r} could not be {action}: {self.cause}")


@dataclass(frozen=True)
class Launch:
    """A kernel and the sizes to run it with.

    Attributes:
        source: Stem of the file in `csrc/cuda`.
        kernel: Name of the entry point.
        grid: Blocks along x, y and z.
        threads: Threads of a block.
        shared_bytes: Dynamic shared memory of a block.
        macros: Constants of the compilation.
    """

    source: str
    kernel: str
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int = 0
    macros: Mapping[str, int] = field(default_factory=dict)


def run(launch: Launch, first: Tensor, *others: Tensor | int) -> None:
    """Launch a kernel on torch's current stream of a device; a grid without blocks is done.

    Args:
        launch: The kernel and its sizes.
        first: First argument, on the device of all tensors. Tensors, which must be contiguous,
            are passed by pointer.
        others: Other arguments; whole numbers are passed as 64-bit integers.

    Raises:
        CudaKernelError: NVRTC or the driver refused; names the kernel and the cause.
    """
    # An empty batch, which the driver would refuse.
    if 0 in launch.grid:
        return
    passed = tuple(_argument(value) for value in (first, *others))
    index = device_index(first.device)
    try:
        import cupy

        with cupy.cuda.Device(index), _stream(current_stream(first.device), index):
            kernel = _kernel(
                *(launch.source, launch.kernel, compile_options(launch.macros)),
                *(launch.shared_bytes, index),
            )
            kernel(launch.grid, (launch.threads,), passed, shared_mem=launch.shared_bytes)
    except CudaKernelError:
        raise
    except Exception as error:
        raise CudaKernelError(launch.kernel, "launched", error) from error


class _Handle:
    """A stream by the protocol that CuPy takes it by."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._handle


def _stream(handle: int, device: int) -> Any:  # noqa: ANN401
    import cupy

    if hasattr(cupy.cuda.Stream, "from_external"):
        return cupy.cuda.Stream.from_external(_Handle(handle))
    # Before CuPy 14, which warns of it.
    return cupy.cuda.ExternalStream(handle, device)


def device_index(device: torch.device) -> int:
    """Number of a CUDA device."""
    return torch.cuda.current_device() if device.index is None else device.index


def current_stream(device: torch.device) -> int:
    """Handle of torch's current stream of a device."""
    return torch.cuda.current_stream(device).cuda_stream


def _argument(value: Tensor | int) -> np.generic:
    if not isinstance(value, Tensor):
        return np.int64(value)
    if not value.is_contiguous():
        raise ValueError(f"kernels read contiguous memory, got strides {value.stride()}")
    return np.uintp(value.data_ptr())


# One entry per device: attributes of a kernel, such as the shared memory it may ask for, are the
# device's.
@functools.lru_cache(maxsize=256)
def _kernel(
    source: str, name: str, options: tuple[str, ...], shared_bytes: int, device: int
) -> Any:  # noqa: ANN401
    import cupy

    try:
        kernel = cupy.RawModule(
            code=kernel_source(source), options=options, backend="nvrtc"
        ).get_function(name)
        if shared_bytes > _DEFAULT_SHARED:
            kernel.max_dynamic_shared_size_bytes = shared_bytes
    except Exception as error:
        raise CudaKernelError(name, "compiled", error) from error
    return kernel


@functools.cache
def kernel_source(name: str) -> str:
    """The source `csrc/cuda/<name>.cu` with every header of the package in place, once.

    Raises:
        FileNotFoundError: The package holds no such source or header.
    """
    root = files(PACKAGE)
    seen: set[str] = set()

    def expand(text: str) -> str:
        return _INCLUDE.sub(include, text)

    def include(match: re.Match[str]) -> str:
        header = match.group(1)
        if header in seen:
            return ""
        seen.add(header)
        text = root.joinpath(f"include/{header}").read_text(encoding="utf-8")
        return expand(text.replace("#pragma once\n", ""))

    return expand(root.joinpath(f"cuda/{name}.cu").read_text(encoding="utf-8"))


def compile_options(macros: Mapping[str, int]) -> tuple[str, ...]:
    """Options of the compiler: the language, and the constants of the kernel."""
    return ("-std=c++17", *(f"-D{name}={value}" for name, value in sorted(macros.items())))
