"""What moments with their eigenvectors take, held against budgets and the memory there is."""

from __future__ import annotations

import math

import torch

from pyflocality.data import TrainingSet
from pyflocality.moments.eigen import check_fits, eigen_bytes
from pyflocality.moments.moments import Moments
from pyflocality.moments.sums import BLOCK_BYTES


def check_moments_fit(memory_budget: int | str | None, of: TrainingSet | Moments) -> None:
    """Refuse moments with eigenvectors that a budget or the memory there is cannot hold.

    Args:
        memory_budget: Working memory; None follows the environment variable. Where neither is
            given, the memory there is is the limit.
        of: The training set whose moments are to be made; or the moments where they are at hand:
            they are no working memory, nor are their eigenvectors where they have been asked for.

    Raises:
        ValueError: They take more than the budget; the least is named.
        MemoryError: They take more than there is.
    """
    values = math.prod(of.image_shape)
    square = 8 * values**2
    least = square + eigen_bytes(values)
    if isinstance(of, TrainingSet):
        least = max(square + least, totals_bytes(of))
    elif of._eigen is not None:
        return
    what = f"moments of {values} values and their eigenvectors"
    check_fits(least, what, of.device, memory_budget)


def totals_bytes(data: TrainingSet) -> int:
    """Most bytes that counting the moments of a set takes, their totals included."""
    square = 8 * data.num_values**2
    block = min(BLOCK_BYTES, len(data) * data.copies * data.num_values)
    if data.dtype != torch.uint8:
        # As float64, its differences from the mean, and their products.
        block = 2 * min(BLOCK_BYTES, 8 * block) + square
    return square + block
