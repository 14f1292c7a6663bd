"""What the launchers of all Triton kernels share."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality.kernels.devices import LARGE_SHARED_BYTES, shared_bytes_of


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
