"""What precision operations may compute in, and what torch does."""

from __future__ import annotations

from typing import Literal, get_args

import torch

Precision = Literal["exact", "auto"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
# Error of an answer in [-1, 1], against float64, that "auto" permits. Kernels estimate theirs: the
# estimates held on CIFAR-10 and are no proven bounds.
TOLERANCE = 1e-3


def plain_products() -> bool:
    """Whether products of float32 matrices are those of float32, not of a coarser kind."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # Precisions set one by one, of which at least one is coarser.
        return False
