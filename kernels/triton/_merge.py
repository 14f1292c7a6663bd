"""Merging the partial states of the splits of a scan, in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pyflocality.kernels.triton._launch import Launch, on_device_of
from pyflocality.posterior.state import PosteriorState

LAUNCH = Launch(num_warps=4, num_stages=2)
BLOCK_ELEMENTS = 1024


@triton.jit
def merge_states_kernel(
    minimum_ptr,  # running state, float32 [R], [R], [R, V]
    total_ptr,
    weighted_ptr,
    partial_minimum_ptr,  # states of the splits, float32 [S, R], [S, R], [S, R, V]
    partial_total_ptr,
    partial_weighted_ptr,
    new_minimum_ptr,  # results: apart from the running state, which several programs read
    new_total_ptr,
    factor_ptr,  # factor of a distance in the power of two, float32 [R]
    splits,
    rows,
    values,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Take the states of S splits of a scan into a running state, one after the other.

    One split at a time, so that the bits do not depend on how many splits a call brings.

    Grid: (ceil(R / BLOCK_R), ceil(V / BLOCK_V)); each program handles some values of some
    queries over all splits. The first program of a row writes its minimum and total.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)  # [BLOCK_R]
    value = tl.program_id(1).to(tl.int64) * BLOCK_V + tl.arange(0, BLOCK_V)  # [BLOCK_V]
    here = row < rows
    place = row[:, None] * values + value[None, :]  # [BLOCK_R, BLOCK_V]
    inside = here[:, None] & (value < values)[None, :]
    factor = tl.load(factor_ptr + row, mask=here, other=1.0)
    minimum = tl.load(minimum_ptr + row, mask=here, other=float("inf"))
    total = tl.load(total_ptr + row, mask=here, other=0.0)
    weighted = tl.load(weighted_ptr + place, mask=inside, other=0.0)
    size = tl.cast(rows, tl.int64)
    for split in range(splits):
        start = tl.cast(split, tl.int64) * size
        other = tl.load(partial_minimum_ptr + start + row, mask=here, other=float("inf"))
        smaller = tl.minimum(minimum, other)
        # A state without images has an infinite minimum: its sums are 0 and must stay 0, where
        # the difference of two infinities is NaN.
        decay = tl.where(minimum == float("inf"), 0.0, tl.exp2((smaller - minimum) * factor))
        gain = tl.where(other == float("inf"), 0.0, tl.exp2((smaller - other) * factor))
        more = tl.load(partial_total_ptr + start + row, mask=here, other=0.0)
        total = total * decay + gain * more
        more = tl.load(partial_weighted_ptr + start * values + place, mask=inside, other=0.0)
        weighted = weighted * decay[:, None] + gain[:, None] * more
        minimum = smaller
    if tl.program_id(1) == 0:
        tl.store(new_minimum_ptr + row, minimum, mask=here)
        tl.store(new_total_ptr + row, total, mask=here)
    tl.store(weighted_ptr + place, weighted, mask=inside)


def empty_state(rows: int, values: int, device: torch.device) -> PosteriorState:
    """The state of R queries with V values before the first image."""
    return PosteriorState(
        torch.full((rows,), torch.inf, device=device),
        torch.zeros(rows, device=device),
        torch.zeros(rows, values, device=device),
    )


def merge_partials(
    state: PosteriorState, partials: PosteriorState, factor: Tensor
) -> PosteriorState:
    """The state after the images of all splits; takes over the memory of `state`.

    Args:
        state: Running state: minimum [R], total [R], weighted [R, V], float32, contiguous.
        partials: States of the splits, in order: [S, R], [S, R], [S, R, V].
        factor: Factors of the distances in the power of two, positive and finite, [R].
    """
    # The kernel knows no strides: of an expanded tensor it would read beyond the end.
    assert all(tensor.is_contiguous() for tensor in (*state, *partials, factor))
    rows, values = state.weighted.shape
    block_v = min(triton.next_power_of_2(values), BLOCK_ELEMENTS)
    block_r = BLOCK_ELEMENTS // block_v
    minimum, total = torch.empty_like(state.minimum), torch.empty_like(state.total)
    grid = (triton.cdiv(rows, block_r), triton.cdiv(values, block_v))
    with on_device_of(factor):
        merge_states_kernel[grid](
            *state,
            *partials,
            new_minimum_ptr=minimum,
            new_total_ptr=total,
            factor_ptr=factor,
            splits=len(partials.minimum),
            rows=rows,
            values=values,
            BLOCK_R=block_r,
            BLOCK_V=block_v,
            **LAUNCH.options(),
        )
    return PosteriorState(minimum, total, state.weighted)
