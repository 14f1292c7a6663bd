"""What the launchers of all Triton kernels share."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

# Factors of distances stay positive, normal float32 numbers: their product with a distance of
# zero is zero, with an infinite one infinite (see `pyflocality.reference.state`).
SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-126, 2.0**120
# Programs along the second and third dimension of a grid.
LARGEST_GRID = 65535
# Shared memory that a block must be able to have for the tables of Hopper, bytes.
LARGE_SHARED = 227 * 1024


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
    # Not by the capability alone: consumer GPUs of later generations have less.
    found = torch.cuda.get_device_properties(device)
    # Older versions of torch do not tell; the generations 9 and 10 are those of data centres.
    guess = LARGE_SHARED if found.major in (9, 10) else 0
    shared = getattr(found, "shared_memory_per_block_optin", guess)
    return 90 if shared >= LARGE_SHARED else 80


def on_device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Launch on a tensor's device, on torch's current stream there."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def finite_power(scale: Tensor) -> Tensor:
    """Factor of a distance in the power of two, from that in the power of e; within float32."""
    return (scale * math.log2(math.e)).clamp(SMALLEST_FACTOR, LARGEST_FACTOR)


def version_of(images: Tensor) -> int | None:
    """Version of a tensor, which changes with its values; None where nothing counts it.

    Tensors made in torch's inference mode have none: what is derived from them cannot be kept.
    """
    return None if images.is_inference() else images._version
