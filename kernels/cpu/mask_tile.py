"""Entries of a matrix product that reach a cutoff, on the CPU."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

from pyflocality._support.native import native_module


class Marked(NamedTuple):
    """What came of a tile.

    Attributes:
        bits: Whether an entry reaches the cutoff of its column, uint8 [n, ceil(m / 8)].
        near: How many entries lie within 1e-6 of their cutoff, as a share of it.
    """

    bits: np.ndarray
    near: int


def mark(
    values: Tensor,
    slack: tuple[Tensor, Tensor],
    cutoffs: Tensor,
    product: tuple[Tensor, Tensor],
    places: Tensor,
    first_column: int,
    *,
    most_left_open: int,
    instruction_set: str | None = None,
) -> Marked | None:
    """The entries of F diag(c) F^T, in the given rows and columns from one on, that reach a cutoff.

    Args:
        values: The entries in single precision, float32 [n, m], contiguous.
        slack: They are off by the product of these at most, float32 [n] and [m].
        cutoffs: Of the columns, positive, float64 [m].
        product: F, [D, K], each row in one piece, and c, [K], float64.
        places: The rows, int64 [n].
        first_column: The first of the columns.
        most_left_open: Entries that single precision may leave open: they are formed again.
        instruction_set: Of the kernel; None is the best.

    Returns:
        None where it leaves more open.
    """
    answer = native_module().mark_tile(
        values.numpy(),
        *(side.numpy() for side in slack),
        cutoffs.numpy(),
        *(factor.numpy() for factor in product),
        places.numpy(),
        first_column=first_column,
        most_left_open=most_left_open,
        isa=instruction_set or "",
    )
    return None if answer is None else Marked(*answer)
