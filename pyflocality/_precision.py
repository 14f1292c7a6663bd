"""What precision torch computes in."""

from __future__ import annotations

import torch


def plain_products() -> bool:
    """Whether products of float32 matrices are those of float32, not of a coarser kind."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:
        # Precisions set one by one, of which at least one is coarser.
        return False
