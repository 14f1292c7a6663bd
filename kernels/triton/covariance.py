r"""Exact covariance sums of 8-bit images on integer tensor cores.

With :math:`c = u - 128` in int8, the products :math:`\sum_i c_{ia} c_{ib}` are matrix products of
bytes with 32-bit sums. A product is at most :math:`2^{14}`, so 131,071 images fit into one 32-bit
sum; a pass takes half of that and adds its sums to the 64-bit totals. Every sum is an integer and
every total has one writer, so the result is the same to the last bit in any order.

Tensor cores read bytes only along the summed dimension: a first kernel writes the centred bytes
of a pass once, transposed, [D, n]. The second takes products of tiles of its rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyflocality.kernels.triton._launch import on_device_of

# Images of a pass: 2^16 products of at most 2^14 stay below 2^31.
IMAGES_PER_PASS = 65_536
# Working memory of a pass: transposed bytes, and 32-bit sums.
_PASS_BYTES = 256 * 2**20
_PARTIAL_BYTES = 256 * 2**20
# Programs that a large GPU holds at a time: two on each multiprocessor.
_PROGRAMS_AT_A_TIME = 264
# Steps of the product that take as long as writing and merging a program's sums, from the bytes of
# both; nothing but speed depends on it.
_PARTIAL_COST = 60


@dataclass(frozen=True)
class CovarianceConfig:
    """Tile sizes of the product.

    Attributes:
        block_rows: Values a tile has down the matrix of products.
        block_columns: Values it has across.
        block_images: Images a step of the product takes.
        num_warps: Warps of a program.
        num_stages: Steps in flight.
    """

    block_rows: int = 128
    block_columns: int = 128
    block_images: int = 128
    num_warps: int = 8
    num_stages: int = 3

    @property
    def tile_bytes(self) -> int:
        """Bytes of a tile of 32-bit sums."""
        return 4 * self.block_rows * self.block_columns


# Two programs fit on a multiprocessor of an A100 (by shared memory) and of an H100: one computes
# while the other waits for its product, which Triton issues synchronously for bytes.
_CONFIG = CovarianceConfig()


@triton.jit
def centre_kernel(
    images_ptr,
    centred_ptr,
    partial_ptr,
    num_images,
    num_values,
    padded_values,
    padded_images,
    steps,
    BLOCK_IMAGES: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """Centre bytes, transpose them and sum them; what is padded becomes 0.

    Grid: (value tiles, groups of images); each program handles `steps` blocks of images of one
    tile of values.
    """
    # 64-bit before any product: a set has more than 2^31 bytes.
    tile = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1).to(tl.int64)
    values = tile * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    sums = tl.zeros([BLOCK_VALUES], tl.int32)
    for step in range(0, steps):
        rows = (group * steps + step) * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)
        # [BLOCK_IMAGES, BLOCK_VALUES]
        stored = tl.load(
            images_ptr + rows[:, None] * num_values + values[None, :],
            mask=(rows < num_images)[:, None] & (values < num_values)[None, :],
            other=128,
        )
        centred = stored.to(tl.int32) - 128
        sums += tl.sum(centred, 0)
        tl.store(
            centred_ptr + values[:, None] * padded_images + rows[None, :],
            tl.trans(centred.to(tl.int8)),
        )
    tl.store(partial_ptr + group * padded_values + values, sums)


@triton.jit
def product_kernel(
    centred_ptr,
    tiles_ptr,
    partial_ptr,
    padded_images,
    steps,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_IMAGES: tl.constexpr,
):
    """Product of a row tile and a column tile of the centred bytes over some of the images.

    Grid: (tiles of the upper triangle, splits); each program handles `steps` blocks of images of
    one tile and leaves 32-bit sums to `merge_kernel`: the addresses of 64-bit totals would not fit
    the registers beside them.
    """
    tile = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    row = tl.load(tiles_ptr + 2 * tile).to(tl.int64) * BLOCK_ROWS
    column = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_COLUMNS
    rows = row + tl.arange(0, BLOCK_ROWS)
    columns = column + tl.arange(0, BLOCK_COLUMNS)
    images = split * steps * BLOCK_IMAGES + tl.arange(0, BLOCK_IMAGES)
    # [BLOCK_ROWS, BLOCK_IMAGES] and [BLOCK_IMAGES, BLOCK_COLUMNS]
    left_ptrs = centred_ptr + rows[:, None] * padded_images + images[None, :]
    right_ptrs = centred_ptr + columns[None, :] * padded_images + images[:, None]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.int32)
    for _ in range(0, steps):
        left = tl.load(left_ptrs)
        right = tl.load(right_ptrs)
        sums = tl.dot(left, right, sums, out_dtype=tl.int32)
        left_ptrs += BLOCK_IMAGES
        right_ptrs += BLOCK_IMAGES
    places = tl.arange(0, BLOCK_ROWS)[:, None] * BLOCK_COLUMNS
    places += tl.arange(0, BLOCK_COLUMNS)[None, :]
    first = (split * tl.num_programs(0) + tile) * (BLOCK_ROWS * BLOCK_COLUMNS)
    tl.store(partial_ptr + first + places, sums)


@triton.jit
def merge_kernel(
    tiles_ptr,
    gram_ptr,
    partial_ptr,
    num_values,
    splits,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the sums of all splits to the totals, above the diagonal.

    Grid: (tiles of the upper triangle, pieces of a tile); each program handles BLOCK entries, of
    which it is the only writer.
    """
    tile = tl.program_id(0).to(tl.int64)
    entries = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(tiles_ptr + 2 * tile).to(tl.int64) * BLOCK_ROWS + entries // BLOCK_COLUMNS
    columns = tl.load(tiles_ptr + 2 * tile + 1).to(tl.int64) * BLOCK_COLUMNS
    columns += entries % BLOCK_COLUMNS
    partial_ptrs = partial_ptr + tile * (BLOCK_ROWS * BLOCK_COLUMNS) + entries
    stride = tl.num_programs(0).to(tl.int64) * (BLOCK_ROWS * BLOCK_COLUMNS)
    sums = tl.zeros([BLOCK], tl.int64)
    for _ in range(0, splits):
        sums += tl.load(partial_ptrs).to(tl.int64)
        partial_ptrs += stride
    upper = (rows <= columns) & (columns < num_values)
    gram_ptrs = gram_ptr + rows * num_values + columns
    totals = tl.load(gram_ptrs, mask=upper, other=0)
    tl.store(gram_ptrs, totals + sums, mask=upper)


def scan(
    images: Tensor, gram: Tensor, total: Tensor, *, config: CovarianceConfig = _CONFIG
) -> None:
    """Add centred sums to contiguous `gram` and `total`, as `ops.accumulate_covariance`.

    They are the same with each config of tile sizes.
    """
    if len(images) == 0:
        return
    positions = upper_tiles(images.shape[1], config)
    tiles = torch.tensor(positions, dtype=torch.int32, device=images.device)
    at_a_time = max(config.block_images, min(IMAGES_PER_PASS, _PASS_BYTES // images.shape[1]))
    with on_device_of(images):
        for block in images.split(at_a_time):
            _add_pass(block.contiguous(), gram, total, tiles, config)


def upper_tiles(values: int, config: CovarianceConfig) -> list[tuple[int, int]]:
    """Row tile and column tile of all tiles that touch the upper triangle.

    Neighbours in the list share their column tiles or their row tile, and so the cache.
    """
    down = ceil(values / config.block_rows)
    across = ceil(values / config.block_columns)
    group = max(1, 1024 // config.block_columns)
    return [
        (row, column)
        for first in range(0, across, group)
        for row in range(down)
        for column in range(first, min(first + group, across))
        if row * config.block_rows < (column + 1) * config.block_columns
    ]


def splits_of(tiles: int, steps: int, config: CovarianceConfig) -> int:
    """How many programs share the images of a tile: as many as shorten the last wave's wait."""
    most = max(1, min(steps, _PARTIAL_BYTES // (tiles * config.tile_bytes), _PROGRAMS_AT_A_TIME))

    def cost(splits: int) -> int:
        waves = ceil(tiles * splits / _PROGRAMS_AT_A_TIME)
        return waves * (ceil(steps / splits) + _PARTIAL_COST)

    splits = min(range(1, most + 1), key=cost)
    # Fewer where rounding the steps up would leave the last one none.
    return ceil(steps / ceil(steps / splits))


def _add_pass(
    images: Tensor, gram: Tensor, total: Tensor, tiles: Tensor, config: CovarianceConfig
) -> None:
    """Add the sums of at most IMAGES_PER_PASS images."""
    num_images, num_values = images.shape
    block = config.block_images
    blocks = ceil(num_images / block)
    tile_slices = tiles.split(max(1, _PARTIAL_BYTES // config.tile_bytes))
    splits = splits_of(len(tile_slices[0]), blocks, config)
    steps = ceil(blocks / splits)
    padded_images = splits * steps * block
    width = max(config.block_rows, config.block_columns)
    padded_values = ceil(num_values / width) * width

    centred = images.new_empty((padded_values, padded_images), dtype=torch.int8)
    partial_total = total.new_empty((splits, padded_values), dtype=torch.int32)
    strip = min(config.block_rows, config.block_columns)
    centre_kernel[(padded_values // strip, splits)](
        images,
        centred,
        partial_total,
        num_images,
        num_values,
        padded_values,
        padded_images,
        steps,
        BLOCK_IMAGES=block,
        BLOCK_VALUES=strip,
        num_warps=config.num_warps,
    )
    total += partial_total[:, :num_values].sum(0)
    partial = total.new_empty(
        (splits, len(tile_slices[0]), config.tile_bytes // 4), dtype=torch.int32
    )
    entries = min(1024, config.tile_bytes // 4)
    for some in tile_slices:
        product_kernel[(len(some), splits)](
            centred,
            some,
            partial,
            padded_images,
            steps,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLUMNS=config.block_columns,
            BLOCK_IMAGES=block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
        merge_kernel[(len(some), config.tile_bytes // 4 // entries)](
            some,
            gram,
            partial,
            num_values,
            splits,
            BLOCK_ROWS=config.block_rows,
            BLOCK_COLUMNS=config.block_columns,
            BLOCK=entries,
        )
