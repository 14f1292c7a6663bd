"""What masks cost: tiles of a projector, and the schedules by which their sums are added up.

Times are measured on this machine, on tiles and masks of random numbers.
"""

from __future__ import annotations

import functools
import math

import torch

from pyflocality._support.rates import shortest
from pyflocality.backends.selection import machine_reason
from pyflocality.moments.marks import Marks
from pyflocality.moments.mask_tiles import TILE
from pyflocality.moments.projector import Projector
from pyflocality.weights import QueryWeights

# Components of the tiles that are measured, and images whose masks are scheduled.
_RANKS, _SCHEDULED = (64, 2048), (3, 24, 24)
# Of a schedule.
_BYTES_PER_TERM = 4


def tiles_seconds(side: int, rank: int) -> float:
    """Seconds for the masks of so many tiles side by side, made of so many components."""
    few, many = map(_measured_tile_seconds, _RANKS)
    beyond = (rank - _RANKS[0]) / (_RANKS[1] - _RANKS[0])
    on, above = (max(x, x + (y - x) * beyond) for x, y in zip(few, many, strict=True))
    return side * on + side * (side - 1) / 2 * above


@functools.cache
def _measured_tile_seconds(rank: int) -> tuple[float, float]:
    """Seconds for a tile on the diagonal, where the largest entries are, and for any other."""
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn((2 * TILE, rank), generator=generator, dtype=torch.float64)
    projector = Projector(factor, factor.new_ones(rank), factor.square().sum(1))
    # The usual entry lies there: as many are close to their cutoffs as of photographs.
    marks = Marks(projector, rank**-0.5)
    here, behind = slice(0, TILE), slice(TILE, 2 * TILE)
    cutoffs = marks.cutoffs(1.0)

    def on() -> None:
        tile = marks.tile(here, here)
        tile.largest(0.0)
        tile.reached(cutoffs)

    def above() -> None:
        tile = marks.tile(here, behind)
        tile.largest(1.0)
        tile.reached(cutoffs)
        tile.turned().reached(cutoffs)

    return shortest(on), shortest(above)


def bands(shape: tuple[int, int, int]) -> int:
    """Bands of outputs that are scanned together, each with a schedule of its masks."""
    from pyflocality.kernels.cpu.masked_posterior import bands_of

    return len(bands_of(shape))


def schedule_bytes(shape: tuple[int, int, int], share: float) -> int:
    """A schedule of the masks of a level, or of those of a band, whose sums add up such a share."""
    count = bands(shape)
    entries = math.prod(shape) ** 2 // count
    whole = int(share * entries) * _BYTES_PER_TERM
    # Those of bands are made while the one before is still there, of a copy of their masks.
    return whole if count == 1 else 2 * whole + entries // 8


@functools.cache
def scheduled_seconds(share: float) -> float:
    """Seconds for an entry of masks whose schedule adds up such a share of them."""
    from pyflocality.kernels.cpu.masked_posterior import schedules

    if machine_reason("cpu") is not None:
        return 0.0
    generator, values = torch.Generator().manual_seed(0), math.prod(_SCHEDULED)
    # Random masks have nothing in common: each is summed as it stands.
    masks = torch.rand(values, values, generator=generator) < share

    def schedule() -> None:
        for _ in schedules(QueryWeights(masks), _SCHEDULED):
            pass

    return shortest(schedule) / values**2
