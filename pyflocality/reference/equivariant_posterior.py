"""Posterior mean over the patches of all images at all positions, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyflocality._budget import images_per_chunk
from pyflocality._problem import PosteriorProblem
from pyflocality.reference import state as posterior
from pyflocality.reference.state import PosteriorState
from pyflocality.reference.window_posterior import box_sum


def equivariant_posterior_state(
    problem: PosteriorProblem, window: int, circular: bool
) -> PosteriorState:
    """Scan of all patches with a query per pixel, Q = H W, that answers its C values.

    One displacement between query and patch at a time: the window sums of the squared
    differences between the displaced noisy image and the training images are the distances of
    all pairs at that displacement.
    """
    x, batch = problem.x, len(problem.x)
    channels, height, width = problem.images.shape[1:]
    planes = batch * (3 * channels + 6) + 3 * channels
    chunk = problem.chunk_size or images_per_chunk(
        problem.memory_budget, planes * height * width * x.element_size(), len(problem.images)
    )
    alpha = problem.alpha.to(x.dtype)[:, None, None, None, None]
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, height * width, channels, x)
    for values in problem.chunks(chunk):
        for down, right, allowed in displacements(height, width, window, circular):
            displaced = x.roll((-down, -right), (-2, -1))
            difference = displaced[:, None] - alpha * values
            at_patch = box_sum(difference.square().sum(2), window)
            at_patch = torch.where(allowed.to(x.device), at_patch, torch.inf)
            distance = at_patch.roll((down, right), (-2, -1)).flatten(2)
            flat = values.roll((down, right), (-2, -1)).flatten(2)

            def weigh(weights: Tensor, flat: Tensor = flat) -> Tensor:
                return torch.stack(
                    [(weights * flat[:, c]).sum(1) for c in range(flat.shape[1])], dim=-1
                )

            state = posterior.update(state, distance, scale, weigh)
    return state


def displacements(
    height: int, width: int, window: int, circular: bool
) -> Iterator[tuple[int, int, Tensor]]:
    """Displacements (down, right) from patch to query, and where patches may be: bool [H, W]."""
    for down, rows in _axis(height, window, circular):
        for right, columns in _axis(width, window, circular):
            yield down, right, rows[:, None] & columns


def _axis(length: int, window: int, circular: bool) -> Iterator[tuple[int, Tensor]]:
    place, half = torch.arange(length), window // 2
    interior = (place >= half) & (place < length - half)
    for shift in range(length) if circular else range(-length + 1, length):
        if circular:
            allowed = interior
        elif shift == 0:
            allowed = torch.ones(length, dtype=torch.bool)
        else:
            query = place + shift
            inside = (query >= half) & (query < length - half)
            allowed = interior & inside
        if allowed.any():
            yield shift, allowed
