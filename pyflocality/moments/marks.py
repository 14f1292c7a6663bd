r"""Which entries of a projector reach their cutoffs: in single precision, where that decides.

A product F diag(c) F^T of K terms that is formed in single precision, :math:`\ell` terms at a time,
is off by

.. math::
    |\tilde P_{nm} - P_{nm}| \le e \sum_k c_k |F_{nk} F_{mk}| \le s_n s_m , \qquad
    s_n^2 = e \sum_k c_k F_{nk}^2 , \qquad e = 2^{-24} (\ell + K / \ell + 4) ,

in whatever order terms are added. Terms that are left out add what they come to on the diagonal,
:math:`T_n = \sum_k c_k F_{nk}^2` over them, to :math:`s_n^2`. Entries that lie farther than that
from their cutoff are decided, and nearly all do; the others are formed again in double precision.
So the bits are those of double precision, in half the time.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyflocality.backends.selection import machine_reason
from pyflocality.moments.projector import PIECE, Places, Projector

# Entries this close to their cutoff, as a share of it, may fall on either side.
NEAR = 1e-6
# Of so many entries one may be left open by single precision.
_LEFT_OPEN = 64
# Single precision is not tried where it is off by more than this share of the usual cutoff.
_WORTH = 0.05
# Terms are left out that change no entry by more than this share of a threshold's.
_DROPPED = 1e-3
# Beside rounding errors: terms that are too small for single precision.
_UNDERFLOW = 1e-15


class Reached(NamedTuple):
    """Which entries of a tile reach the cutoffs of their columns.

    Attributes:
        bits: The first column in the highest bit, uint8 [n, ceil(m / 8)].
        near: How many lie within `NEAR` of the cutoff.
    """

    bits: np.ndarray
    near: int


class Marks:
    """The tiles of a projector, in single precision where that may decide.

    Args:
        projector: The projector.
        threshold: h, positive.

    Attributes:
        projector: The projector.
        divisors: What it divides rows by, float64 [D].
        slack: s, float32 [D], where single precision is tried.
        is_single: Whether single precision is tried.
    """

    def __init__(self, projector: Projector, threshold: float) -> None:
        self.projector, self.divisors, self._share = projector, projector.divisors(), threshold
        self.is_single = (
            projector.factor.device.type == "cpu"
            and projector.factor.stride(1) == 1
            and machine_reason("cpu") is None
            # Otherwise torch may form products of float32 from fewer digits.
            and torch.get_float32_matmul_precision() == "highest"
        )
        if not self.is_single:
            return
        self._terms = projector.terms_needed(_DROPPED * threshold)
        rounding = 2.0**-24 * (PIECE + self._terms / PIECE + 4)
        squares = rounding * projector.weights_of_terms() + projector.terms_after(self._terms)
        self.slack = (squares.sqrt() + _UNDERFLOW).float()
        worth = _WORTH * threshold * float(self.divisors.median())
        self.is_single = float(squares.median()) <= worth

    def cutoffs(self, largest: float) -> Tensor:
        """What inputs are compared with where the largest magnitude is that, float64 [D]."""
        return self.divisors * (self._share * largest)

    def tile(self, rows: Places, columns: slice) -> Tile:
        """The tile of some rows (a slice, or int64 [n]) and columns."""
        # What a complement has on the diagonal is no product alone.
        is_single = self.is_single and not (self.projector.complement and _meet(rows, columns))
        if is_single:
            values = self.projector.single_product(self._factor, rows, columns)
        else:
            values = self.projector.block(rows, columns)
        return Tile(self, rows, columns, values)

    @cached_property
    def _factor(self) -> Tensor:
        return self.projector.single_factor(self._terms)


class Tile:
    """Magnitudes of a tile [n, m] of the projector.

    Args:
        marks: What it is a tile of.
        rows: Its rows.
        columns: Its columns.
        values: The tile: float64, or float32 with the bounds of the errors of single precision.
    """

    def __init__(self, marks: Marks, rows: Places, columns: slice, values: Tensor) -> None:
        self._marks, self._rows, self._columns = marks, rows, columns
        self._values = values.abs_()

    @property
    def is_single(self) -> bool:
        """Whether it still is in single precision."""
        return self._values.dtype == torch.float32

    def largest(self, least: float) -> float:
        """The largest magnitude over its row's or its column's divisor, if that exceeds `least`."""
        if self.is_single:
            slack = self._marks.slack
            by_row, by_column = slack[self._rows], slack[self._columns]
            found = self._relative(by_row * by_column.amax(), by_column * by_row.amax())
            if found <= least:
                return least
            self._to_double()
        return max(least, self._relative(0.0, 0.0))

    def reached(self, cutoffs: Tensor) -> Reached:
        """Which entries reach the cutoffs [D] of their columns, and how many are near them."""
        if self.is_single:
            marked = self._marked(cutoffs[self._columns])
            if marked is not None:
                return marked
            self._to_double()
        cutoffs = cutoffs[self._columns]
        bits = np.packbits((self._values >= cutoffs).cpu().numpy(), axis=1)
        return Reached(bits, int(((self._values - cutoffs).abs_() <= NEAR * cutoffs).sum()))

    def turned(self) -> Tile:
        """Columns as rows, of a tile whose rows are a slice."""
        assert isinstance(self._rows, slice)
        values = self._values.T.contiguous()
        return Tile(self._marks, self._columns, self._rows, values)

    def _relative(self, row_slack: Tensor | float, column_slack: Tensor | float) -> float:
        divisors = self._marks.divisors
        by_row = ((self._values.amax(1) + row_slack) / divisors[self._rows]).amax()
        by_column = ((self._values.amax(0) + column_slack) / divisors[self._columns]).amax()
        return float(by_row.maximum(by_column))

    def _marked(self, cutoffs: Tensor) -> Reached | None:
        from pyflocality.kernels.cpu.mask_tile import mark

        projector, slack = self._marks.projector, self._marks.slack
        places = self._rows
        if isinstance(places, slice):
            places = torch.arange(places.start, places.stop)
        marked = mark(
            self._values,
            (slack[self._rows], slack[self._columns]),
            cutoffs,
            (projector.factor, projector.coefficients),
            places,
            self._columns.start,
            most_left_open=self._values.numel() // _LEFT_OPEN,
        )
        return None if marked is None else Reached(*marked)

    def _to_double(self) -> None:
        self._values = self._marks.projector.block(self._rows, self._columns).abs_()


def _meet(rows: Places, columns: slice) -> bool:
    """Whether a tile holds entries of the diagonal."""
    if isinstance(rows, slice):
        return rows.start < columns.stop and columns.start < rows.stop
    return bool(((rows >= columns.start) & (rows < columns.stop)).any())
