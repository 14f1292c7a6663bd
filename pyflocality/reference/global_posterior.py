"""Posterior mean over whole images, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._budget import images_per_chunk
from pyflocality._problem import PosteriorProblem
from pyflocality.reference import state as posterior
from pyflocality.reference.state import PosteriorState


def global_posterior_state(problem: PosteriorProblem) -> PosteriorState:
    """Scan of all images with one query per batch element, Q = 1, that answers all D values."""
    batch, values = len(problem.x), problem.images[0].numel()
    x = problem.x.reshape(batch, values)
    # One chunk holds its values, the differences of one query, and its squares.
    per_image = 3 * values * x.element_size() + 4 * batch * x.element_size()
    chunk = problem.chunk_size or images_per_chunk(
        problem.memory_budget, per_image, len(problem.images)
    )
    alpha = problem.alpha.to(x.dtype)
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, 1, values, x)
    for images in problem.chunks(chunk):
        flat = images.flatten(1)
        distance = squared_distances(x, flat, alpha)[..., None]

        def weigh(weights: Tensor, flat: Tensor = flat) -> Tensor:
            return torch.matmul(weights[:, None, :, 0], flat)

        state = posterior.update(state, distance, scale, weigh)
    return state


def squared_distances(x: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """Squared distances |x_b - alpha_b v_i|^2 of [B, D] to [n, D]: [B, n].

    The differences are squared and summed as they are: expanding the square would cancel
    digits where x is close to an image, which is where small noise needs them.
    """
    rows = [(xb - ab * values).square().sum(1) for xb, ab in zip(x, alpha, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, len(values))
