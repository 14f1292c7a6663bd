"""Posterior means with query and response weights, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.reference.masked_posterior import (
    dense_bytes,
    weighted_derivatives,
    weighted_distances,
)
from pyflocality.weights import QueryWeights


def scan(problem: PosteriorProblem, weights: QueryWeights, responses: QueryWeights) -> Tensor:
    """Blend of Q posterior means under response weights, [B, A, D].

    Two scans of the images: the first finds each query's posterior, the second adds up how much
    of every image the queries that answer a value want there. Neither holds a whole image per
    query.
    """
    batch, (queries, values) = len(problem.x), weights.shape
    x = problem.x.reshape(batch, values)
    by_input = weights.dense(x.dtype, x.device).T
    answers = responses.dense(x.dtype, x.device)
    per_image = (3 * values + 4 * batch * max(queries, values)) * x.element_size()
    chunk = problem.images_at_a_time(per_image, dense_bytes(by_input) + dense_bytes(answers))
    alpha = problem.alpha.to(x.dtype)
    scale = posterior.finite_factor(problem.scale, x.dtype)
    state = posterior.init(batch, queries, 0, x)
    for images in problem.chunks(chunk):
        distance = weighted_distances(x, images.flatten(1), alpha, by_input)
        state = posterior.update(state, distance, scale, posterior.no_values)
        del images, distance
    state = problem.merged(state, scale)
    blend = x.new_zeros(batch, problem.answered, values)
    for images, answered in problem.pairs(chunk):
        flat = images.flatten(1)
        gap = weighted_distances(x, flat, alpha, by_input) - state.minimum[:, None]
        share = torch.exp(-gap * scale[:, None, None]) / state.total[:, None]
        wanted, flat = torch.matmul(share, answers), answered.flatten(2)
        sums = [(wanted * flat[:, a]).sum(1) for a in range(problem.answered)]
        blend = blend + torch.stack(sums, dim=1)
        del images, answered, flat, gap, share, wanted
    return problem.summed(blend) / answers.sum(0)


def jvp(
    problem: PosteriorProblem, tangents: Tensor, weights: QueryWeights, responses: QueryWeights
) -> tuple[Tensor, Tensor]:
    """The blend [B, *answers] and its derivatives [K, B, *answers] along tangents."""
    by_query, answers = _dense(problem, weights, responses)
    result = weighted_derivatives(
        "jvp", problem, tangents, by_query, lambda products: products @ by_query.T, answers
    )
    assert result.blend is not None
    return result.blend, result.derivatives


def vjp(
    problem: PosteriorProblem, cotangents: Tensor, weights: QueryWeights, responses: QueryWeights
) -> Tensor:
    """Vector-Jacobian products [K, B, C, H, W] along cotangents of what is answered."""
    by_query, answers = _dense(problem, weights, responses)
    return weighted_derivatives(
        "vjp", problem, cotangents, by_query, lambda products: products @ answers.T, by_query
    ).derivatives


def _dense(
    problem: PosteriorProblem, weights: QueryWeights, responses: QueryWeights
) -> tuple[Tensor, Tensor]:
    """Weights and each query's share in the answers, [Q, D] each."""
    x = problem.x
    answers = responses.dense(x.dtype, x.device)
    return weights.dense(x.dtype, x.device), answers / answers.sum(0)
