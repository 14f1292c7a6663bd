"""Compilation and launch of CUDA kernels through CuPy.

A kernel is compiled by NVRTC for the GPU of its first use and kept on disk by CuPy, keyed by
source, options, architecture and compiler. It runs on torch's current stream of its device, on
torch's memory by pointer: nothing is copied, and nothing waits.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyflocality.kernels.cuda.sources import compile_options, kernel_source

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


def run(launch: Launch, device: torch.device, arguments: Sequence[Tensor | int]) -> None:
    """Launch a kernel on torch's current stream of a device; a grid without blocks is done.

    Args:
        launch: The kernel and its sizes.
        device: Device of the tensors.
        arguments: Tensors, which must be contiguous, are passed by pointer; whole numbers as
            64-bit integers.

    Raises:
        CudaKernelError: NVRTC or the driver refused; names the kernel and the cause.
    """
    # An empty batch, which the driver would refuse.
    if 0 in launch.grid:
        return
    passed = tuple(_argument(value) for value in arguments)
    index = device_index(device)
    try:
        import cupy

        with cupy.cuda.Device(index), _stream(current_stream(device), index):
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
