"""Posterior over square windows on the CPU: a query per pixel, as in the reference."""

from __future__ import annotations

from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.passes import (
    BYTES_PER_SUM,
    apply_weights,
    image_shape,
    scan_images,
    scan_tangents,
    scan_windows,
)
from pyflocality.kernels.stored import StoredProblem
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState, finalize


def scan(
    problem: PosteriorProblem, window: int, *, instruction_set: str | None = None
) -> PosteriorState:
    """The state of all images."""
    return scan_windows(problem, native_module().window_posterior, window, instruction_set)


def jvp(
    problem: PosteriorProblem,
    tangents: Tensor,
    window: int,
    *,
    instruction_set: str | None = None,
) -> PosteriorState:
    """The state of all images with tangents [K, B, C, H, W]."""
    shape = image_shape(problem)
    return scan_tangents(
        problem,
        tangents,
        native_module().window_posterior_jvp,
        StoredProblem(problem).centre.flatten(1),
        shape[1] * shape[2],
        # Up to 16 lanes.
        64,
        instruction_set,
        image_shape=shape,
        window=window,
    )


def vjp(
    problem: PosteriorProblem,
    cotangents: Tensor,
    window: int,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Vector-Jacobian products of cotangents [K, B, C, H, W], of the same shape."""
    stored = StoredProblem(problem)
    shape = image_shape(problem)
    per_image = shape[1] * shape[2] * (shape[0] + 1) * BYTES_PER_SUM
    kernel = native_module().window_posterior
    state = scan_images(
        stored, kernel, per_image, instruction_set, image_shape=shape, window=window
    )
    state = problem.merged(state, stored.scale)
    # [B, H W, C] -> [B, D]
    mean = finalize(state).transpose(1, 2).flatten(1).float()
    directions = cotangents.detach().float().flatten(2).transpose(0, 1)
    sums = apply_weights(
        stored,
        native_module().window_posterior_vjp,
        state,
        instruction_set,
        (directions, mean, stored.centre.flatten(1)),
        image_shape=shape,
        window=window,
    )
    return (sums * stored.slope[:, None, None]).transpose(0, 1).reshape(cotangents.shape)
