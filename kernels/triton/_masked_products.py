"""Triton kernels behind the masked posterior: gathered products with and without a softmax.

All work on a transposed, centred float16 copy of the images, [D, columns]: the values of input d
at consecutive images lie side by side, so a list of inputs is a gather of whole rows. The copy
holds integers of at most 255 and is exact. Lists, tiles, levels and places are those of
`_mask_plan`; the rows of a tile are its 16 outputs times BATCH noisy images, row = output * BATCH
+ image.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_queries_kernel(
    noisy_ptr,  # scaled, centred noisy images, float32 [G * BATCH, D]
    inputs_ptr,  # lists of inputs, int32 [blocks * BLOCK_D]
    members_ptr,  # weights of the listed inputs, float16 [blocks, MEMBER_PARTS, 16, BLOCK_D]
    queries_ptr,  # result, float16 [G, blocks, PARTS, ROWS, BLOCK_D]
    dim,
    blocks,
    MEMBER_PARTS: tl.constexpr,
    PARTS: tl.constexpr,
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
    member_place = (row // BATCH)[:, None] * BLOCK_D + column[None, :]  # [ROWS, BLOCK_D]
    member_base = members_ptr + block * (MEMBER_PARTS * OUTPUTS * BLOCK_D)
    weight = tl.load(member_base + member_place).to(tl.float32)
    if MEMBER_PARTS == 2:
        weight += tl.load(member_base + OUTPUTS * BLOCK_D + member_place).to(tl.float32)
    entry = tl.load(inputs_ptr + block * BLOCK_D + column)
    image = group * BATCH + row % BATCH
    value = weight * tl.load(noisy_ptr + image[:, None] * dim + entry[None, :])
    high = value.to(tl.float16)
    start = (group * blocks + block) * (PARTS * ROWS * BLOCK_D)
    place = start + row[:, None] * BLOCK_D + column[None, :]
    tl.store(queries_ptr + place, high)
    if PARTS == 2:
        low = (value - high.to(tl.float32)).to(tl.float16)
        tl.store(queries_ptr + ROWS * BLOCK_D + place, low)


@triton.jit
def _gathered_products(
    images_ptr,
    queries_ptr,
    inputs_ptr,
    first,
    last,
    column,  # [BLOCK_N]
    stride_image,
    PARTS: tl.constexpr,
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
    for step in tl.range(first * PARTS, last * PARTS, num_stages=NUM_STAGES):
        listed = tl.load(inputs_ptr + (step // PARTS) * BLOCK_D + entry).to(tl.int64)
        images = tl.load(images_ptr + listed[:, None] * stride_image + column[None, :])
        query = tl.load(queries_ptr + tl.cast(step, tl.int64) * (ROWS * BLOCK_D) + query_place)
        product = tl.dot(query, images, product)
    return product


@triton.jit
def core_sums_kernel(
    images_ptr,  # float16 [D, columns]
    queries_ptr,  # float16 [G, blocks, PARTS, ROWS, BLOCK_D]
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
    PARTS: tl.constexpr,
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
    sums = _gathered_products(
        images_ptr,
        queries_ptr + group * blocks * (PARTS * ROWS * BLOCK_D),
        inputs_ptr,
        tl.load(starts_ptr + tile),
        tl.load(starts_ptr + tile + 1),
        column,
        stride_image,
        PARTS,
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


@triton.jit
def squared_norms_kernel(
    images_ptr,  # float16 [D, columns]
    members_ptr,  # float16 [blocks, PARTS, 16, BLOCK_D]
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
    PARTS: tl.constexpr,
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
        base = members_ptr + tl.cast(block, tl.int64) * (PARTS * OUTPUTS * BLOCK_D)
        weight = tl.load(base + place)
        high = tl.dot(weight, upper.to(tl.float16), high)
        low = tl.dot(weight, lower, low)
        if PARTS == 2:
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


@triton.jit
def masked_posterior_kernel(
    images_ptr,  # float16 [D, columns]
    queries_ptr,  # float16 [G, blocks, PARTS, ROWS, BLOCK_D]
    inputs_ptr,
    starts_ptr,
    parents_ptr,
    cores_ptr,  # sums of the level above, float32 [G, places above, BATCH, columns]
    norms_ptr,  # float32 [tiles * 16, columns]
    outputs_ptr,  # output at each place, int32 [tiles * 16]
    row_scale_ptr,  # float32 [tiles * 16]
    gain_ptr,  # factor of the products in a distance, float32 [G * BATCH]
    factor_ptr,  # factor of a distance in the power of two, float32 [G * BATCH]
    minimum_ptr,  # results, float32 [splits, G, tiles * ROWS]
    total_ptr,
    weighted_ptr,
    blocks,
    places_above,
    column_blocks,
    split_blocks,
    stride_image,
    stride_norm,
    stride_sum,
    HAS_PARENTS: tl.constexpr,
    PARTS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Posterior scan of one split of the images for a tile of outputs and a group of queries.

    A distance is norm - gain * product, up to a term that all images share. Columns without an
    image have an infinite norm and so no weight.

    Grid: (tiles, G, splits); each program handles 16 outputs of BATCH noisy images over
    `split_blocks` blocks of BLOCK_N training images. Tiles vary fastest: programs that run
    together read the same images.
    """
    ROWS: tl.constexpr = OUTPUTS * BATCH
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tile.to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]
    image = group * BATCH + tl.arange(0, BATCH)  # [BATCH]
    gain = tl.load(row_scale_ptr + place)[:, None] * tl.load(gain_ptr + image)[None, :]
    factor = tl.load(factor_ptr + image)[None, :]  # [1, BATCH]
    norm_line = norms_ptr + place * stride_norm
    value_line = images_ptr + tl.load(outputs_ptr + place).to(tl.int64) * stride_image
    core_line = cores_ptr + tl.zeros((BATCH,), tl.int64)
    if HAS_PARENTS:
        parent = group * places_above + tl.load(parents_ptr + tile)
        core_line += (parent * BATCH + tl.arange(0, BATCH)) * stride_sum
    first, last = tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)
    minimum = tl.full((OUTPUTS, BATCH), float("inf"), tl.float32)
    total = tl.zeros((OUTPUTS, BATCH), tl.float32)
    weighted = tl.zeros((OUTPUTS, BATCH), tl.float32)
    start = tl.program_id(2) * split_blocks
    for column_block in range(start, min(start + split_blocks, column_blocks)):
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        product = _gathered_products(
            images_ptr,
            queries_ptr + group * blocks * (PARTS * ROWS * BLOCK_D),
            inputs_ptr,
            first,
            last,
            column,
            stride_image,
            PARTS,
            ROWS,
            BLOCK_N,
            BLOCK_D,
            NUM_STAGES,
        )
        # In three dimensions what rows share is loaded once and never spread out: tensors of the
        # accumulator's size loaded beside it would pass through shared memory, at the price of
        # the products themselves.
        product = tl.reshape(product, (OUTPUTS, BATCH, BLOCK_N))
        if HAS_PARENTS:
            product += tl.load(core_line[:, None] + column[None, :])[None, :, :]
        norm = tl.load(norm_line[:, None] + column[None, :])
        distance = norm[:, None, :] - gain[:, :, None] * product
        smaller = tl.minimum(minimum, tl.min(distance, axis=2))
        # The difference is taken before the factor: at no noise the factor is the largest one,
        # and the nearest images still weigh exactly 1.
        weight = tl.exp2((smaller[:, :, None] - distance) * factor[:, :, None])
        decay = tl.exp2((smaller - minimum) * factor)
        value = tl.load(value_line[:, None] + column[None, :]).to(tl.float32)
        total = total * decay + tl.sum(weight, axis=2)
        weighted = weighted * decay + tl.sum(weight * value[:, None, :], axis=2)
        minimum = smaller
    split_group = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + group
    row = tl.arange(0, OUTPUTS)[:, None] * BATCH + tl.arange(0, BATCH)[None, :]
    state = (split_group * tl.num_programs(0) + tile) * ROWS + row
    tl.store(minimum_ptr + state, minimum)
    tl.store(total_ptr + state, total)
    tl.store(weighted_ptr + state, weighted)
