"""The Triton kernel of the equivariant posterior, and its tile sizes.

`equivariant_posterior` says what a logit is, `_patches` how queries and patches lie in memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from pyflocality.kernels.triton._launch import Launch
from pyflocality.kernels.triton._patches import STEP

# Shared memory of a Hopper multiprocessor that two programs, or one, can share out, less a
# reserve for scratch.
_SHARED_OF_TWO, _SHARED_OF_ONE = 100 * 1024, 200 * 1024


@dataclass(frozen=True)
class EquivariantConfig:
    """Tile sizes of the scan.

    Attributes:
        block_queries: Queries of a program.
        block_keys: Patches a step.
        resident: Whether the queries stay in shared memory; else they are read again at each
            step.
        launch: Layout of the compiled kernel.
    """

    block_queries: int
    block_keys: int
    resident: bool
    launch: Launch


def default_config(window: int, run: int, halves: int, arch: int) -> EquivariantConfig:
    """Tile sizes for a window, by what fits the shared memory of a multiprocessor.

    Two programs a multiprocessor come first: one weighs while the other multiplies.

    Args:
        window: Side of a patch.
        run: Length of a run.
        halves: float16 halves of a query.
        arch: 80 or 90, as `generation` tells.
    """
    # Deeper pipelines of the shortest runs spill on Ampere with some compilers.
    streamed = EquivariantConfig(128, 64, False, Launch(8, 3 if run > STEP else 2))
    if run > 64:
        streamed = EquivariantConfig(64, 32, False, Launch(4, 2))
    if arch < 90 or window > 7:
        return streamed
    row = 2 * window * run
    queries, keys = 128 * halves * row, 64 * row
    if queries + 2 * keys <= _SHARED_OF_TWO:
        return EquivariantConfig(128, 64, True, Launch(8, 2, 128))
    if queries + keys <= _SHARED_OF_TWO:
        return EquivariantConfig(128, 64, True, Launch(8, 1, 128))
    if queries + 2 * keys <= _SHARED_OF_ONE:
        return EquivariantConfig(128, 64, True, Launch(8, 2))
    return streamed


@triton.jit
def _query_tile(
    query_ptr, rows, first, WINDOW: tl.constexpr, RUN: tl.constexpr, TAKEN: tl.constexpr
):
    """Rows `first` to `first + TAKEN` of the queries' windows, [BLOCK_Q, TAKEN * RUN]."""
    inner = first * RUN + tl.arange(0, TAKEN * RUN)
    return tl.load(query_ptr + rows[:, None] * (WINDOW * RUN) + inner[None, :])


@triton.jit
def _key_tile(
    keys_ptr,
    places,
    first,
    row_stride,
    CHANNELS: tl.constexpr,
    RUN: tl.constexpr,
    TAKEN: tl.constexpr,
):
    """Rows `first` to `first + TAKEN` of the patches at `places`, [TAKEN * RUN, BLOCK_KEYS]."""
    inner = tl.arange(0, TAKEN * RUN)
    offsets = (first + inner // RUN) * row_stride * CHANNELS + inner % RUN
    return tl.load(keys_ptr + places[None, :] + offsets[:, None])


@triton.jit
def scan_kernel(
    query_ptr,  # float16 [classes, HALVES, rows, WINDOW, RUN]
    norm_query_ptr,  # float16 [rows, 16]: what a norm's digits count, negative
    factor_ptr,  # float32 [rows]: of a logit in the power of two
    keys_ptr,  # float16 [N, padded height, padded width, CHANNELS], and zeros behind
    norm_ptr,  # float16 [N, patch rows, patch columns, 4]: digits, and zeros behind
    origin_ptr,  # int32 [classes, 2]: row and column of a class's first patch
    best_ptr,  # results, float32 [splits, classes, rows]: largest logit
    sums_ptr,  # float32 [splits, classes, rows, ANSWERS]: weighted channels, then weights
    num_rows,  # a multiple of BLOCK_Q
    num_keys,
    keys_per_image,
    keys_per_row,
    image_stride,  # in pixels
    row_stride,
    norm_image_stride,  # in patches
    norm_row_stride,
    steps,
    WINDOW: tl.constexpr,
    RUN: tl.constexpr,
    CHANNELS: tl.constexpr,
    ANSWERS: tl.constexpr,
    HALVES: tl.constexpr,
    RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Online softmax of a tile of queries over some of the patches.

    Grid: (query tiles, splits, classes); each program handles BLOCK_Q queries and `steps` blocks
    of patches of their class.
    """
    # 64-bit before any product: images and queries may exceed 2^31 elements.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # [BLOCK_Q]
    split = tl.program_id(1)
    group = tl.program_id(2).to(tl.int64)
    factor = tl.load(factor_ptr + rows)
    first_row = tl.load(origin_ptr + 2 * group)
    first_column = tl.load(origin_ptr + 2 * group + 1)
    query_stride = tl.cast(num_rows, tl.int64) * (WINDOW * RUN)
    high_ptr = query_ptr + group * HALVES * query_stride
    low_ptr = high_ptr + query_stride
    digit = tl.arange(0, 16)
    norm_query = tl.load(norm_query_ptr + rows[:, None] * 16 + digit[None, :])
    # Queries that stay: the window's rows as a sum of powers of two, a product for each.
    if RESIDENT:
        if WINDOW & 1:
            high_1 = _query_tile(high_ptr, rows, 0, WINDOW, RUN, 1)
            if HALVES == 2:
                low_1 = _query_tile(low_ptr, rows, 0, WINDOW, RUN, 1)
        if WINDOW & 2:
            high_2 = _query_tile(high_ptr, rows, WINDOW & 1, WINDOW, RUN, 2)
            if HALVES == 2:
                low_2 = _query_tile(low_ptr, rows, WINDOW & 1, WINDOW, RUN, 2)
        if WINDOW & 4:
            high_4 = _query_tile(high_ptr, rows, WINDOW & 3, WINDOW, RUN, 4)
            if HALVES == 2:
                low_4 = _query_tile(low_ptr, rows, WINDOW & 3, WINDOW, RUN, 4)

    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK_Q, ANSWERS], tl.float32)
    answer = tl.arange(0, ANSWERS)
    for step in range(0, steps):
        first = (split * steps + step) * BLOCK_KEYS
        key = first + tl.arange(0, BLOCK_KEYS)  # [BLOCK_KEYS]
        valid = key < num_keys
        key = tl.where(valid, key, 0)
        image = (key // keys_per_image).to(tl.int64)
        place = key % keys_per_image
        row = first_row + place // keys_per_row
        column = first_column + place % keys_per_row
        # In multiples of CHANNELS, which the compiler sees: it copies that much at a time.
        places = (image * image_stride + row * row_stride + column) * CHANNELS
        norm_places = (image * norm_image_stride + row * norm_row_stride + column) * 4
        # A logit is minus the distance, but for the query's own norm: [BLOCK_Q, BLOCK_KEYS].
        digits = tl.load(norm_ptr + norm_places[None, :] + digit[:, None])
        logit = tl.dot(norm_query, digits)
        if RESIDENT:
            if WINDOW & 4:
                keys = _key_tile(keys_ptr, places, WINDOW & 3, row_stride, CHANNELS, RUN, 4)
                logit = tl.dot(high_4, keys, logit)
                if HALVES == 2:
                    logit = tl.dot(low_4, keys, logit)
            if WINDOW & 2:
                keys = _key_tile(keys_ptr, places, WINDOW & 1, row_stride, CHANNELS, RUN, 2)
                logit = tl.dot(high_2, keys, logit)
                if HALVES == 2:
                    logit = tl.dot(low_2, keys, logit)
            if WINDOW & 1:
                keys = _key_tile(keys_ptr, places, 0, row_stride, CHANNELS, RUN, 1)
                logit = tl.dot(high_1, keys, logit)
                if HALVES == 2:
                    logit = tl.dot(low_1, keys, logit)
        else:
            for down in range(0, WINDOW):
                keys = _key_tile(keys_ptr, places, down, row_stride, CHANNELS, RUN, 1)
                high = _query_tile(high_ptr, rows, down, WINDOW, RUN, 1)
                logit = tl.dot(high, keys, logit)
                if HALVES == 2:
                    low = _query_tile(low_ptr, rows, down, WINDOW, RUN, 1)
                    logit = tl.dot(low, keys, logit)
        # Only the last block has patches that are not there.
        if first + BLOCK_KEYS > num_keys:
            logit = tl.where(valid[None, :], logit, float("-inf"))
        largest = tl.max(logit, 1)
        # Weights are float16, 2^15 for the best: below 2^-40 of it they are exactly 0. A block
        # that holds nothing more for any query adds nothing and need not be weighed.
        matters = (largest - best) * factor > -41.0
        if tl.max(matters.to(tl.int32), 0) > 0:
            new_best = tl.maximum(best, largest)
            # Logits are subtracted before the factor, which may be as large as 2^120.
            weight = tl.exp2((logit - new_best[:, None]) * factor[:, None] + 15.0)
            sums = sums * tl.exp2((best - new_best) * factor)[:, None]
            # [BLOCK_KEYS, ANSWERS]: channels of the centre pixel, then a 1 that sums the weights.
            centre_ptr = keys_ptr + (WINDOW // 2) * (row_stride + 1) * CHANNELS
            values = tl.load(
                centre_ptr + places[:, None] + answer[None, :],
                mask=(answer < CHANNELS)[None, :],
                other=0.0,
            )
            values = tl.where(answer[None, :] == CHANNELS, 1.0, values).to(tl.float16)
            high_weight = weight.to(tl.float16)
            sums = tl.dot(high_weight, values, sums)
            if HALVES == 2:
                low_weight = (weight - high_weight.to(tl.float32)).to(tl.float16)
                sums = tl.dot(low_weight, values, sums)
            best = new_best

    out = (split * tl.num_programs(2) + group) * num_rows + rows
    tl.store(best_ptr + out, best)
    tl.store(sums_ptr + out[:, None] * ANSWERS + answer[None, :], sums)
