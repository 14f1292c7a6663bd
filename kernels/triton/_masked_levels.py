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
from collections.abc import Iterator
from dataclasses import dataclass, replace
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from pyflocality.kernels.triton._cached import Cached
from pyflocality.posterior.tiles import output_bands
from pyflocality.weights import QueryWeights

# Outputs of a tile.
OUTPUTS = 16
# Weights whose levels are held together: masks of 64x64 images in colours take 19 MB.
_BAND_BYTES = 64 * 2**20
# Masks looked at together while lists are made, in elements of [tiles, OUTPUTS, D].
_ELEMENTS_AT_A_TIME = 2**26


@dataclass(frozen=True)
class Level:
    """Sums over the sets of one level, by tiles of 16 sets.

    The places of a level are numbered tile * 16 + position in the tile.

    Attributes:
        inputs: Lists of inputs, a whole number of blocks per tile, padded with input 0, int32
            [blocks * block_d].
        mask_weights: Weight of each listed input in each set of its tile, float16
            [blocks, halves, 16, block_d]: one half (0 and 1) for masks, for other weights a high
            and a low one.
        starts: First block of each tile and the end of the last, int32 [tiles + 1].
        parents: Place at the level above that holds the tile's core, int32 [tiles]; empty where
            there is no level above.
        places: Place of each set of this level, int64 [sets].
        row_scale: Power of two by which `mask_weights` must be multiplied, float32 [tiles * 16].
    """

    inputs: Tensor
    mask_weights: Tensor
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
        return len(self.mask_weights)

    @property
    def halves(self) -> int:
        """Halves a weight is kept in."""
        return self.mask_weights.shape[1]

    @property
    def has_parents(self) -> bool:
        """Whether the tiles have cores at a level above."""
        return len(self.parents) > 0


@dataclass(frozen=True)
class MaskLevels:
    """The levels of a set of query weights, outputs first.

    Attributes:
        levels: The outputs' level, then the levels of their cores.
        outputs: Output at each place of the first level, int32 [tiles * 16]; 0 where none is.
        strongest: Largest sum over the inputs of a query's squared weights.
        weights: The weights, bool or float32 [Q, D]; those of `mask_levels` keep masks as bits,
            uint8 [Q, ceil(D / 8)].
    """

    levels: tuple[Level, ...]
    outputs: Tensor
    strongest: float
    weights: Tensor

    @property
    def tensors(self) -> list[Tensor]:
        """What the levels take up on their device."""
        lists = [tensor for level in self.levels for tensor in vars(level).values()]
        return [self.outputs, self.weights, *lists]

    @property
    def queries(self) -> Tensor:
        """Row of the weights at each place of the first level; 0 where none is."""
        rows = torch.zeros_like(self.outputs, dtype=torch.int64)
        rows[self.levels[0].places] = torch.arange(len(self.weights), device=rows.device)
        return rows

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def products(self) -> int:
        """Multiply-adds per image and batch element, padding included."""
        return sum(len(level.inputs) * OUTPUTS for level in self.levels)


_built: WeakKeyDictionary[QueryWeights, dict[tuple[object, ...], tuple[MaskLevels, Cached]]] = (
    WeakKeyDictionary()
)


def mask_levels(
    weights: QueryWeights, image_shape: tuple[int, ...], block_d: int, device: torch.device
) -> MaskLevels:
    """The levels of a set of weights [D, D], built once per device, for use on the current stream.

    Lists of inputs are padded to whole blocks.
    """
    built = _built.setdefault(weights, {})
    key = (tuple(image_shape), block_d, device)
    if key not in built:
        levels = _levels_on(device, weights, image_shape, block_d)
        built[key] = (levels, Cached(*levels.tensors))
    levels, cached = built[key]
    cached.here()
    return levels


def banded_levels(
    weights: QueryWeights, image_shape: tuple[int, ...], block_d: int, device: torch.device
) -> Iterator[tuple[slice | Tensor, MaskLevels]]:
    """Outputs that are scanned together, all or int64 [n], and the levels of their weights.

    How outputs are parted depends on the shape of the images and the kind of the weights alone,
    and so do all sums. Levels of a part are made when it is its turn, and not kept.
    """
    inputs = weights.shape[1]
    bytes_each = -(-inputs // 8) if weights.is_mask else 4 * inputs
    bands = output_bands(image_shape, bytes_each, _BAND_BYTES)
    if len(bands) == 1 and weights.is_held:
        yield slice(None), mask_levels(weights, image_shape, block_d, device)
        return
    channels, _, width = image_shape
    for outputs in bands:
        grid = channels, len(outputs) // (channels * width), width
        levels = _levels_on(device, weights.tile(outputs), grid, block_d)
        outputs = outputs.to(device)
        yield outputs, replace(levels, outputs=outputs[levels.outputs.long()].int())


def _levels_on(
    device: torch.device, weights: QueryWeights, grid: tuple[int, ...], block_d: int
) -> MaskLevels:
    """The levels of weights [Q, D] of outputs on a grid, masks kept as bits."""
    if not weights.is_mask:
        return levels_of(weights.dense(torch.float32, device), grid, block_d)
    bits = torch.from_numpy(weights.bits).to(device)
    return replace(levels_of(unpacked(bits, weights.shape[1]), grid, block_d), weights=bits)


def unpacked(bits: Tensor, inputs: int) -> Tensor:
    """Masks as bool [rows, D] from their bits, uint8 [rows, ceil(D / 8)]."""
    shift = torch.arange(7, -1, -1, device=bits.device, dtype=torch.uint8)
    return ((bits[:, :, None] >> shift) & 1).bool().flatten(1)[:, :inputs]


def levels_of(weights: Tensor, grid: tuple[int, ...], block_d: int) -> MaskLevels:
    """Levels of masks or values [Q, D] of outputs on a grid (planes, rows, columns).

    Weights that are no masks have one level, without cores.
    """
    tiled, sets = [], weights
    while True:
        tile_outputs, grid = tiles_of_grid(grid)
        tile_outputs = tile_outputs.to(weights.device)
        listed, cores = unions_and_cores(sets != 0, tile_outputs)
        last = len(tile_outputs) == 1 or sets.dtype != torch.bool or not bool(cores.any())
        if not last:
            listed &= ~cores
        # Longest lists first: programs start in this order, and short ones fill the end.
        order = torch.argsort(listed.sum(1), descending=True, stable=True)
        tiled.append((tile_outputs[order], listed[order], order, sets))
        if last:
            break
        sets = cores
    levels: list[Level] = []
    for tile_outputs, listed, order, sets in reversed(tiled):
        parents = levels[-1].places[order] if levels else order[:0]
        levels.append(_level(tile_outputs, listed, sets, parents.int(), block_d))
    outputs = tiled[0][0].clamp(min=0).flatten().int()
    strongest = float(weights.double().square().sum(1).max())
    return MaskLevels(tuple(reversed(levels)), outputs, strongest, weights)


def tiles_of_grid(grid: tuple[int, ...]) -> tuple[Tensor, tuple[int, int, int]]:
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


def unions_and_cores(sets: Tensor, tile_outputs: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs in some and in every set of each tile, bool [tiles, D] each."""
    # A missing output stands for the first one, which changes neither.
    indices = torch.where(tile_outputs < 0, tile_outputs[:, :1], tile_outputs)
    step = max(1, _ELEMENTS_AT_A_TIME // (OUTPUTS * sets.shape[1]))
    unions, cores = [], []
    for tiles in indices.split(step):
        some = sets[tiles]
        unions.append(some.any(1))
        cores.append(some.all(1))
    return torch.cat(unions), torch.cat(cores)


def _level(
    tile_outputs: Tensor, listed: Tensor, sets: Tensor, parents: Tensor, block_d: int
) -> Level:
    """A level of `sets` [sets, D]: their tiles [tiles, 16], inputs `listed` [tiles, D]."""
    device, tiles = tile_outputs.device, len(tile_outputs)
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

    present = tile_outputs >= 0
    places = torch.empty(len(sets), dtype=torch.int64, device=device)
    places[tile_outputs[present]] = present.flatten().nonzero().flatten()
    row_scale = torch.ones(tiles * OUTPUTS, device=device)
    halves = 1
    if sets.dtype != torch.bool:
        halves = 2
        exponent = torch.frexp(sets.abs().amax(1)).exponent.clamp(-100, 100)
        row_scale[places] = torch.ldexp(torch.ones_like(sets[:, 0]), exponent)
    mask_weights = torch.zeros(blocks, halves, OUTPUTS, block_d, dtype=torch.float16, device=device)
    step = max(1, _ELEMENTS_AT_A_TIME // OUTPUTS)
    for t, d, s in zip(tile.split(step), entry.split(step), slot.split(step), strict=True):
        block, column = s // block_d, s % block_d
        value = sets[tile_outputs[t].clamp(min=0), d[:, None]].float() * present[t]
        if halves == 2:
            value = value / row_scale.view(tiles, OUTPUTS)[t]
        high = value.half()
        mask_weights[block, 0, :, column] = high
        if halves == 2:
            mask_weights[block, 1, :, column] = (value - high.float()).half()
    return Level(inputs, mask_weights, starts.int(), parents, places, row_scale)
