"""What the launchers of all Triton kernels share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality.kernels.triton.limits import LARGE_SHARED_BYTES, shared_bytes_of

# Factors of distances stay positive, normal float32 numbers: their product with a distance of
# zero is zero, with an infinite one infinite (see `pyflocality.posterior.state`).
SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-126, 2.0**120


@dataclass(frozen=True)
class Launch:
    """How the compiler lays out one kernel.

    Attributes:
        num_warps: Warps of a program.
        num_stages: Depth of the software pipeline.
        maxnreg: Most registers a thread may have; None leaves it to the compiler.
    """

    num_warps: int
    num_stages: int
    maxnreg: int | None = None

    def options(self) -> dict[str, int]:
        """Keyword arguments of a launch."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options if self.maxnreg is None else options | {"maxnreg": self.maxnreg}


def generation(device: torch.device) -> int:
    """Column of the shipped tables for a device: 90 with Hopper's shared memory, else 80."""
    if device.type != "cuda":
        # The interpreter runs what the newer generation would.
        return 90
    return 90 if shared_bytes_of(device) >= LARGE_SHARED_BYTES else 80


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on a tensor's device, on torch's current stream there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def finite_power(scale: Tensor) -> Tensor:
    """Factor of a distance in the power of two, from that in the power of e; within float32."""
    return (scale * math.log2(math.e)).clamp(SMALLEST_FACTOR, LARGEST_FACTOR)
