"""What the operations for derivatives share: checked directions and the centre."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyflocality._support.checks import (
    LevelLike,
    as_pair,
    check_float_tensor,
    check_level,
    describe,
)
from pyflocality._support.transforms import has_readable_values, is_differentiated
from pyflocality.posterior.call import Call
from pyflocality.posterior.problem import PosteriorProblem


def check_tangents(
    tangents: object,
    x: Tensor,
    sigma: LevelLike,
    problem: PosteriorProblem,
    name: str = "tangents",
) -> Tensor:
    """Directions of a derivative of the problem, in the dtype of the computation: [K, B, C, H, W].

    Args:
        tangents: What the caller gave.
        x: The noisy images as the caller gave them, checked.
        sigma: The noise level as the caller gave it, checked but for 0.
        problem: The problem made of them.
        name: Name of the argument in error messages.
    """
    sigma, _ = as_pair(sigma)
    check_noise(check_level(sigma, len(x), x.device, "sigma", allow_zero=True), sigma)
    return check_directions(tangents, x, name).to(problem.x.dtype)


def check_noise(level: Tensor, sigma: float | Tensor) -> None:
    """A noise level at which the posterior has derivatives.

    Args:
        level: The noise level, checked but for 0.
        sigma: What the caller gave, for the error message.
    """
    if has_readable_values(level) and (level == 0).any():
        raise ValueError(
            "`sigma` must be positive for derivatives, which have no limit as it falls to 0, got "
            f"{describe(sigma)}"
        )


def check_directions(directions: object, x: Tensor, name: str) -> Tensor:
    """K batches in the space of x, finite and in its dtype: [K, B, C, H, W].

    Args:
        directions: What the caller gave.
        x: The noisy images, checked, [B, C, H, W].
        name: Name of the argument in error messages.
    """
    shape = tuple(x.shape)
    if isinstance(directions, Tensor) and directions.device != x.device:
        raise ValueError(f"`{name}` must be on {x.device} like `x`, got {describe(directions)}")
    directions = check_float_tensor(directions, name, finite=False)
    if directions.ndim != 5 or tuple(directions.shape[1:]) != shape:
        expected = ", ".join(["K", *map(str, shape)])
        raise ValueError(f"`{name}` must have shape [{expected}], got {describe(directions)}")
    if directions.dtype != x.dtype:
        raise TypeError(f"`{name}` must be {x.dtype} like `x`, got {describe(directions)}")
    return check_float_tensor(directions, name)


def tangent_call(problem: PosteriorProblem, tangents: Tensor, **facts: object) -> Call:
    """The call as a backend's predicate sees it."""
    call = problem.call(**facts)
    return replace(call, requires_grad=call.requires_grad or is_differentiated(tangents))


def jacobian_factor(problem: PosteriorProblem) -> Tensor:
    """Factor alpha / (sigma^2 temperature) of the covariances in the Jacobian: float64 [B].

    Where it overflows it is the largest number: a covariance of 0 stays a derivative of 0.
    """
    return (2.0 * problem.scale * problem.alpha).clamp(max=torch.finfo(torch.float64).max)


def centre_of(problem: PosteriorProblem) -> Tensor:
    """What values are counted from while covariances are summed, [B, C, H, W].

    A covariance does not depend on it, but its digits do: where noise is small the images that
    matter lie near x / alpha and all but the digits of their differences would cancel. Where noise
    is large x / alpha lies far outside the data, hence the bounds. For the same reason it counts
    as a constant in derivatives.
    """
    x = problem.x.detach()
    alpha = problem.alpha.to(x.dtype)[:, None, None, None]
    return (x / alpha).clamp(-1.0, 1.0)
