"""A problem in the units in which its images are stored, as the kernels take it.

For bytes u the noisy image becomes 127.5 (x / alpha + 1) and its squared distances to u are
(127.5 / alpha)^2 times those of x to alpha v; for floats they are (1 / alpha)^2 times.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality.kernels.devices import LARGEST_GRID
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.tangents import jacobian_factor
from pyflocality.posterior.value_images import value_blocks
from pyflocality.storage.reader import BYTES_PER_UNIT, Reader, values_to_bytes

# Factors of distances in the power of two stay positive, normal float32 numbers: their product
# with a distance of zero is zero, with an infinite one infinite, as `posterior.state` wants it.
SMALLEST_FACTOR, LARGEST_FACTOR = 2.0**-126, 2.0**120
# Images at a time where they are read from a file that exceeds the memory budget, or are copied:
# where their memory is not contiguous or holds no such copy of them.
_BLOCK_BYTES = 32 * 2**20


def power_factor(scale: Tensor) -> Tensor:
    """Factor of a distance in the power of two, float32, from that in the power of e."""
    return (scale * math.log2(math.e)).clamp(SMALLEST_FACTOR, LARGEST_FACTOR).float()


@dataclass(frozen=True)
class StoredProblem:
    """Noisy images, factors and training images in stored units.

    Attributes:
        problem: The problem in the units of the formulas.
    """

    problem: PosteriorProblem

    @property
    def exact(self) -> Tensor:
        """Noisy images over alpha, float64 [B, C, H, W]."""
        noisy = self.problem.x.detach().double() / self.problem.alpha[:, None, None, None]
        return values_to_bytes(noisy) if self.has_bytes else noisy

    @cached_property
    def noisy(self) -> Tensor:
        """The same as the kernels read them, float32, contiguous."""
        return self.exact.float().contiguous()

    @property
    def centre(self) -> Tensor:
        """The noisy images cut to the range of stored values, float32 [B, C, H, W]."""
        return self.noisy.clamp(0.0, 255.0) if self.has_bytes else self.noisy.clamp(-1.0, 1.0)

    @cached_property
    def has_bytes(self) -> bool:
        """Whether the training images are stored as bytes."""
        return self.problem.images.dtype == torch.uint8

    @property
    def step(self) -> float:
        """What a stored value of 1 is in the units of the formulas."""
        return 1.0 / BYTES_PER_UNIT if self.has_bytes else 1.0

    @property
    def shift(self) -> float:
        """What a stored value of 0 is in the units of the formulas."""
        return -1.0 if self.has_bytes else 0.0

    @cached_property
    def unit(self) -> Tensor:
        """A distance of the formulas is unit^2 times the stored one, float64 [B]."""
        return self.problem.alpha / BYTES_PER_UNIT if self.has_bytes else self.problem.alpha

    @cached_property
    def factor(self) -> Tensor:
        """Weights are 2^(-factor distance) with stored distances, float32 [B]."""
        return power_factor(self.problem.scale * self.unit.square())

    @property
    def scale(self) -> Tensor:
        """Weights are exp(-scale distance) with the same factor: what joins states, float64 [B]."""
        return self.factor.double() * math.log(2.0)

    @property
    def slope(self) -> Tensor:
        """Factor from covariances of stored values to derivatives of the mean, float64 [B]."""
        return jacobian_factor(self.problem) * self.step**2

    def means(self, stored: Tensor) -> Tensor:
        """Means of the formulas from those of stored values, [B, A, ..]."""
        if not self.problem.answers_image:
            return stored
        image, further = stored.tensor_split([1], 1)
        return torch.cat([image * self.step + self.shift, further], 1)

    def cotangents(self, cotangents: Tensor) -> Tensor:
        """Cotangents [K, B, (A,) C, H, W] of answers as those of stored ones: [B, K, A D]."""
        along = cotangents.detach().float().flatten(2).transpose(0, 1)
        if not self.problem.answers_image or self.problem.values is None:
            return along
        image, further = along.tensor_split([self.problem.images[0].numel()], 2)
        return torch.cat([image * self.step, further], 2)

    def derivatives(self, sums: Tensor) -> Tensor:
        """Vector-Jacobian products [K, B, C, H, W] from the sums of a second pass, [B, K, D]."""
        # The step of the image's answers is in their cotangents where there are others.
        slope = self.slope if self.problem.values is None else self.slope / self.step
        products = (sums * slope[:, None, None]).transpose(0, 1)
        return products.unflatten(2, self.problem.images.shape[1:])

    def part(self, rows: slice | Tensor) -> StoredProblem:
        """The problem of some of the noisy images."""
        problem = self.problem
        x, alpha, scale = problem.x[rows], problem.alpha[rows], problem.scale[rows]
        return StoredProblem(replace(problem, x=x, alpha=alpha, scale=scale))

    def parts(self, bytes_each: int, multiple: int = 1) -> list[tuple[slice, StoredProblem]]:
        """As many noisy images at a time as fit the budget and a grid, and which they are.

        Args:
            bytes_each: Working memory for each of them.
            multiple: What their number is a multiple of, but for the last ones.

        Returns:
            At least one part: it is empty where there are no noisy images.
        """
        together = max(1, self.budget // (bytes_each * multiple)) * multiple
        step, batch = min(together, LARGEST_GRID), len(self.problem.x)
        slices = [slice(first, first + step) for first in range(0, max(1, batch), step)]
        return [(rows, self.part(rows)) for rows in slices]

    def distances(self, minimum: Tensor) -> Tensor:
        """Distances of the formulas from stored ones [B, Q]."""
        return minimum * self.unit.square()[:, None]

    def values(self, weighted: Tensor, total: Tensor) -> Tensor:
        """Sums of the formulas' values [B, Q, V] from those of stored ones and weights [B, Q]."""
        if not self.has_bytes or not self.problem.answers_image:
            return weighted
        # Value images behind those of the image have no stored units.
        image, further = weighted.tensor_split([weighted.shape[-1] // self.problem.answered], -1)
        image = image / BYTES_PER_UNIT - total[..., None]
        return torch.cat([image, further], -1) if further.shape[-1] > 0 else image

    @property
    def without_values(self) -> StoredProblem:
        """The problem whose answers are the images alone."""
        return StoredProblem(replace(self.problem, values=None, with_image=False))

    @cached_property
    def budget(self) -> int:
        """Working memory beside the block that images are read or copied into, bytes."""
        budget = memory_budget_bytes(self.problem.memory_budget)
        return budget if self._lies_ready else budget - self._block * self._bytes_each

    def rows(self, among: Tensor | None = None) -> Iterator[Tensor]:
        """The images and their copies as stored, [n, C H W] at a time, contiguous.

        `among` are the positions of those that are read, int64; None for all.
        """
        reader = self.problem.reader
        if among is not None:
            for block in reader.blocks_at(among, self.problem.chunk_size or self._copied):
                yield block.flatten(1)
            return
        for block in reader.blocks(self._block):
            yield block.contiguous().flatten(1)

    def pairs(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The same, with their value images [n, R, C H W], if there are any."""
        problem = self.problem
        if problem.values is None:
            return zip(self.rows(), itertools.repeat(None))
        count, budget = len(problem.images), problem.memory_budget
        blocks = value_blocks(problem.values, count, self._block, budget)
        flat = (values.contiguous().flatten(2) for values in blocks)
        return zip(self.rows(), flat, strict=True)

    def blocks(self) -> Iterator[Tensor]:
        """The same as [n, C, H, W]."""
        for rows in self.rows():
            yield rows.unflatten(1, self.problem.images.shape[1:])

    @cached_property
    def _lies_ready(self) -> bool:
        """Whether images and values are contiguous in memory, copies aside."""
        reader, values = self.problem.reader, self.problem.values
        ready = self.problem.images.is_contiguous() and not reader.from_file
        if values is None:
            return ready
        read = Reader(values, None, self.problem.memory_budget).from_file
        return ready and values.is_contiguous() and not read

    @property
    def _block(self) -> int:
        """Images that are read, or handed to a kernel, at a time: at most all of one copy."""
        count = len(self.problem.images)
        whole = self._lies_ready and self.problem.augmentation is None
        return min(self.problem.chunk_size or (count if whole else self._copied), count)

    @property
    def _bytes_each(self) -> int:
        """Bytes of an image with its values."""
        values = self.problem.values
        return self.problem.images[0].nbytes + (0 if values is None else values[0].nbytes)

    @cached_property
    def _copied(self) -> int:
        """Images of a block that is read or copied."""
        most = min(_BLOCK_BYTES, memory_budget_bytes(self.problem.memory_budget) // 4)
        return max(1, most // self._bytes_each)
