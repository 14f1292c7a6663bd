"""Covariance sums in integer arithmetic."""

from __future__ import annotations

import numpy as np
import torch


def random_images(n: int, values: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * n + values)
    return torch.randint(0, 256, (n, values), dtype=torch.uint8, generator=generator)


def truth(images: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Upper triangle of the products and sums of the centred bytes, in int64."""
    centred = images.numpy().astype(np.int64) - 128
    return np.triu(np.einsum("ia,ib->ab", centred, centred)), centred.sum(0)


def zeros(values: int) -> tuple[torch.Tensor, torch.Tensor]:
    return (
        torch.zeros(values, values, dtype=torch.int64),
        torch.zeros(values, dtype=torch.int64),
    )
