"""Exact covariance sums of 8-bit images on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._support.native import native_module


def scan(
    images: Tensor, gram: Tensor, total: Tensor, *, instruction_set: str | None = None
) -> None:
    """Add centred sums to contiguous `gram` and `total`, as `ops.accumulate_covariance`.

    They are the same with each instruction set.
    """
    native_module().accumulate_covariance(
        images.contiguous().numpy(),
        gram.numpy(),
        total.numpy(),
        threads=torch.get_num_threads(),
        isa=instruction_set or "",
    )
