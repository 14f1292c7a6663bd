"""Posterior mean over a square window around each pixel, in plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812  (the name everybody gives it)
from torch import Tensor

from pyflocality._budget import images_per_chunk
from pyflocality._problem import PosteriorProblem
from pyflocality.reference import state as posterior
from pyflocality.reference.state import PosteriorState


def window_posterior_state(problem: PosteriorProblem, window: int) -> PosteriorState:
    """Scan of all images with a query per pixel, Q = H W, that answers its C values."""
    x, batch = problem.x, len(problem.x)
    channels, height, width = problem.images.shape[1:]
    # One chunk holds its values, differences and their squares, and four planes per query.
    planes = batch * (2 * channels + 4) + 2 * channels
    chunk = problem.chunk_size or images_per_chunk(
        problem.memory_budget, planes * height * width * x.element_size(), len(problem.images)
    )
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, height * width, channels, x)
    for values in problem.chunks(chunk):
        difference = x[:, None] - alpha * values
        distance = box_sum(difference.square().sum(2), window).flatten(2)
        flat = values.flatten(2)

        def weigh(weights: Tensor, flat: Tensor = flat) -> Tensor:
            return torch.stack(
                [(weights * flat[:, c]).sum(1) for c in range(flat.shape[1])], dim=-1
            )

        state = posterior.update(state, distance, scale, weigh)
    return state


def box_sum(planes: Tensor, window: int) -> Tensor:
    """Sum over the window x window neighbourhood of every pixel, cut at the border.

    Args:
        planes: Values, [B, n, H, W].
        window: Odd side of the neighbourhood.

    Returns:
        Sums, [B, n, H, W].
    """
    half = window // 2
    rows = F.avg_pool2d(planes, (window, 1), 1, (half, 0), divisor_override=1)
    return F.avg_pool2d(rows, (1, window), 1, (0, half), divisor_override=1)
