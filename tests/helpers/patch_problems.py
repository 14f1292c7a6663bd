"""Problems of posteriors over patches from anywhere."""

from __future__ import annotations

import pytest
import torch
from truth import random_images

import pyflocality as pf

boundaries = pytest.mark.parametrize("boundary", ["circular", "broken"])
SIGMA, ALPHA = torch.tensor([0.1, 0.8]), torch.tensor([1.0, 0.6])


def problem(rng, shape=(2, 5, 6), count=9, dtype=torch.uint8):
    images = random_images(rng, count, shape, dtype)
    x = pf.TrainingSet(images[:1]).values(dtype=torch.float64).repeat(2, 1, 1, 1)
    x = ALPHA[:, None, None, None] * x
    x = x + SIGMA[:, None, None, None] * torch.randn(x.shape, generator=rng)
    return x, images
