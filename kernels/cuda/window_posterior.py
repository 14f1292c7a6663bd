r"""Posterior scans over square windows on the GPU, with tangents and without.

Kernels: `csrc/cuda/window_posterior.cu`, then `merge.cu`. One pass reads the training images once
for a whole batch of noisy images; the cost hardly depends on the window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.kernels.cuda.geometry import (
    TANGENTS,
    WindowPlan,
    batch_slices,
    ceil_div,
    images_per_split,
    plan_window,
    window_shape,
)
from pyflocality.kernels.cuda.launch import Launch, run
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, about_means, tangent_values, uncentred

_MERGE_THREADS, _MERGE_ENTRIES = 256, 32


def window_posterior_state(problem: PosteriorProblem, window: int) -> PosteriorState:
    """Scan with a query per pixel, as the reference of this name.

    Args:
        problem: x float32 [B, C, H, W] and images uint8 or float32 [N, C, H, W] on one GPU.
        window: Odd side of the window.

    Raises:
        ValueError: Images of more than 256 rows or columns.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    stored = StoredProblem(problem)
    slices = batch_slices(len(problem.x), stored.budget // scan_bytes(stored, window))
    merged = torch.cat([scan(stored.part(rows), window) for rows in slices])
    minimum, total, weighted = merged[:, 0], merged[:, 1], merged[:, 2:].transpose(1, 2)
    return PosteriorState(
        stored.distances(minimum).float(),
        total.float(),
        stored.values(weighted, total).float(),
    )


def window_posterior_jvp_state(
    problem: PosteriorProblem, tangents: Tensor, window: int
) -> PosteriorState:
    """The same scan with tangents, in float64, as the reference of this name.

    Two tangents cost a pass of about twice the work of none; more are taken two at a time.

    Args:
        problem: x float32 [B, C, H, W] and images uint8 or float32 [N, C, H, W] on one GPU.
        tangents: Directions, [K, B, C, H, W].
        window: Odd side of the window.

    Raises:
        ValueError: Images of more than 256 rows or columns.
        CudaKernelError: A kernel could not be compiled or launched.
    """
    stored = StoredProblem(problem)
    # [B, K, C, H, W], as the kernel reads them.
    directions = tangents.detach().to(torch.float32).transpose(0, 1)
    if len(tangents) == 0:
        # The kernel without tangents does not count values from their centres.
        directions = torch.zeros_like(problem.x)[:, None]
    at_once = min(TANGENTS, directions.shape[1])
    slices = batch_slices(len(problem.x), stored.budget // scan_bytes(stored, window, at_once))
    states = [_jvp_state(stored.part(rows), directions[rows], window) for rows in slices]
    minimum, total, weighted = map(torch.cat, zip(*states, strict=True))
    sums = tangent_values(problem.images.shape[1], len(tangents))
    return PosteriorState(minimum, total, weighted[..., :sums])


def _jvp_state(stored: StoredProblem, tangents: Tensor, window: int) -> PosteriorState:
    channels = stored.noisy.shape[1]
    minimum = total = values = None
    inner, cross = [], []
    for first in range(0, tangents.shape[1], TANGENTS):
        # New memory: the kernel may read four values at once, and a caller's may start anywhere.
        group = tangents[:, first : first + TANGENTS].clone(memory_format=torch.contiguous_format)
        merged = scan(stored, window, group)
        # After the minimum: weights and weighted values, then the same of each tangent's products.
        sums = merged[:, 1:].unflatten(1, (1 + group.shape[1], 1 + channels))
        if total is None:
            minimum, total, values = merged[:, 0], sums[:, 0, 0], sums[:, 0, 1:]
        # Each group has a total of its own, rounded in its own way.
        products = sums[:, 1:] * (total / sums[:, 0, 0])[:, None, None]
        inner.append(products[:, :, 0])
        cross.append(products[:, :, 1:].flatten(1, 2))
    step = stored.step
    weighted = torch.cat(
        [values * step, *(c * step for c in inner), *(c * step**2 for c in cross)], 1
    )
    origin = (stored.centre.double() * step + stored.shift).flatten(2).transpose(1, 2)
    state = PosteriorState(stored.distances(minimum), total, weighted.transpose(1, 2))
    return uncentred(about_means(state, channels), origin)


def scan_bytes(stored: StoredProblem, window: int, tangents: int = 0) -> int:
    """Working memory of a scan per noisy image."""
    images = stored.problem.images
    plan = plan_window(window_shape(images[:1], window, tangents))
    splits = ceil_div(len(images), images_per_split(len(images)))
    height, width = images.shape[2:]
    # States in single precision, and the merged one in double.
    return plan.state_rows * height * width * 4 * (splits + 2)


def scan(stored: StoredProblem, window: int, tangents: Tensor | None = None) -> Tensor:
    """The merged state in stored units, float64 [B, 1 + sums, H W].

    Rows are the minimum, the total, the weighted values of the C channels; then for every tangent
    the weighted products and those times the values, all values relative to `stored.centre`.
    """
    merged: Tensor | None = None
    for images in stored.blocks():
        state = _scan_block(stored, images, window, tangents)
        merged = state if merged is None else _joined(merged, state, stored.factor)
    return merged


def _joined(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    minimum = torch.minimum(first[:, :1], second[:, :1])
    sums = sum(
        state[:, 1:] * torch.exp2((minimum - state[:, :1]) * factor.double()[:, None, None])
        for state in (first, second)
    )
    return torch.cat([minimum, sums], dim=1)


def _scan_block(
    stored: StoredProblem, images: Tensor, window: int, tangents: Tensor | None
) -> Tensor:
    count, device, batch = len(images), images.device, len(stored.noisy)
    shape = window_shape(images, window, 0 if tangents is None else tangents.shape[1])
    plan = plan_window(shape)
    per_split = images_per_split(count)
    launch = scan_launch(plan, batch, count)
    pixels = shape.height * shape.width
    partial = stored.noisy.new_empty(launch.grid[1], batch, plan.state_rows, pixels)
    # A kernel without tangents is given memory that it does not read.
    directions = stored.noisy if tangents is None else tangents
    run(
        launch,
        device,
        (images, count, per_split, stored.noisy, stored.factor, directions, partial),
    )
    merged = partial.new_empty(partial.shape[1:], dtype=torch.float64)
    run(
        merge_launch(batch, plan.state_rows, pixels),
        device,
        (partial, stored.factor, len(partial), pixels, merged),
    )
    return merged


def scan_launch(plan: WindowPlan, batch: int, count: int) -> Launch:
    """Sizes of the scan of `count` images."""
    splits = ceil_div(count, images_per_split(count))
    return Launch(
        "window_posterior",
        "window_posterior_scan",
        (batch, splits, plan.tiles * plan.slices),
        plan.threads,
        plan.shared_bytes,
        plan.macros,
    )


def merge_launch(batch: int, rows: int, pixels: int) -> Launch:
    """Sizes of the merge of states."""
    grid = (ceil_div(pixels, _MERGE_ENTRIES), batch, rows)
    return Launch("merge", "merge_states", grid, _MERGE_THREADS, 8 * _MERGE_THREADS)


def merge_sums(partial: Tensor) -> Tensor:
    """Sums over the splits in a fixed order: [splits, ...] float32 to [...] float64."""
    merged = partial.new_empty(partial.shape[1:], dtype=torch.float64)
    entries = merged.numel()
    grid = (ceil_div(entries, _MERGE_ENTRIES), 1, 1)
    launch = Launch("merge", "merge_sums", grid, _MERGE_THREADS, 8 * _MERGE_THREADS)
    run(launch, partial.device, (partial, len(partial), entries, merged))
    return merged
