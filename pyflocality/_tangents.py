"""What the operations for Jacobian-vector products share: checked tangents and the centre."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyflocality._backends import Call
from pyflocality._checks import check_float_tensor, describe
from pyflocality._problem import PosteriorProblem, _is_differentiated


def check_tangents(
    tangents: object, x: Tensor, sigma: float | Tensor, problem: PosteriorProblem
) -> Tensor:
    """Directions in the space of x, in the dtype of the computation: [K, B, C, H, W].

    Args:
        tangents: What the caller gave.
        x: The noisy images as the caller gave them, checked.
        sigma: The noise level as the caller gave it, checked but for 0.
        problem: The problem made of them.
    """
    if torch.isinf(problem.scale).any():
        raise ValueError(
            "`sigma` must be positive for derivatives, which have no limit as it falls to 0, got "
            f"{describe(sigma)}"
        )
    shape = tuple(x.shape)
    if isinstance(tangents, Tensor) and (tangents.ndim != 5 or tuple(tangents.shape[1:]) != shape):
        expected = ", ".join(["K", *map(str, shape)])
        raise ValueError(f"`tangents` must have shape [{expected}], got {describe(tangents)}")
    if isinstance(tangents, Tensor) and tangents.device != x.device:
        raise ValueError(f"`tangents` must be on {x.device} like `x`, got {describe(tangents)}")
    tangents = check_float_tensor(tangents, "tangents")
    if tangents.dtype != x.dtype:
        raise TypeError(f"`tangents` must be {x.dtype} like `x`, got {describe(tangents)}")
    return tangents.to(problem.x.dtype)


def tangent_call(problem: PosteriorProblem, tangents: Tensor, **facts: object) -> Call:
    """The call as a backend's predicate sees it."""
    call = problem.call(**facts)
    return replace(call, requires_grad=call.requires_grad or _is_differentiated(tangents))


def jacobian_factor(problem: PosteriorProblem) -> Tensor:
    """Factor alpha / (sigma^2 temperature) of the covariances in the Jacobian: float64 [B]."""
    return 2.0 * problem.scale * problem.alpha


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
