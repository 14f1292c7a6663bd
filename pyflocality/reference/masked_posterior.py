"""Posterior mean of each value over its own weighted set of inputs, in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from pyflocality._budget import images_per_chunk
from pyflocality._problem import PosteriorProblem
from pyflocality._tangents import centre_of
from pyflocality.reference import state as posterior
from pyflocality.reference.state import PosteriorState
from pyflocality.weights import QueryWeights


def masked_posterior_state(problem: PosteriorProblem, weights: QueryWeights) -> PosteriorState:
    """Scan of all images with a query per output value, Q = D, that answers that one value."""

    def weigh(posterior_weights: Tensor, flat: Tensor) -> Tensor:
        return (posterior_weights * flat).sum(1)[..., None]

    by_input = weights.dense(problem.x.dtype, problem.x.device).T
    # One chunk holds its values and the squared differences of one query.
    return _scan(problem, by_input, 1, 3 * len(by_input), weigh)


def masked_posterior_jvp_state(
    problem: PosteriorProblem, tangents: Tensor, weights: QueryWeights
) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    centre = centre_of(problem).flatten(1)
    directions = tangents.flatten(2).transpose(0, 1)
    by_input = weights.dense(problem.x.dtype, problem.x.device).T
    sums = posterior.tangent_values(1, len(tangents))

    def weigh(posterior_weights: Tensor, flat: Tensor) -> Tensor:
        rows = []
        for w, origin, u in zip(posterior_weights, centre, directions, strict=True):
            centred = flat - origin
            factors = [w, *(w * ((direction * centred) @ by_input) for direction in u)]
            rows.append(posterior.tangent_sums(factors, centred[:, None]))
        return torch.stack(rows) if rows else flat.new_zeros(0, len(by_input), sums)

    # And the centred values, a factor for every tangent, and two temporaries.
    state = _scan(problem, by_input, sums, (6 + len(tangents)) * len(by_input), weigh)
    return posterior.uncentred(state, centre[..., None])


def _scan(
    problem: PosteriorProblem,
    by_input: Tensor,
    sums: int,
    values_per_image: int,
    weigh: Callable[[Tensor, Tensor], Tensor],
) -> PosteriorState:
    """Scan whose weighted sums weigh(weights [B, n, Q], values [n, D]) are [B, Q, sums]."""
    x, batch, queries = problem.x.flatten(1), len(problem.x), by_input.shape[1]
    # And for the whole batch distances, weights and one more temporary of that shape.
    per_image = (values_per_image + 3 * batch * queries) * x.element_size()
    chunk = problem.chunk_size or images_per_chunk(
        problem.memory_budget, per_image, len(problem.images)
    )
    alpha = problem.alpha.to(x.dtype)
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, queries, sums, x)
    for images in problem.chunks(chunk):
        flat = images.flatten(1)
        distance = weighted_distances(x, flat, alpha, by_input)
        state = posterior.update(state, distance, scale, partial(weigh, flat=flat))
    return state


def weighted_distances(x: Tensor, values: Tensor, alpha: Tensor, by_input: Tensor) -> Tensor:
    """Weighted squared distances of [B, D] to [n, D] under weights [D, Q]: [B, n, Q].

    Squares of differences enter the product, not an expanded square: every term is of one sign
    and nothing cancels.
    """
    rows = [(xb - ab * values).square() @ by_input for xb, ab in zip(x, alpha, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, len(values), by_input.shape[1])
