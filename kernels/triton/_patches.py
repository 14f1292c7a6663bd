"""Patches of images as the equivariant kernel reads them: layout, classes, norms in digits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
import triton
from torch import Tensor

from pyflocality._support.budget import images_per_chunk, memory_budget_bytes
from pyflocality.posterior.problem import PosteriorProblem

# Numbers a step of the tensor cores takes.
STEP = 16
# Bits of a digit: every smaller integer is exact in float16.
DIGIT_BITS = 11
# Images converted at a time, in bytes of float32.
_CONVERTED_BYTES = 64 * 2**20
# Patches of a launch: their numbers are 32-bit.
_MOST_KEYS = 2**31 - 2**20


@dataclass(frozen=True)
class Geometry:
    """Where patches lie in the padded images.

    Attributes:
        shape: (C, H, W) of an image.
        window: Side of a patch.
        padding: Pixels added on each side.
    """

    shape: tuple[int, int, int]
    window: int
    padding: int

    @property
    def channels(self) -> int:
        """Channels as stored: a power of two, four bytes at least."""
        return max(2, triton.next_power_of_2(self.shape[0]))

    @property
    def run(self) -> int:
        """Length of a run."""
        return max(STEP, triton.next_power_of_2(self.window * self.channels))

    @property
    def padded(self) -> tuple[int, int]:
        """Height and width with padding."""
        return self.shape[1] + 2 * self.padding, self.shape[2] + 2 * self.padding

    @property
    def patches(self) -> tuple[int, int]:
        """Rows and columns of patches of an image."""
        rows, columns = (side - self.window + 1 for side in self.padded)
        return rows, columns

    @property
    def bytes_per_image(self) -> int:
        """Bytes of an image's values and norms as the kernel reads them."""
        return 2 * self.channels * math.prod(self.padded) + 8 * math.prod(self.patches)


@dataclass(frozen=True)
class Group:
    """Classes of queries of one size, each with its own rectangle of patches.

    Attributes:
        queries: Pixels of the queries of each class, int64 [classes, Q].
        origins: Row and column of the first patch of each class, int32 [classes, 2].
        rows: Rows of patches.
        columns: Columns of patches.
    """

    queries: Tensor
    origins: Tensor
    rows: int
    columns: int


def query_windows(x: Tensor, geometry: Geometry, circular: bool) -> Tensor:
    """Windows around all pixels, channels innermost and filled up: [b, H W, k, k CHANNELS]."""
    half, side = geometry.window // 2, geometry.window
    missing = geometry.channels - x.shape[1]
    padded = F.pad(x, (half,) * 4, mode="circular" if circular else "constant")
    windows = padded.unfold(2, side, 1).unfold(3, side, 1)
    # [b, C, H, W, k, k] -> [b, H, W, k, k, CHANNELS]
    windows = F.pad(windows.permute(0, 2, 3, 4, 5, 1), (0, missing))
    return windows.reshape(len(x), -1, side, side * geometry.channels)


def query_groups(geometry: Geometry, circular: bool, device: torch.device) -> Iterator[Group]:
    """Classes of queries and their patches, by the size of their rectangles."""
    _, height, width = geometry.shape
    if circular:
        queries = torch.arange(height * width, device=device)[None]
        origins = torch.zeros(1, 2, dtype=torch.int32, device=device)
        yield Group(queries, origins, *geometry.patches)
        return
    half = geometry.window // 2
    for rows in _intervals(height, half):
        for columns in _intervals(width, half):
            row = torch.tensor(rows).repeat_interleave(len(columns), 0)
            column = torch.tensor(columns).repeat(len(rows), 1)
            inside = row[:, :, None] * width + column[:, None, :]
            origins = torch.stack([row[:, 0], column[:, 0]], 1).to(torch.int32)
            yield Group(
                inside.flatten(1).to(device), origins.to(device), row.shape[1], column.shape[1]
            )


def _intervals(length: int, half: int) -> list[list[list[int]]]:
    """Places along an axis that are of one class: all interior ones, and each other one alone."""
    interior = list(range(half, length - half))
    alone = [[place] for place in range(length) if place not in interior]
    return [kind for kind in ([interior] if interior else [], alone) if kind]


def converted_images(
    problem: PosteriorProblem, geometry: Geometry
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Chunks of images as the kernel reads them, with the number of images in each."""
    images, (height, width) = problem.images, geometry.padded
    budget = max(1, memory_budget_bytes(problem.memory_budget) // 2)
    chunk = problem.chunk_size or images_per_chunk(budget, geometry.bytes_per_image, len(images))
    chunk = max(1, min(chunk, _MOST_KEYS // math.prod(geometry.patches)))
    converted = max(1, _CONVERTED_BYTES // (4 * height * width * geometry.channels))
    for block in images.split(chunk):
        # Runs of the last patches reach beyond the last image, where queries are zero: NaN there
        # would not vanish.
        size = len(block) * height * width * geometry.channels
        keys = torch.empty(size + 8 * geometry.run, dtype=torch.float16, device=images.device)
        keys[size:] = 0
        norm_size = 4 * len(block) * math.prod(geometry.patches)
        norms = torch.empty(norm_size + STEP, dtype=torch.float16, device=images.device)
        norms[norm_size:] = 0
        pixels = keys[:size].view(len(block), height, width, geometry.channels)
        digits = norms[:norm_size].view(len(block), *geometry.patches, 4)
        for first in range(0, len(block), converted):
            some = slice(first, first + converted)
            _convert(block[some], pixels[some], digits[some], geometry)
        yield keys, norms, len(block)


def _convert(stored: Tensor, pixels: Tensor, digits: Tensor, geometry: Geometry) -> None:
    """Write pixels [n, rows, columns, CHANNELS] and the digits of the patches' norms."""
    values = 2.0 * stored.float() - 255.0
    values = F.pad(values, (geometry.padding,) * 4)
    pixels.zero_()
    pixels[..., : values.shape[1]] = values.permute(0, 2, 3, 1)
    # Box sums of integers: exact in float64, and windows overlap, so a running sum is cheapest.
    norm = values.square().sum(1, dtype=torch.float64)
    for axis in (1, 2):
        running = F.pad(norm.cumsum(axis), (1, 0) if axis == 2 else (0, 0, 1, 0))
        length = running.shape[axis] - geometry.window
        norm = running.narrow(axis, geometry.window, length) - running.narrow(axis, 0, length)
    norm = norm.to(torch.int64)
    for place in range(4):
        digits[..., place] = (norm >> (DIGIT_BITS * place)) & (2**DIGIT_BITS - 1)
