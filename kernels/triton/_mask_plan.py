"""Which products a set of query weights needs: tiles of outputs, cores and fringes.

Masks of neighbouring outputs are nearly alike. Take a tile of 16 outputs. Inputs in *every* mask
of the tile (its core) contribute one sum that all 16 share; only inputs in some of the masks (its
fringe) need a row per output. The cores of neighbouring tiles are alike in turn, so they are
treated as outputs of a second level, and so on up to a level of a single tile:

    sum over mask q  =  sum over the fringe of q's tile, with a row for q
                        + sum over the tile's core, a row of the level above.

Fringes are lists of single inputs, not of blocks of inputs: the kernels gather whole rows of a
transposed image matrix, which costs the same for any choice of rows.

The rules here are plain torch; nothing of it needs a GPU or Triton.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyflocality.kernels.triton._kept import Kept
from pyflocality.weights import QueryWeights

# Outputs of a tile.
OUTPUTS = 16
# Masks looked at together while lists are made, in elements of [tiles, OUTPUTS, D].
_ELEMENTS_AT_A_TIME = 2**26


@dataclass(frozen=True)
class Level:
    """Sums over the sets of one level, by tiles of 16 sets.

    The places of a level are numbered tile * 16 + position in the tile.

    Attributes:
        inputs: Lists of inputs, a whole number of blocks per tile, padded with input 0, int32
            [blocks * block_d].
        members: Weight of each listed input in each set of its tile, float16
            [blocks, parts, 16, block_d]: one part (0 and 1) for masks, for other weights a high
            and a low half.
        starts: First block of each tile and the end of the last, int32 [tiles + 1].
        parents: Place at the level above that holds the tile's core, int32 [tiles]; empty where
            there is no level above.
        places: Place of each set of this level, int64 [sets].
        row_scale: Power of two by which `members` must be multiplied, float32 [tiles * 16].
    """

    inputs: Tensor
    members: Tensor
    starts: Tensor
    parents: Tensor
    places: Tensor
    row_scale: Tensor

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.starts) - 1

    @property
    def blocks(self) -> int:
        """Number of blocks of all lists."""
        return len(self.members)

    @property
    def parts(self) -> int:
        """Halves a weight is kept in."""
        return self.members.shape[1]

    @property
    def has_parents(self) -> bool:
        """Whether the tiles have cores at a level above."""
        return len(self.parents) > 0


@dataclass(frozen=True)
class MaskPlan:
    """The levels of a set of query weights, outputs first.

    Attributes:
        levels: The outputs' level, then the levels of their cores.
        outputs: Output at each place of the first level, int32 [tiles * 16]; 0 where none is.
        strongest: Largest sum over the inputs of a query's squared weights.
        weights: The weights, bool or float32 [Q, D]; those of `mask_plan` keep masks as bits,
            uint8 [Q, ceil(D / 8)].
    """

    levels: tuple[Level, ...]
    outputs: Tensor
    strongest: float
    weights: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """What the plan keeps on its device."""
        lists = [tensor for level in self.levels for tensor in vars(level).values()]
        return [self.outputs, self.weights, *lists]

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def products(self) -> int:
        """Multiply-adds per image and batch element, padding included."""
        return sum(len(level.inputs) * OUTPUTS for level in self.levels)


_plans: WeakKeyDictionary[QueryWeights, dict[tuple[object, ...], tuple[MaskPlan, Kept]]] = (
    WeakKeyDictionary()
)


def mask_plan(
    weights: QueryWeights, image_shape: tuple[int, int, int], block_d: int, device: torch.device
) -> MaskPlan:
    """The plan of a set of weights, built once per device, for use on the current stream.

    Args:
        weights: Weights with one row per value of an image, [D, D].
        image_shape: (C, H, W) with C H W = D.
        block_d: Inputs of a block; lists are padded to whole blocks.
        device: Where the plan lives.
    """
    plans = _plans.setdefault(weights, {})
    key = (tuple(image_shape), block_d, device)
    if key not in plans:
        if weights.is_mask:
            bits = torch.from_numpy(weights.bits).to(device)
            plan = plan_of_masks(unpacked(bits, weights.shape[1]), image_shape, block_d)
            plan = replace(plan, weights=bits)
        else:
            values = weights.dense(torch.float32, device)
            plan = plan_of_values(values, image_shape, block_d)
        plans[key] = (plan, Kept(*plan.tensors))
    plan, kept = plans[key]
    kept.here()
    return plan


def unpacked(bits: Tensor, inputs: int) -> Tensor:
    """Masks as bool [rows, D] from their bits, uint8 [rows, ceil(D / 8)]."""
    shift = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    return ((bits[:, :, None] >> shift) & 1).bool().flatten(1)[:, :inputs]


def plan_of_masks(masks: Tensor, grid: tuple[int, int, int], block_d: int) -> MaskPlan:
    """Plan of masks, bool [Q, D], whose outputs lie on a grid (planes, rows, columns)."""
    levels, sets = [], masks
    while True:
        members, grid = tiles_of_grid(grid)
        members = members.to(masks.device)
        listed, cores = unions_and_cores(sets, members)
        last = len(members) == 1 or not bool(cores.any())
        if not last:
            listed &= ~cores
        # Longest lists first: programs start in this order, and short ones fill the end.
        order = torch.argsort(listed.sum(1), descending=True, stable=True)
        levels.append((members[order], listed[order], order, sets))
        if last:
            break
        sets = cores
    built, places = [], torch.zeros(0, dtype=torch.int64, device=masks.device)
    for members, listed, order, sets in reversed(levels):
        parents = places[order].int() if built else places.int()
        level = _level(members, listed, sets, parents, block_d)
        built.append(level)
        places = level.places
    built.reverse()
    outputs = levels[0][0].clamp(min=0).flatten().int()
    return MaskPlan(tuple(built), outputs, float(masks.sum(1).max()), masks)


def plan_of_values(values: Tensor, grid: tuple[int, int, int], block_d: int) -> MaskPlan:
    """Plan of weights that are no masks, float32 [Q, D]: one level, no cores."""
    members, _ = tiles_of_grid(grid)
    members = members.to(values.device)
    listed, _ = unions_and_cores(values != 0, members)
    order = torch.argsort(listed.sum(1), descending=True, stable=True)
    members, listed = members[order], listed[order]
    parents = torch.zeros(0, dtype=torch.int32, device=values.device)
    level = _level(members, listed, values, parents, block_d)
    outputs = members.clamp(min=0).flatten().int()
    strongest = float(values.double().square().sum(1).max())
    return MaskPlan((level,), outputs, strongest, values)


def tiles_of_grid(grid: tuple[int, int, int]) -> tuple[Tensor, tuple[int, int, int]]:
    """Tiles of 16 neighbours of one plane: [tiles, 16] with -1 for none, and the tiles' grid."""
    planes, rows, columns = grid
    if rows * columns == 1 or planes * rows * columns <= OUTPUTS:
        # Nothing left to join within a plane: take planes together.
        planes, rows, columns = 1, 1, planes * rows * columns
    shapes = [(side, OUTPUTS // side) for side in (4, 2, 8, 1, 16)]
    height, width = min(shapes, key=lambda s: math.ceil(rows / s[0]) * math.ceil(columns / s[1]))
    down, right = math.ceil(rows / height), math.ceil(columns / width)
    numbers = torch.full((planes, down * height, right * width), -1, dtype=torch.int64)
    numbers[:, :rows, :columns] = torch.arange(planes * rows * columns).view(planes, rows, columns)
    tiles = numbers.view(planes, down, height, right, width).transpose(2, 3)
    return tiles.reshape(-1, OUTPUTS), (planes, down, right)


def unions_and_cores(sets: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs in some and in every set of each tile, bool [tiles, D] each."""
    # A missing member stands for the first one, which changes neither.
    indices = torch.where(members < 0, members[:, :1], members)
    step = max(1, _ELEMENTS_AT_A_TIME // (OUTPUTS * sets.shape[1]))
    unions, cores = [], []
    for tiles in indices.split(step):
        parts = sets[tiles]
        unions.append(parts.any(1))
        cores.append(parts.all(1))
    return torch.cat(unions), torch.cat(cores)


def _level(members: Tensor, listed: Tensor, sets: Tensor, parents: Tensor, block_d: int) -> Level:
    """Lists of a level: `members` [tiles, 16] of `sets` [sets, D], inputs `listed` [tiles, D]."""
    device, tiles = members.device, len(members)
    lengths = listed.sum(1)
    counts = (lengths + block_d - 1) // block_d
    starts = torch.zeros(tiles + 1, dtype=torch.int64, device=device)
    starts[1:] = counts.cumsum(0)
    # At least one block, so that no kernel gets a pointer to nothing.
    blocks = max(1, int(starts[-1]))
    tile, entry = listed.nonzero(as_tuple=True)
    before = lengths.cumsum(0) - lengths
    slot = starts[tile] * block_d + torch.arange(len(tile), device=device) - before[tile]
    inputs = torch.zeros(blocks * block_d, dtype=torch.int32, device=device)
    inputs[slot] = entry.int()

    present = members >= 0
    places = torch.empty(len(sets), dtype=torch.int64, device=device)
    places[members[present]] = present.flatten().nonzero().flatten()
    row_scale = torch.ones(tiles * OUTPUTS, device=device)
    parts = 1
    if sets.dtype != torch.bool:
        parts = 2
        exponent = torch.frexp(sets.abs().amax(1)).exponent.clamp(-100, 100)
        row_scale[places] = torch.ldexp(torch.ones_like(sets[:, 0]), exponent)
    kept = torch.zeros(blocks, parts, OUTPUTS, block_d, dtype=torch.float16, device=device)
    step = max(1, _ELEMENTS_AT_A_TIME // OUTPUTS)
    for t, d, s in zip(tile.split(step), entry.split(step), slot.split(step), strict=True):
        block, column = s // block_d, s % block_d
        value = sets[members[t].clamp(min=0), d[:, None]].float() * present[t]
        if parts == 2:
            value = value / row_scale.view(tiles, OUTPUTS)[t]
        high = value.half()
        kept[block, 0, :, column] = high
        if parts == 2:
            kept[block, 1, :, column] = (value - high.float()).half()
    return Level(inputs, kept, starts.int(), parents, places, row_scale)
