"""Gathered products behind the masked posterior: Triton kernels, each with its launcher.

All work on a transposed, centred float16 copy of the images, [D, columns]: the values of input d
at consecutive images lie side by side, so a list of inputs is a gather of whole rows. The copy
holds integers of at most 255 and is exact. Lists, tiles, levels and places are those of
`_masked_levels`; the rows of a tile are its 16 outputs times BATCH noisy images,
row = output * BATCH + image.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyflocality.kernels.triton._launch import Launch
from pyflocality.kernels.triton._masked_levels import OUTPUTS, Level, MaskLevels
from pyflocality.kernels.triton._masked_plan import Config


@triton.jit
def pack_queries_kernel(
    noisy_ptr,  # scaled, centred noisy images, float32 [G * BATCH, D]
    inputs_ptr,  # lists of inputs, int32 [blocks * BLOCK_D]
    mask_weights_ptr,  # weights of the listed inputs, float16 [blocks, WEIGHT_HALVES, 16, BLOCK_D]
    queries_ptr,  # result, float16 [G, blocks, HALVES, ROWS, BLOCK_D]
    dim,
    blocks,
    WEIGHT_HALVES: tl.constexpr,
    HALVES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Weighted noisy values of every listed input, as one or two float16 halves.

    Grid: (blocks, G); each program handles a block of a list for a group of noisy images.
    """
    ROWS: tl.constexpr = OUTPUTS * BATCH
    block, group = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    weight_place = (row // BATCH)[:, None] * BLOCK_D + column[None, :]  # [ROWS, BLOCK_D]
    weight_base = mask_weights_ptr + block * (WEIGHT_HALVES * OUTPUTS * BLOCK_D)
    weight = tl.load(weight_base + weight_place).to(tl.float32)
    if WEIGHT_HALVES == 2:
        weight += tl.load(weight_base + OUTPUTS * BLOCK_D + weight_place).to(tl.float32)
    entry = tl.load(inputs_ptr + block * BLOCK_D + column)
    image = group * BATCH + row % BATCH
    value = weight * tl.load(noisy_ptr + image[:, None] * dim + entry[None, :])
    high = value.to(tl.float16)
    start = (group * blocks + block) * (HALVES * ROWS * BLOCK_D)
    place = start + row[:, None] * BLOCK_D + column[None, :]
    tl.store(queries_ptr + place, high)
    if HALVES == 2:
        low = (value - high.to(tl.float32)).to(tl.float16)
        tl.store(queries_ptr + ROWS * BLOCK_D + place, low)


def pack_queries(queries: Tensor, levels: MaskLevels, config: Config, halves: int) -> list[Tensor]:
    """Weighted values of the queries of some groups [G, BATCH, D] at the lists of every level."""
    packed = []
    for level in levels.levels:
        rows = OUTPUTS * config.batch
        shape = (len(queries), level.blocks, halves, rows, config.block_d)
        packed.append(torch.empty(shape, dtype=torch.float16, device=queries.device))
        pack_queries_kernel[(level.blocks, len(queries))](
            noisy_ptr=queries,
            inputs_ptr=level.inputs,
            mask_weights_ptr=level.mask_weights,
            queries_ptr=packed[-1],
            dim=queries.shape[-1],
            blocks=level.blocks,
            WEIGHT_HALVES=level.halves,
            HALVES=halves,
            OUTPUTS=OUTPUTS,
            BATCH=config.batch,
            BLOCK_D=config.block_d,
            num_warps=4,
        )
    return packed


def list_arguments(level: Level, config: Config, launch: Launch) -> dict[str, object]:
    """What every kernel that goes along the lists of a level takes of it."""
    return {
        "inputs_ptr": level.inputs,
        "starts_ptr": level.starts,
        "parents_ptr": level.parents,
        "HAS_PARENTS": level.has_parents,
        "OUTPUTS": OUTPUTS,
        "BLOCK_N": config.block_n,
        "BLOCK_D": config.block_d,
        "NUM_STAGES": launch.num_stages,
        **launch.options(),
    }


@triton.jit
def gathered_products(
    images_ptr,
    queries_ptr,
    inputs_ptr,
    first,
    last,
    column,  # [BLOCK_N]
    stride_image,
    HALVES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Products of the queries of blocks [first, last) with some images, float32 [ROWS, BLOCK_N].

    Halves of a query are steps of their own with one accumulator, and read the images twice.
    Two products of one step chained into an accumulator would wait for one another, and two
    accumulators of this size do not fit the registers beside the softmax.
    """
    entry = tl.arange(0, BLOCK_D)
    query_place = tl.arange(0, ROWS)[:, None] * BLOCK_D + entry[None, :]  # [ROWS, BLOCK_D]
    product = tl.zeros((ROWS, BLOCK_N), tl.float32)
    for step in tl.range(first * HALVES, last * HALVES, num_stages=NUM_STAGES):
        listed = tl.load(inputs_ptr + (step // HALVES) * BLOCK_D + entry).to(tl.int64)
        images = tl.load(images_ptr + listed[:, None] * stride_image + column[None, :])
        query = tl.load(queries_ptr + tl.cast(step, tl.int64) * (ROWS * BLOCK_D) + query_place)
        product = tl.dot(query, images, product)
    return product


@triton.jit
def core_sums_kernel(
    images_ptr,  # float16 [D, columns]
    queries_ptr,  # float16 [G, blocks, HALVES, ROWS, BLOCK_D]
    inputs_ptr,
    starts_ptr,
    parents_ptr,  # place of each tile's core above, int32 [tiles]
    above_ptr,  # sums of the level above, float32 [G, places above, BATCH, columns]
    sums_ptr,  # result, float32 [G, tiles * 16, BATCH, columns]
    blocks,
    places_above,
    stride_image,
    stride_sum,
    HAS_PARENTS: tl.constexpr,
    HALVES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Sums over the sets of one level, which the level below shares among its tiles.

    Grid: (tiles, G, columns / BLOCK_N); each program handles a tile of sets and a group of noisy
    images at BLOCK_N training images.
    """
    ROWS: tl.constexpr = OUTPUTS * BATCH
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    column = tl.program_id(2) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, ROWS)
    sums = gathered_products(
        images_ptr,
        queries_ptr + group * blocks * (HALVES * ROWS * BLOCK_D),
        inputs_ptr,
        tl.load(starts_ptr + tile),
        tl.load(starts_ptr + tile + 1),
        column,
        stride_image,
        HALVES,
        ROWS,
        BLOCK_N,
        BLOCK_D,
        NUM_STAGES,
    )
    if HAS_PARENTS:
        parent = group * places_above + tl.load(parents_ptr + tile)
        line = parent * BATCH + row % BATCH  # [ROWS]
        sums += tl.load(above_ptr + line[:, None] * stride_sum + column[None, :])
    line = (group * tl.num_programs(0) + tile) * ROWS + row
    tl.store(sums_ptr + line[:, None] * stride_sum + column[None, :], sums)


def core_sums(
    columns: Tensor, packed: list[Tensor], levels: MaskLevels, config: Config, halves: int
) -> Tensor | None:
    """Sums that the tiles of the first level share, [groups, places, batch, columns]."""
    above, width = None, columns.shape[1]
    for level, queries in reversed(list(zip(levels.levels, packed, strict=True))[1:]):
        shape = (len(queries), level.tiles * OUTPUTS, config.batch, width)
        sums = torch.empty(shape, device=columns.device)
        core_sums_kernel[(level.tiles, len(queries), width // config.block_n)](
            images_ptr=columns,
            queries_ptr=queries,
            above_ptr=sums if above is None else above,
            sums_ptr=sums,
            blocks=level.blocks,
            places_above=0 if above is None else above.shape[1],
            stride_image=columns.stride(0),
            stride_sum=width,
            HALVES=halves,
            BATCH=config.batch,
            **list_arguments(level, config, config.cores),
        )
        above = sums
    return above


@triton.jit
def squared_norms_kernel(
    images_ptr,  # float16 [D, columns]
    mask_weights_ptr,  # float16 [blocks, HALVES, 16, BLOCK_D]
    inputs_ptr,
    starts_ptr,
    parents_ptr,
    above_ptr,  # norms of the level above, float32 [places above, columns]
    row_scale_ptr,  # float32 [tiles * 16]
    norms_ptr,  # result, float32 [tiles * 16, columns]
    count,
    stride_image,
    stride_above,
    stride_norm,
    HAS_PARENTS: tl.constexpr,
    HALVES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Weighted squared norms of the images over every set of a level: the image-only term.

    A square is split as 256 h + l with both halves at most 255, exact in float16; the sums of
    each over a mask are then exact in float32 up to 65,793 inputs, and only their combination is
    rounded. Columns from `count` on hold no image and get an infinite norm.

    Grid: (tiles, columns / BLOCK_N); each program handles a tile of sets at BLOCK_N images.
    """
    tile = tl.program_id(0)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.arange(0, OUTPUTS)
    entry = tl.arange(0, BLOCK_D)
    high = tl.zeros((OUTPUTS, BLOCK_N), tl.float32)
    low = tl.zeros((OUTPUTS, BLOCK_N), tl.float32)
    place = row[:, None] * BLOCK_D + entry[None, :]
    first, last = tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)
    for block in tl.range(first, last, num_stages=NUM_STAGES):
        listed = tl.load(inputs_ptr + block * BLOCK_D + entry).to(tl.int64)
        value = tl.load(images_ptr + listed[:, None] * stride_image + column[None, :])
        square = value.to(tl.float32) * value.to(tl.float32)
        upper = tl.floor(square * (1.0 / 256.0))
        lower = (square - upper * 256.0).to(tl.float16)
        base = mask_weights_ptr + tl.cast(block, tl.int64) * (HALVES * OUTPUTS * BLOCK_D)
        weight = tl.load(base + place)
        high = tl.dot(weight, upper.to(tl.float16), high)
        low = tl.dot(weight, lower, low)
        if HALVES == 2:
            weight = tl.load(base + OUTPUTS * BLOCK_D + place)
            high = tl.dot(weight, upper.to(tl.float16), high)
            low = tl.dot(weight, lower, low)
    norm = high * 256.0 + low
    if HAS_PARENTS:
        parent = tl.load(parents_ptr + tile).to(tl.int64)
        norm += tl.load(above_ptr + parent * stride_above + column)[None, :]
    line = tile.to(tl.int64) * OUTPUTS + row
    norm *= tl.load(row_scale_ptr + line)[:, None]
    norm = tl.where((column < count)[None, :], norm, float("inf"))
    tl.store(norms_ptr + line[:, None] * stride_norm + column[None, :], norm)


def squared_norms(
    columns: Tensor, count: int, levels: MaskLevels, config: Config, target: Tensor | None = None
) -> Tensor:
    """Squared norms of some images over all masks, [places, columns].

    Args:
        columns: The images, [D, columns].
        count: How many columns hold one; the norms of others are infinite.
        levels: The masks.
        config: Shapes of the kernels.
        target: Where the norms go; None makes a tensor.
    """
    above: Tensor | None = None
    for level in reversed(levels.levels):
        outputs = level is levels.levels[0]
        if target is None or not outputs:
            norms = torch.empty(level.tiles * OUTPUTS, columns.shape[1], device=columns.device)
        else:
            norms = target
        squared_norms_kernel[(level.tiles, columns.shape[1] // config.block_n)](
            images_ptr=columns,
            mask_weights_ptr=level.mask_weights,
            above_ptr=norms if above is None else above,
            row_scale_ptr=level.row_scale,
            norms_ptr=norms,
            count=count if outputs else columns.shape[1],
            stride_image=columns.stride(0),
            stride_above=norms.stride(0) if above is None else above.stride(0),
            stride_norm=norms.stride(0),
            HALVES=level.halves,
            **list_arguments(level, config, config.norms),
        )
        above = norms
    return norms
