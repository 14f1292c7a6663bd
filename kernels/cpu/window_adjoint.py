"""Posterior weights spread over square windows on the CPU: units as in `native.posterior`.

Two passes over the training images: a scan for every window's smallest distance and total weight,
then one that computes the distances again and applies the weights. Nothing is kept per image and
window.
"""

from __future__ import annotations

from torch import Tensor

from pyflocality._support.native import native_module
from pyflocality.kernels.cpu.posterior import (
    merged_stored,
    scan_stored,
    spread_stored,
    value_unit,
    within_range,
)
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import finalize
from pyflocality.posterior.tangents import jacobian_factor
from pyflocality.reference.patch_set import windows_over

# A sum in the kernel takes up to 16 lanes of float32, and 3 numbers in double precision.
_BYTES_PER_SUM = 64 + 24


def patch_set_mean(
    problem: PosteriorProblem, window: int, *, instruction_set: str | None = None
) -> Tensor:
    """Posterior means of all windows inside the image over one another, [B, C, H, W]."""
    geometry = _geometry(problem, window)
    pixels = geometry["height"] * geometry["width"]
    scan = native_module().patch_weights
    state = scan_stored(problem, scan, pixels * _BYTES_PER_SUM, instruction_set, **geometry)
    state = merged_stored(problem, state)
    spread = native_module().window_adjoint
    sums = spread_stored(problem, spread, state, (), instruction_set, **geometry)[:, 0]
    unit, shift = value_unit(problem)
    means = sums.reshape(problem.x.shape) / windows_over(problem.x.shape[2:], window, sums)
    return means * unit + shift


def window_posterior_vjp(
    problem: PosteriorProblem,
    cotangents: Tensor,
    window: int,
    *,
    instruction_set: str | None = None,
) -> Tensor:
    """Transposed derivatives along cotangents [K, B, C, H, W], of the same shape."""
    geometry = _geometry(problem, window)
    channels, pixels = geometry["channels"], geometry["height"] * geometry["width"]
    per_query = pixels * (channels + 1) * _BYTES_PER_SUM
    scan = native_module().window_posterior
    state = scan_stored(problem, scan, per_query, instruction_set, **geometry)
    state = merged_stored(problem, state)
    # [B, H W, C] -> [B, D]
    mean = finalize(state).transpose(1, 2).flatten(1).float()
    directions = cotangents.detach().float().flatten(2).transpose(0, 1)
    per_image = (directions, mean, within_range(problem))
    spread = native_module().window_adjoint
    sums = spread_stored(problem, spread, state, per_image, instruction_set, **geometry)
    unit, _ = value_unit(problem)
    factor = jacobian_factor(problem) * unit**2
    return (sums * factor[:, None, None]).transpose(0, 1).reshape(cotangents.shape)


def _geometry(problem: PosteriorProblem, window: int) -> dict[str, int]:
    channels, height, width = problem.images.shape[1:]
    return {"channels": channels, "height": height, "width": width, "window": window}
