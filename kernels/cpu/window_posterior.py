"""Posterior over square windows on the CPU: a query per pixel, as in the reference."""

from __future__ import annotations

from torch import Tensor

from pyflocality.kernels.cpu.passes import (
    BYTES_PER_SUM,
    apply_weights,
    scan_images,
    scan_tangents,
    scan_windows,
    window_kernel,
)
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, finalize


def scan(
    problem: PosteriorProblem, window: int, *, instruction_set: str | None = None
) -> PosteriorState:
    """The state of all images."""
    return scan_windows(
        problem, window_kernel("window_posterior", instruction_set, problem, window)
    )


def jvp(
    problem: PosteriorProblem,
    tangents: Tensor,
    window: int,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """The state of all images with tangents [K, B, C, H, W]."""
    kernel = window_kernel("window_posterior_jvp", instruction_set, problem, window)
    centre = StoredProblem(problem).centre
    queries = centre.shape[2:].numel()
    # Up to 16 lanes.
    return scan_tangents(problem, tangents, kernel, centre.flatten(1), queries, 64)


def vjp(
    problem: PosteriorProblem,
    cotangents: Tensor,
    window: int,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Vector-Jacobian products [K, B, C, H, W] along cotangents of what is answered."""
    stored = StoredProblem(problem)
    channels, height, width = problem.images.shape[1:]
    kernel = window_kernel("window_posterior", instruction_set, problem, window)
    size = height * width * (1 + problem.answered * channels) * BYTES_PER_SUM
    state = scan_images(stored, kernel, size)
    state = problem.merged(state, stored.scale)
    # [B, H W, A C] -> [B, A D]
    mean = finalize(state).transpose(1, 2).flatten(1).float()
    directions = stored.cotangents(cotangents)
    kernel = window_kernel("window_posterior_vjp", instruction_set, problem, window)
    sums = apply_weights(stored, kernel, state, (directions, mean, stored.centre.flatten(1)))
    return stored.derivatives(sums)
