"""Images of moments, and moments in rational arithmetic."""

from __future__ import annotations

import torch

from pyflocality.moments import Moments

SHAPE = (2, 3, 5)


def byte_images(n: int, seed: int = 0, low: int = 0, high: int = 256) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, *SHAPE), dtype=torch.uint8, generator=generator)


def float_images(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1


def assert_same_bits(left: Moments, right: Moments) -> None:
    assert left.count == right.count
    assert torch.equal(left.mean, right.mean)
    assert torch.equal(left.covariance, right.covariance)
