"""Passes of the window kernels over the training images, in stored units.

`window_posterior` takes in the images once for a whole batch of noisy images; the cost hardly
depends on the window. `window_vjp` computes the distances again, once the scan has told the
minimum and total of every window, and applies the weights: no memory for a weight per image and
pixel. `merge.cu` joins what blocks wrote.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.kernels.cuda._launch import Launch, run
from pyflocality.kernels.geometry import (
    WindowPlan,
    WindowShape,
    ceil_div,
    images_per_split,
    plan_vjp,
    plan_window,
)
from pyflocality.kernels.stored import StoredProblem

_MERGE_THREADS, _MERGE_ENTRIES = 256, 32
_QUAD = 4


def window_shape(images: Tensor, window: int, tangents: int = 0) -> WindowShape:
    """What a window kernel must be compiled for to read these images, [n, C, H, W]."""
    channels, height, width = images.shape[1:]
    vector = width % _QUAD == 0 and images.data_ptr() % (_QUAD * images.element_size()) == 0
    stored_bytes = images.dtype == torch.uint8
    return WindowShape(channels, height, width, window, stored_bytes, vector, tangents)


def scan_bytes(stored: StoredProblem, window: int, tangents: int = 0) -> int:
    """Working memory of a scan per noisy image."""
    images = stored.problem.images
    plan = plan_window(window_shape(images[:1], window, tangents))
    splits = ceil_div(len(images), images_per_split(len(images)))
    height, width = images.shape[2:]
    # States in single precision, and the merged one in double.
    return plan.state_rows * height * width * 4 * (splits + 2)


def vjp_bytes(stored: StoredProblem, window: int) -> int:
    """Working memory per noisy image of a scan and the pass that applies its weights."""
    images = stored.problem.images
    splits = ceil_div(len(images), images_per_split(len(images)))
    return scan_bytes(stored, window) + 4 * (splits + 2) * images[0].numel()


def scan_windows(stored: StoredProblem, window: int, tangents: Tensor | None = None) -> Tensor:
    """The state after all images, float64 [B, 1 + sums, H W].

    Rows are the minimum, the total, the weighted values of the C channels; then for every tangent
    [B, K, C, H, W] the weighted products and those times the values, all values relative to
    `stored.centre`.
    """
    merged: Tensor | None = None
    for images in stored.blocks():
        state = _scan_block(stored, images, window, tangents)
        merged = state if merged is None else _joined(merged, state, stored.factor)
    assert merged is not None
    return merged


def _joined(first: Tensor, second: Tensor, factor: Tensor) -> Tensor:
    minimum = torch.minimum(first[:, :1], second[:, :1])
    one, two = (
        state[:, 1:] * torch.exp2((minimum - state[:, :1]) * factor.double()[:, None, None])
        for state in (first, second)
    )
    return torch.cat([minimum, one + two], dim=1)


def _scan_block(
    stored: StoredProblem, images: Tensor, window: int, tangents: Tensor | None
) -> Tensor:
    count, batch, (height, width) = len(images), len(stored.noisy), images.shape[2:]
    shape = window_shape(images, window, 0 if tangents is None else tangents.shape[1])
    plan = plan_window(shape)
    launch = _launch("window_posterior", plan, batch, count, plan.tiles)
    partial = stored.noisy.new_empty(launch.grid[1], batch, plan.state_rows, height * width)
    # A kernel without tangents is given memory that it does not read.
    directions = stored.noisy if tangents is None else tangents
    run(
        launch,
        *(images, count, images_per_split(count)),
        *(stored.noisy, stored.factor, directions, partial),
    )
    merged = partial.new_empty(partial.shape[1:], dtype=torch.float64)
    launch = _merge("merge_states", height * width, batch, plan.state_rows)
    run(launch, partial, stored.factor, len(partial), height * width, merged)
    return merged


def apply_weights(
    stored: StoredProblem,
    state: Tensor,
    window: int,
    cotangent: Tensor | None = None,
    mean: Tensor | None = None,
) -> Tensor:
    """Sums over all images of the weights of every window over a pixel times its values.

    Args:
        stored: The noisy images [B, C, H, W].
        state: What `scan_windows` answers without tangents.
        window: Side of the window.
        cotangent: None takes the weights as they are, over windows inside the image; else g,
            [B, C, H, W], by which all windows count their value less its mean.
        mean: The posterior mean, [B, C, H W], beside a cotangent.

    Returns:
        The sums, float64 [B, C, H, W].
    """
    minimum = state[:, 0].float().contiguous()
    inverse = state[:, 1].reciprocal().float().contiguous()
    # A kernel without a cotangent is given memory that it does not read.
    slopes = [stored.noisy if some is None else some for some in (cotangent, mean)]
    result: Tensor | None = None
    for images in stored.blocks():
        plan = plan_vjp(window_shape(images, window))
        chunks = ceil_div(plan.shape.height * ceil_div(plan.shape.width, _QUAD), plan.threads)
        launch = _launch(
            *("window_vjp", plan, len(stored.noisy), len(images), chunks),
            COTANGENT=int(cotangent is not None),
        )
        partial = stored.noisy.new_empty(launch.grid[1], *stored.noisy.shape)
        run(
            launch,
            *(images, len(images), images_per_split(len(images))),
            *(stored.noisy, stored.factor, minimum, inverse, *slopes, partial),
        )
        sums = merge_sums(partial)
        result = sums if result is None else result + sums
    assert result is not None
    return result


def merge_sums(partial: Tensor) -> Tensor:
    """Sums over the splits in a fixed order: [splits, ...] float32 to [...] float64."""
    merged = partial.new_empty(partial.shape[1:], dtype=torch.float64)
    entries = merged.numel()
    run(_merge("merge_sums", entries), partial, len(partial), entries, merged)
    return merged


def _launch(
    kernel: str, plan: WindowPlan, batch: int, count: int, tiles: int, **macros: int
) -> Launch:
    """A kernel over `count` images: a block for each noisy image, split, tile and slice."""
    grid = (batch, ceil_div(count, images_per_split(count)), tiles * plan.slices)
    macros = plan.macros | {f"PYFLOCALITY_{name}": value for name, value in macros.items()}
    return Launch(kernel, kernel, grid, plan.threads, plan.shared_bytes, macros)


def _merge(kernel: str, entries: int, batch: int = 1, rows: int = 1) -> Launch:
    grid = (ceil_div(entries, _MERGE_ENTRIES), batch, rows)
    return Launch("merge", kernel, grid, _MERGE_THREADS, 8 * _MERGE_THREADS)
