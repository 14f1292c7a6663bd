"""What the operations for derivatives share: the factor and the centre."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.posterior.problem import PosteriorProblem


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


def answer_centre_of(problem: PosteriorProblem) -> Tensor:
    """The same for what is answered, [B, A, C, H, W]: that of the images, 0 for their values."""
    centre = centre_of(problem)[:, None]
    if problem.values is None:
        return centre
    zeros = centre.new_zeros(len(centre), problem.values.shape[1], *problem.image_shape)
    return torch.cat([centre, zeros], 1) if problem.with_image else zeros
