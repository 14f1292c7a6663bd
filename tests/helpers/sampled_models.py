"""Models whose samples are known."""

from __future__ import annotations

import math

import torch


class Gaussian:
    """The exact denoiser of the Gaussian data set N(mean, V diag(variance) V^T)."""

    def __init__(self, image_shape=(1, 2, 3), dtype=torch.float64, seed=1):
        generator = torch.Generator().manual_seed(seed)
        self.image_shape, self.device = image_shape, torch.device("cpu")
        size = math.prod(image_shape)
        self.mean = 0.3 * torch.randn(size, generator=generator, dtype=dtype)
        self.variance = torch.logspace(-2, 0, size, dtype=dtype)
        square = torch.randn(size, size, generator=generator, dtype=dtype)
        self.vectors = torch.linalg.qr(square).Q

    def in_eigenbasis(self, x, alpha, factor):
        """alpha * mean + V diag(factor) V^T (x - alpha mean)."""
        centred = (x.flatten(1) - alpha * self.mean) @ self.vectors
        return (centred * factor) @ self.vectors.T

    def __call__(self, x, sigma, alpha):
        gain = alpha * self.variance / (alpha**2 * self.variance + sigma**2)
        return (self.mean + self.in_eigenbasis(x, alpha, gain)).reshape(x.shape)

    def transport(self, x, level, next_level):
        """The probability-flow map between two levels: deviations scale with the state's."""
        (alpha, sigma), (next_alpha, next_sigma) = level, next_level
        here = alpha**2 * self.variance + sigma**2
        there = next_alpha**2 * self.variance + next_sigma**2
        moved = next_alpha * self.mean + self.in_eigenbasis(x, alpha, (there / here).sqrt())
        return moved.reshape(x.shape)


def _step(sampler, x, x0, level, next_level, **options):
    moved, answer = sampler.step(lambda *_: x0, x, level, next_level, **options)
    assert answer is x0
    return moved
