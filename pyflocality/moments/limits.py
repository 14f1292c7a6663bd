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
    if isinstance(of, Moments):
        if of._eigen is not None:
            return
    else:
        block = min(BLOCK_BYTES, len(of) * of.copies * values)
        if of.dtype != torch.uint8:
            # As float64, its differences from the mean, and their products.
            block = 2 * min(BLOCK_BYTES, 8 * block) + square
        least = square + max(least, block)
    what = f"moments of {values} values and their eigenvectors"
    check_fits(least, what, of.device, memory_budget)
