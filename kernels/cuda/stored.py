"""A problem in the units in which its images are stored, as the kernels take it.

For bytes u the noisy image becomes 127.5 (x / alpha + 1) and its squared distances to u are
(127.5 / alpha)^2 times those of x to alpha v; for floats they are (1 / alpha)^2 times.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.kernels.cuda.geometry import WindowShape
from pyflocality.kernels.triton.limits import LARGEST_GRID
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.tangents import jacobian_factor

# Weights are powers of two of distances; the factor must stay positive and finite in float32.
_SMALLEST_FACTOR, _LARGEST_FACTOR = 2.0**-126, 2.0**120
# Bytes of images copied at a time where their memory is not contiguous.
_COPIED_BYTES = 64 * 2**20


@dataclass(frozen=True)
class StoredProblem:
    """Noisy images and factors in stored units.

    Attributes:
        noisy: Noisy images over alpha, float32 [B, C, H, W].
        factor: Weights are 2^(-factor distance), float32 [B].
        unit: A distance in the units of the formulas is unit^2 times the stored one, float64 [B].
        slope: Factor from covariances of stored values to derivatives of the posterior mean,
            alpha / (sigma^2 temperature) in those units, float64 [B].
        step: A stored value is `step` of the formulas' units, 1 / 127.5 for bytes.
        shift: And 0 there is `shift` in the formulas' units, -1 for bytes.
        images: Training images as stored, [N, C, H, W].
        chunk_size: Training images at a time, or None.
    """

    noisy: Tensor
    factor: Tensor
    unit: Tensor
    slope: Tensor
    step: float
    shift: float
    images: Tensor
    chunk_size: int | None

    def part(self, chosen: slice) -> StoredProblem:
        """The problem of some of the noisy images."""
        return StoredProblem(
            self.noisy[chosen],
            self.factor[chosen],
            self.unit[chosen],
            self.slope[chosen],
            self.step,
            self.shift,
            self.images,
            self.chunk_size,
        )

    def blocks(self) -> Iterator[Tensor]:
        """The training images in contiguous pieces, copied only where they are not."""
        images = self.images
        if self.chunk_size is None and images.is_contiguous():
            yield images
            return
        for part in images.split(self.chunk_size or max(1, _COPIED_BYTES // images[0].nbytes)):
            yield part.contiguous()

    def shape(self, images: Tensor, window: int, tangents: int = 0) -> WindowShape:
        """What a window kernel must be compiled for to read these images."""
        channels, height, width = images.shape[1:]
        quad_bytes = 4 * images.element_size()
        vector = width % 4 == 0 and images.data_ptr() % quad_bytes == 0
        stored_bytes = images.dtype == torch.uint8
        return WindowShape(channels, height, width, window, stored_bytes, vector, tangents)


def stored_problem(problem: PosteriorProblem) -> StoredProblem:
    """The problem in the units of its images; everything of size B or B D is new memory."""
    alpha, scale = problem.alpha, problem.scale
    stored_bytes = problem.images.dtype == torch.uint8
    step, shift = (1.0 / 127.5, -1.0) if stored_bytes else (1.0, 0.0)
    unit = alpha * step
    noisy = problem.x.detach().double() / alpha[:, None, None, None]
    factor = scale * unit.square() * math.log2(math.e)
    largest = torch.finfo(torch.float32).max
    return StoredProblem(
        ((noisy - shift) / step).float().contiguous(),
        factor.clamp(_SMALLEST_FACTOR, _LARGEST_FACTOR).float().contiguous(),
        unit,
        jacobian_factor(problem).clamp(max=largest) * step**2,
        step,
        shift,
        problem.images,
        problem.chunk_size,
    )


def batch_parts(
    problem: StoredProblem, budget: int | str | None, bytes_each: int
) -> Sequence[slice]:
    """Slices of the batch whose working memory fits into a budget."""
    return grid_parts(len(problem.noisy), memory_budget_bytes(budget) // bytes_each)


def grid_parts(batch: int, at_a_time: int) -> Sequence[slice]:
    """Slices of a batch that a grid can count; one, empty, of an empty batch."""
    step = min(max(1, at_a_time), LARGEST_GRID)
    return [slice(start, start + step) for start in range(0, max(1, batch), step)]
