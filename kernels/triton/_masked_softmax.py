"""Triton kernels of the masked posterior: a softmax over the images in the epilogue of products.

Lists, tiles, levels and places are those of `_masked_levels`, products those of
`_masked_products`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from pyflocality.kernels.triton._masked_products import gathered_products


@triton.jit
def masked_scan_kernel(
    images_ptr,  # float16 [D, columns]
    queries_ptr,  # float16 [G, blocks, HALVES, ROWS, BLOCK_D]
    inputs_ptr,
    starts_ptr,
    parents_ptr,
    cores_ptr,  # sums of the level above, float32 [G, places above, BATCH, columns]
    norms_ptr,  # float32 [tiles * 16, columns]
    outputs_ptr,  # output at each place, int32 [tiles * 16]
    values_ptr,  # value images, float32 [VALUES, D, columns]
    row_scale_ptr,  # float32 [tiles * 16]
    gain_ptr,  # factor of the products in a distance, float32 [G * BATCH]
    factor_ptr,  # factor of a distance in the power of two, float32 [G * BATCH]
    minimum_ptr,  # results, float32 [splits, G, tiles * ROWS]
    total_ptr,
    weighted_ptr,  # [splits, G, tiles * ROWS, HAS_IMAGE + VALUES]
    blocks,
    places_above,
    column_blocks,
    split_blocks,
    stride_image,
    stride_norm,
    stride_sum,
    stride_value,
    dim,
    HAS_PARENTS: tl.constexpr,
    HALVES: tl.constexpr,
    VALUES: tl.constexpr,
    HAS_IMAGE: tl.constexpr,
    SLOTS: tl.constexpr,  # VALUES or more, a power of two
    OUTPUTS: tl.constexpr,
    BATCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Posterior scan of one split of the images for a tile of outputs and a group of queries.

    A distance is norm - gain * product, up to a term that all images share. Columns without an
    image have an infinite norm and so no weight. With the weights of a block at hand its VALUES
    value images are summed, beside the image or in its place.

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
    if VALUES > 0:
        slot = tl.arange(0, SLOTS)
        further = tl.zeros((OUTPUTS, BATCH, SLOTS), tl.float32)
        output = tl.load(outputs_ptr + place).to(tl.int64)
    start = tl.program_id(2) * split_blocks
    for column_block in range(start, min(start + split_blocks, column_blocks)):
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        product = gathered_products(
            images_ptr,
            queries_ptr + group * blocks * (HALVES * ROWS * BLOCK_D),
            inputs_ptr,
            first,
            last,
            column,
            stride_image,
            HALVES,
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
        total = total * decay + tl.sum(weight, axis=2)
        if HAS_IMAGE:
            value = tl.load(value_line[:, None] + column[None, :]).to(tl.float32)
            weighted = weighted * decay + tl.sum(weight * value[:, None, :], axis=2)
        if VALUES > 0:
            further *= decay[:, :, None]
            # No unrolled loop: with the values of several images at hand registers run out.
            for image_value in tl.range(VALUES, num_stages=1):
                line = values_ptr + (output + image_value * dim) * stride_value
                value = tl.load(line[:, None] + column[None, :])
                here = tl.sum(weight * value[:, None, :], axis=2)
                own = (slot == image_value)[None, None, :]
                further += tl.where(own, here[:, :, None], 0.0)
        minimum = smaller
    split_group = tl.program_id(2).to(tl.int64) * tl.num_programs(1) + group
    row = tl.arange(0, OUTPUTS)[:, None] * BATCH + tl.arange(0, BATCH)[None, :]
    state = (split_group * tl.num_programs(0) + tile) * ROWS + row
    tl.store(minimum_ptr + state, minimum)
    tl.store(total_ptr + state, total)
    sums = weighted_ptr + state * (HAS_IMAGE + VALUES)
    if HAS_IMAGE:
        tl.store(sums, weighted)
    if VALUES > 0:
        place_of_value = sums[:, :, None] + (HAS_IMAGE + slot)[None, None, :]
        tl.store(place_of_value, further, mask=(slot < VALUES)[None, None, :])


@triton.jit
def masked_jvp_kernel(
    images_ptr,  # float16 [D, columns]
    queries_ptr,  # float16 [G, blocks, HALVES, ROWS, BLOCK_D]
    inputs_ptr,
    starts_ptr,
    parents_ptr,
    cores_ptr,  # sums of the level above, float32 [G, places above, IMAGES, SLOTS, columns]
    norms_ptr,  # float32 [tiles * 16, columns]
    outputs_ptr,  # output at each place, int32 [tiles * 16]
    row_scale_ptr,  # float32 [tiles * 16]
    gain_ptr,  # factor of the products in a distance, float32 [G * IMAGES]
    factor_ptr,  # factor of a distance in the power of two, float32 [G * IMAGES]
    centre_ptr,  # what values are counted from, float32 [G, tiles * 16, IMAGES]
    offset_ptr,  # what products are counted from, float32 [G, tiles * 16, IMAGES, SLOTS]
    minimum_ptr,  # results, float32 [splits, G, tiles * 16, IMAGES]
    sums_ptr,  # [splits, G, tiles * 16, IMAGES, 2, SLOTS]: without and with the value
    blocks,
    places_above,
    column_blocks,
    split_blocks,
    stride_image,
    stride_norm,
    stride_sum,
    HAS_PARENTS: tl.constexpr,
    HALVES: tl.constexpr,
    OUTPUTS: tl.constexpr,
    IMAGES: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):
    """Posterior scan with tangents of one split of the images, for a tile of outputs.

    Rows are output, noisy image, slot: the first slot holds the noisy image, the others its
    tangents. For the sums the first slot counts 1, the others their products.

    Grid: (tiles, G, splits); each program handles 16 outputs of IMAGES noisy images with
    SLOTS - 1 tangents each over `split_blocks` blocks of BLOCK_N training images.
    """
    BATCH: tl.constexpr = IMAGES * SLOTS
    ROWS: tl.constexpr = OUTPUTS * BATCH
    tile, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    place = tile.to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)  # [OUTPUTS]
    image = group * IMAGES + tl.arange(0, IMAGES)  # [IMAGES]
    slot = tl.arange(0, SLOTS)
    gain = tl.load(row_scale_ptr + place)[:, None] * tl.load(gain_ptr + image)[None, :]
    factor = tl.load(factor_ptr + image)[None, :]  # [1, IMAGES]
    norm_line = norms_ptr + place * stride_norm
    value_line = images_ptr + tl.load(outputs_ptr + place).to(tl.int64) * stride_image
    query = tl.arange(0, BATCH)
    core_line = cores_ptr + tl.zeros((BATCH,), tl.int64)
    if HAS_PARENTS:
        parent = group * places_above + tl.load(parents_ptr + tile)
        core_line += (parent * BATCH + query) * stride_sum
    line = (group * tl.num_programs(0) * OUTPUTS + place)[:, None] * IMAGES
    line += tl.arange(0, IMAGES)[None, :]  # [OUTPUTS, IMAGES]
    centre = tl.load(centre_ptr + line)
    offset = tl.load(offset_ptr + line[:, :, None] * SLOTS + slot[None, None, :])
    noisy = (slot == 0)[None, None, :, None]
    first, last = tl.load(starts_ptr + tile), tl.load(starts_ptr + tile + 1)
    minimum = tl.full((OUTPUTS, IMAGES), float("inf"), tl.float32)
    plain = tl.zeros((OUTPUTS, IMAGES, SLOTS), tl.float32)
    weighted = tl.zeros((OUTPUTS, IMAGES, SLOTS), tl.float32)
    start = tl.program_id(2) * split_blocks
    for column_block in range(start, min(start + split_blocks, column_blocks)):
        column = column_block * BLOCK_N + tl.arange(0, BLOCK_N)
        product = gathered_products(
            images_ptr,
            queries_ptr + group * blocks * (HALVES * ROWS * BLOCK_D),
            inputs_ptr,
            first,
            last,
            column,
            stride_image,
            HALVES,
            ROWS,
            BLOCK_N,
            BLOCK_D,
            NUM_STAGES,
        )
        if HAS_PARENTS:
            product = tl.reshape(product, (OUTPUTS, BATCH, BLOCK_N))
            product += tl.load(core_line[:, None] + column[None, :])[None, :, :]
        product = tl.reshape(product, (OUTPUTS, IMAGES, SLOTS, BLOCK_N))
        own = tl.sum(tl.where(noisy, product, 0.0), axis=2)  # [OUTPUTS, IMAGES, BLOCK_N]
        norm = tl.load(norm_line[:, None] + column[None, :])
        distance = norm[:, None, :] - gain[:, :, None] * own
        smaller = tl.minimum(minimum, tl.min(distance, axis=2))
        weight = tl.exp2((smaller[:, :, None] - distance) * factor[:, :, None])
        decay = tl.exp2((smaller - minimum) * factor)[:, :, None]
        value = tl.load(value_line[:, None] + column[None, :]).to(tl.float32)
        value = value[:, None, :] - centre[:, :, None]
        inner = tl.where(noisy, 1.0, product - offset[:, :, :, None]) * weight[:, :, None, :]
        plain = plain * decay + tl.sum(inner, axis=3)
        weighted = weighted * decay + tl.sum(inner * value[:, :, None, :], axis=3)
        minimum = smaller
    split_line = tl.program_id(2).to(tl.int64) * tl.num_programs(1) * tl.num_programs(0)
    state = split_line * (OUTPUTS * IMAGES) + line
    tl.store(minimum_ptr + state, minimum)
    sums = sums_ptr + state[:, :, None] * (2 * SLOTS) + slot[None, None, :]
    tl.store(sums, plain)
    tl.store(sums + SLOTS, weighted)
