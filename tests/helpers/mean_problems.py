"""Problems of posterior means: noisy images near a training image, each at a level of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from truth import random_images, values_of

SHAPE = (3, 6, 5)
D = 90
SIGMA = torch.tensor([0.05, 0.4, 3.0])
ALPHA = torch.tensor([1.0, 0.8, 0.3])


@pytest.fixture
def problem(rng: torch.Generator) -> Callable[..., tuple[Tensor, Tensor]]:
    def make(
        dtype: torch.dtype = torch.uint8, count: int = 37, batch: int = 3
    ) -> tuple[Tensor, Tensor]:
        images = random_images(rng, count, SHAPE, dtype)
        clean = torch.from_numpy(values_of(images[:1])).expand(batch, -1, -1, -1)
        noise = torch.randn(batch, *SHAPE, generator=rng)
        x = ALPHA[:batch, None, None, None] * clean + SIGMA[:batch, None, None, None] * noise
        return x, images

    return make
