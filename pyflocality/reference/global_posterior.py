"""Posterior mean over whole images, in plain torch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.tangents import centre_of


def scan(problem: PosteriorProblem) -> PosteriorState:
    """Scan of all images with one query per batch element, Q = 1, that answers all A D values."""
    values = problem.images[0].numel()
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init(len(problem.x), 1, problem.answered * values, problem.x)
    # One chunk holds its values, the differences of one query, and its squares.
    for keys, flat, distance in _distances(problem, 3 * values):

        def weigh(weights: Tensor, flat: Tensor = flat) -> Tensor:
            return torch.matmul(weights[:, None, :, 0], flat)

        state = posterior.update(state, distance, scale, weigh)
        del keys, flat, distance, weigh
    return state


def jvp(problem: PosteriorProblem, tangents: Tensor) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    centre = centre_of(problem).flatten(1)
    directions = tangents.flatten(2).transpose(0, 1)
    values, count = centre.shape[1], len(tangents)
    answered = problem.answered * values
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init_tangents(len(centre), 1, answered, count, problem.x)
    # And the values from the nearest image, their products with the weights, and inner products.
    for keys, flat, distance in _distances(problem, 3 * values + 3 * answered + 4 * count):

        def terms(b: int, keys: Tensor = keys, flat: Tensor = flat) -> tuple[Tensor, Tensor]:
            return ((keys - centre[b]) @ directions[b].T).T[..., None], flat[..., None]

        state = posterior.update_tangents(state, distance, scale, answered, terms)
        del keys, flat, distance, terms
    return state


def _distances(
    problem: PosteriorProblem, values_per_image: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The images in chunks, [n, D], their answers [n, A D], and distances [B, n, 1]."""
    x = problem.x.flatten(1)
    per_image = (values_per_image + 4 * len(x)) * x.element_size()
    chunk = problem.images_at_a_time(per_image)
    alpha = problem.alpha.to(x.dtype)
    for images, values in problem.pairs(chunk):
        flat = images.flatten(1)
        yield flat, values.flatten(1), squared_distances(x, flat, alpha)[..., None]
        del images, values, flat


def squared_distances(x: Tensor, values: Tensor, alpha: Tensor) -> Tensor:
    """Squared distances |x_b - alpha_b v_i|^2 of [B, D] to [n, D]: [B, n].

    The differences are squared and summed as they are: expanding the square would cancel
    digits where x is close to an image, which is where small noise needs them.
    """
    rows = [(xb - ab * values).square().sum(1) for xb, ab in zip(x, alpha, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, len(values))
