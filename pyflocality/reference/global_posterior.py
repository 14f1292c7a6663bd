"""Posterior mean over whole images, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyflocality._problem import PosteriorProblem
from pyflocality._tangents import centre_of
from pyflocality.reference import state as posterior
from pyflocality.reference.state import PosteriorState


def global_posterior_state(problem: PosteriorProblem) -> PosteriorState:
    """Scan of all images with one query per batch element, Q = 1, that answers all D values."""

    def weigh(weights: Tensor, flat: Tensor) -> Tensor:
        return torch.matmul(weights[:, None, :, 0], flat)

    values = problem.images[0].numel()
    # One chunk holds its values, the differences of one query, and its squares.
    return _scan(problem, values, 3 * values, weigh)


def global_posterior_jvp_state(problem: PosteriorProblem, tangents: Tensor) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    centre = centre_of(problem).flatten(1)
    directions = tangents.flatten(2).transpose(0, 1)
    values = centre.shape[1]
    sums = posterior.tangent_values(values, len(tangents))

    def weigh(weights: Tensor, flat: Tensor) -> Tensor:
        rows = []
        for w, origin, u in zip(weights, centre, directions, strict=True):
            centred = flat - origin
            inner = centred @ u.T
            factors = [w, *(w * inner.T[..., None])]
            rows.append(posterior.tangent_sums(factors, centred[..., None]))
        return torch.stack(rows) if rows else weights.new_zeros(0, 1, sums)

    # And the centred values, their products with the weights, and the inner products.
    state = _scan(problem, sums, 5 * values + 3 * len(tangents), weigh)
    return posterior.uncentred(state, centre[:, None])


def _scan(
    problem: PosteriorProblem,
    sums: int,
    values_per_image: int,
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> PosteriorState:
    """Scan whose weighted sums weigh(weights [B, n, 1], values [n, D]) are [B, 1, sums]."""
    batch = len(problem.x)
    x = problem.x.flatten(1)
    per_image = (values_per_image + 4 * batch) * x.element_size()
    chunk = problem.images_at_a_time(per_image)
    alpha = problem.alpha.to(x.dtype)
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, 1, sums, x)
    for images in problem.chunks(chunk):
        flat = images.flatten(1)
        distance = squared_distances(x, flat, alpha)[..., None]
        state = posterior.update(state, distance, scale, partial(weigh, flat=flat))
    return state


def squared_distances(x: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """Squared distances |x_b - alpha_b v_i|^2 of [B, D] to [n, D]: [B, n].

    The differences are squared and summed as they are: expanding the square would cancel
    digits where x is close to an image, which is where small noise needs them.
    """
    rows = [(xb - ab * values).square().sum(1) for xb, ab in zip(x, alpha, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, len(values))
