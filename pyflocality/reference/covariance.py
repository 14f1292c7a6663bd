"""Exact covariance sums of 8-bit images, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

# Working memory of one block: the centred values of its images, and a band of products.
_BLOCK_BYTES = 64 * 2**20


def scan(images: Tensor, gram: Tensor, total: Tensor) -> None:
    """Add centred sums to `gram` and `total`, as `pyflocality.ops.accumulate_covariance`.

    The products are taken in float64, where every partial sum is an integer below 2^53 and
    therefore exact in any order of summation; no setting of float32 matrix products matters.
    """
    values = images.shape[1]
    for block in images.split(max(1, _BLOCK_BYTES // (8 * values))):
        centred = block.to(torch.float64).sub_(128)
        total += centred.sum(0).to(torch.int64)
        add_upper_product(gram, centred)


def add_upper_product(gram: Tensor, rows: Tensor) -> None:
    """Add the upper triangle of rows^T rows to `gram` in place, a band of rows at a time.

    Args:
        gram: float64 or int64, [D, D]. Below the diagonal it is left as it is.
        rows: float64, [n, D].
    """
    values = rows.shape[1]
    band = max(1, _BLOCK_BYTES // (8 * values))
    for first in range(0, values, band):
        product = rows[:, first : first + band].T @ rows[:, first:]
        gram[first : first + band, first:] += product.triu_().to(gram.dtype)
