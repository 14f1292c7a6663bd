r"""The PCA-locality rule tile by tile: from a projector to bits, without a matrix of numbers.

The rule divides row n of the projector P by its divisor t_n (`Projector.divisors`); output m takes
column m and keeps the inputs whose magnitude reaches a share of the largest magnitude G of all,

.. math:: |P_{nm}| \ge h \, G \, t_n , \qquad G = \max_{nm} |P_{nm}| / t_n .

P is symmetric: a tile of it serves its inputs as outputs, too, so about half of all tiles are
computed. P is positive semidefinite, so :math:`|P_{nm}| \le \sqrt{P_{nn} P_{mm}}`: that bounds what
a tile can add to G. Tiles are taken in the order of those bounds, with the largest magnitude so
far; those that were made with less than G are made again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.checks import check_count, check_tensor
from pyflocality._support.progress import progress_bar
from pyflocality.moments.marks import Marks, Reached
from pyflocality.moments.projector import Projector
from pyflocality.weights import ONES, QueryWeights

# Rows and columns of a tile: whole bytes of bits, numbers that stay in a processor's cache.
TILE = 512
# Masks that are made together to be counted.
_MADE_TOGETHER = 1024


class MadeMasks(QueryWeights):
    """Masks that are made whenever some of them are asked for, and not kept.

    For images whose masks exceed the memory budget. What there is to know of all masks
    (`density`, `answered`, `empty`) is kept from what was made so far; the rest is made for it.

    Args:
        shape: (Q, D).
        make: Makes the bits of some of the queries, int64 [n].
    """

    is_held = False

    def __init__(self, shape: tuple[int, int], make: Callable[[Tensor], np.ndarray]) -> None:
        self.shape, self.is_mask = shape, True
        self._make = make
        self._ones = np.full(shape[0], -1, np.int64)
        self._held = np.zeros(-(-shape[1] // 8), np.uint8)

    @property
    def density(self) -> float:
        """Share of weights that are not zero."""
        return float(self._counted().sum()) / math.prod(self.shape)

    @property
    def answered(self) -> Tensor:
        """Which of the D columns hold a one, bool [D]."""
        self._counted()
        return torch.from_numpy(np.unpackbits(self._held, count=self.shape[1])).bool()

    @property
    def empty(self) -> Tensor:
        """Which queries have no weight but 0, bool [Q]."""
        return torch.from_numpy(self._counted() == 0)

    @property
    def nbytes(self) -> int:
        """Bytes kept."""
        return self._ones.nbytes + self._held.nbytes

    def row(self, query: int) -> Tensor:
        """The mask of one query, bool [D]; negative numbers count from the end."""
        count = self.shape[0]
        query = check_count(query, "query", minimum=-count, maximum=count - 1)
        return self.tile(torch.tensor([query % count])).row(0)

    def tile(self, outputs: Tensor) -> QueryWeights:
        """The masks of some of the queries, int64 [n]."""
        bits = self._make(check_tensor(outputs, "outputs"))
        self._ones[outputs.numpy()] = ONES[bits].sum(1)
        self._held |= np.bitwise_or.reduce(bits, axis=0)
        return QueryWeights.from_bits(bits, self.shape[1])

    def dense(self, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """The masks as a matrix [Q, D], which takes all the memory that they were not to take."""
        return self.tile(torch.arange(self.shape[0])).dense(dtype, device)

    def _counted(self) -> np.ndarray:
        """Ones of all masks, int64 [Q]."""
        missing = torch.from_numpy((self._ones < 0).nonzero()[0])
        for first in range(0, len(missing), _MADE_TOGETHER):
            self.tile(missing[first : first + _MADE_TOGETHER])
        return self._ones


@dataclass(frozen=True, eq=False)
class Pair:
    """A tile of the projector.

    Attributes:
        rows: Its rows.
        columns: Its columns; those of the rows, or behind them.
        bound: What |P_nm| / t_n and |P_nm| / t_m cannot exceed in it.
    """

    rows: slice
    columns: slice
    bound: float


class Counted(NamedTuple):
    """Masks, and how many of their entries lie within `NEAR` of the threshold.

    Attributes:
        weights: The masks.
        near: The number.
    """

    weights: QueryWeights
    near: int


def masks_of(
    projector: Projector, threshold: float, *, name: str, progress: bool = False
) -> Counted:
    """The masks of all outputs.

    Args:
        projector: The projector.
        threshold: h, positive.
        name: What the progress bar calls them.
        progress: Whether to show one.
    """
    bar = partial(progress_bar, description=name, enabled=progress)
    marks, size = Marks(projector, threshold), len(projector.diagonal)
    bits = np.zeros((size, -(-size // 8)), np.uint8)
    largest, todo = projector.largest_on_diagonal(), tiles_of(projector)
    cutoffs, near = marks.cutoffs(largest), dict.fromkeys(todo, 0)
    while todo:
        again = []
        for pair in bar(todo):
            tile = marks.tile(pair.rows, pair.columns)
            if pair.bound > largest and (found := tile.largest(largest)) > largest:
                largest, cutoffs = found, marks.cutoffs(found)
            again.append((largest, pair))
            # Row n is output n, for an entry and its mirror image are the same.
            near[pair] = _write(bits, pair.rows, pair.columns, tile.reached(cutoffs))
            if pair.rows != pair.columns:
                near[pair] += _write(bits, pair.columns, pair.rows, tile.turned().reached(cutoffs))
        todo = [pair for made_with, pair in again if made_with < largest]
    return Counted(QueryWeights.from_bits(bits, size), sum(near.values()))


def masks_by_tiles(
    projector: Projector, threshold: float, *, name: str, progress: bool = False
) -> MadeMasks:
    """The masks of all outputs, made whenever some of them are asked for.

    Args:
        projector: The projector.
        threshold: h, positive.
        name: What the progress bar of the search for the largest entry calls them.
        progress: Whether to show one.
    """
    marks, largest = Marks(projector, threshold), projector.largest_on_diagonal()
    for pair in progress_bar(tiles_of(projector), description=name, enabled=progress):
        if pair.bound > largest:
            largest = marks.tile(pair.rows, pair.columns).largest(largest)
    cutoffs = marks.cutoffs(largest)
    size = len(cutoffs)

    def make(outputs: Tensor) -> np.ndarray:
        bits = np.empty((len(outputs), -(-size // 8)), np.uint8)
        first = 0
        for some in outputs.to(cutoffs.device).split(TILE):
            rows = slice(first, first + len(some))
            for columns in _slices(size):
                _write(bits, rows, columns, marks.tile(some, columns).reached(cutoffs))
            first += len(some)
        return bits

    return MadeMasks((size, size), make)


def signed_weights_of(projector: Projector) -> QueryWeights:
    """The signed values of the rule at threshold 0, float64 [D, D]."""
    divisors = projector.divisors().copysign(projector.diagonal)
    size = len(divisors)
    values = divisors.new_empty(size, size)
    for pair in tiles_of(projector):
        tile = projector.block(pair.rows, pair.columns)
        values[pair.columns, pair.rows] = (tile / divisors[pair.rows, None]).T
        if pair.rows != pair.columns:
            values[pair.rows, pair.columns] = tile / divisors[pair.columns]
    return QueryWeights(values, signed=True)


def soft_weights_of(
    projector: Projector, masks: QueryWeights, softness: float, *, name: str, progress: bool = False
) -> QueryWeights:
    """The weights min(1, |P_nm| / t_n)^p of the inputs n that the masks keep, float32 [D, D].

    Args:
        projector: The projector, for the threshold of the masks.
        masks: The masks.
        softness: p, positive.
        name: What the progress bar calls them.
        progress: Whether to show one.
    """
    divisors = projector.divisors()
    size = len(divisors)
    values = torch.zeros(size, size, dtype=torch.float32)
    for outputs in progress_bar(_slices(size), description=name, enabled=progress):
        band = torch.arange(outputs.start, outputs.stop)
        kept = masks.tile(band).dense(torch.bool, divisors.device)
        for inputs in _slices(size):
            # Row n is output n, for an entry and its mirror image are the same.
            tile = projector.block(outputs, inputs).abs_() / divisors[inputs]
            tile.clamp_(max=1.0).pow_(softness)
            values[outputs, inputs] = tile.mul_(kept[:, inputs]).float().cpu()
    return QueryWeights(values)


def tiles_of(projector: Projector) -> list[Pair]:
    """The tiles on and above the diagonal: those on it first, then by their bounds, descending."""
    roots = projector.diagonal.clamp(min=0.0).sqrt()
    relative = roots / projector.divisors()
    slices = _slices(len(roots))
    high = [float(roots[some].max()) for some in slices]
    reach = [float(relative[some].max()) for some in slices]
    pairs = [
        Pair(rows, columns, max(reach[i] * high[j], reach[j] * high[i]))
        for i, rows in enumerate(slices)
        for j, columns in enumerate(slices[i:], i)
    ]
    # Neighbours are most alike, and the largest entries among them.
    return sorted(pairs, key=lambda pair: (pair.rows != pair.columns, -pair.bound))


def _slices(size: int) -> list[slice]:
    return [slice(first, min(first + TILE, size)) for first in range(0, size, TILE)]


def _write(bits: np.ndarray, outputs: slice, inputs: slice, reached: Reached) -> int:
    """Write the masks of some outputs over some inputs, from a multiple of eight on."""
    packed = reached.bits
    bits[outputs, inputs.start // 8 : inputs.start // 8 + packed.shape[1]] = packed
    return reached.near
