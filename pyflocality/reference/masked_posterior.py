"""Posterior mean of each value over its own weighted set of inputs, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._budget import images_per_chunk
from pyflocality._problem import PosteriorProblem
from pyflocality.reference import state as posterior
from pyflocality.reference.state import PosteriorState
from pyflocality.weights import QueryWeights


def masked_posterior_state(problem: PosteriorProblem, weights: QueryWeights) -> PosteriorState:
    """Scan of all images with a query per output value, Q = D, that answers that one value."""
    batch, (queries, values) = len(problem.x), weights.shape
    x = problem.x.reshape(batch, values)
    by_input = weights.dense(x.dtype, x.device).T
    # One chunk holds its values, the squared differences of one query, and for the whole batch
    # distances, weights and one more temporary of that shape.
    per_image = (3 * values + 3 * batch * queries) * x.element_size()
    chunk = problem.chunk_size or images_per_chunk(
        problem.memory_budget, per_image, len(problem.images)
    )
    alpha = problem.alpha.to(x.dtype)
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, queries, 1, x)
    for images in problem.chunks(chunk):
        flat = images.flatten(1)
        distance = weighted_distances(x, flat, alpha, by_input)

        def weigh(posterior_weights: Tensor, flat: Tensor = flat) -> Tensor:
            return (posterior_weights * flat).sum(1)[..., None]

        state = posterior.update(state, distance, scale, weigh)
    return state


def weighted_distances(x: Tensor, values: Tensor, alpha: Tensor, by_input: Tensor) -> Tensor:
    """Weighted squared distances of [B, D] to [n, D] under weights [D, Q]: [B, n, Q].

    Squares of differences enter the product, not an expanded square: every term is of one sign
    and nothing cancels.
    """
    rows = [(xb - ab * values).square() @ by_input for xb, ab in zip(x, alpha, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, len(values), by_input.shape[1])
