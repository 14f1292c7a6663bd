"""Posterior mean of each value over its own weighted set of inputs, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pyflocality._support.budget import ALWAYS_ALLOWED, memory_budget_bytes
from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.tangents import centre_of
from pyflocality.posterior.tiles import joined, output_bands
from pyflocality.reference.two_passes import Piece, TwoPasses, two_passes
from pyflocality.weights import QueryWeights

# Outputs of a tile: places among all, int64 [n], or all of them.
Outputs = slice | Tensor


def scan(problem: PosteriorProblem, weights: QueryWeights) -> PosteriorState:
    """Scan of all images with a query per output value, Q = D, that answers that one value."""
    tiles = _tiles(problem, weights)
    return joined([(outputs, _scan(problem, outputs, by_query)) for outputs, by_query in tiles])


def jvp(problem: PosteriorProblem, tangents: Tensor, weights: QueryWeights) -> PosteriorState:
    """The same scan with tangents [K, B, C, H, W]."""
    return joined(
        [
            (outputs, _jvp(problem, tangents, outputs, by_query))
            for outputs, by_query in _tiles(problem, weights)
        ]
    )


def vjp(problem: PosteriorProblem, cotangents: Tensor, weights: QueryWeights) -> Tensor:
    """Vector-Jacobian products along cotangents [K, B, C, H, W], of the same shape."""
    parts = []
    for outputs, by_query in _tiles(problem, weights):

        def inner(products: Tensor, outputs: Outputs = outputs) -> Tensor:
            return products[:, outputs]

        found = weighted_derivatives(problem, cotangents, by_query, inner, by_query)
        parts.append(found.derivatives)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _scan(problem: PosteriorProblem, outputs: Outputs, by_query: Tensor) -> PosteriorState:
    """The scan of some outputs, whose weights are [n, D]."""
    by_input = by_query.T
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init(len(problem.x), by_input.shape[1], 1, problem.x)
    # One chunk holds its values and the squared differences of one query.
    for flat, distance in _distances(problem, by_input, 3 * len(by_input)):

        def weigh(posterior_weights: Tensor, flat: Tensor = flat) -> Tensor:
            return (posterior_weights * flat[:, outputs]).sum(1)[..., None]

        state = posterior.update(state, distance, scale, weigh)
        del flat, distance, weigh
    return state


def _jvp(
    problem: PosteriorProblem, tangents: Tensor, outputs: Outputs, by_query: Tensor
) -> PosteriorState:
    """The same with tangents [K, B, C, H, W]."""
    centre = centre_of(problem).flatten(1)
    directions = tangents.flatten(2).transpose(0, 1)
    by_input = by_query.T
    (inputs, queries), count = by_input.shape, len(tangents)
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init_tangents(len(centre), queries, 1, count, problem.x)
    # And the centred values, a product for every tangent, and temporaries.
    for flat, distance in _distances(problem, by_input, (9 + count) * inputs):

        def terms(b: int, flat: Tensor = flat) -> tuple[list[Tensor], Tensor]:
            centred = flat - centre[b]
            return [(u * centred) @ by_input for u in directions[b]], flat[:, None, outputs]

        state = posterior.update_tangents(state, distance, scale, 1, terms)
        del flat, distance, terms
    return state


def _tiles(problem: PosteriorProblem, weights: QueryWeights) -> Iterator[tuple[Outputs, Tensor]]:
    """Outputs that are worked on together, and their weights as numbers [n, D]."""
    inputs, x = weights.shape[1], problem.x
    # A mask as bytes, and as numbers.
    each = inputs * (1 + x.element_size())
    limit = max(memory_budget_bytes(problem.memory_budget), ALWAYS_ALLOWED) // 2
    bands = output_bands(problem.image_shape, each, limit)
    if len(bands) == 1:
        yield slice(None), weights.dense(x.dtype, x.device)
        return
    for outputs in bands:
        yield outputs.to(x.device), weights.tile(outputs).dense(x.dtype, x.device)


def weighted_derivatives(
    problem: PosteriorProblem,
    directions: Tensor,
    weights: Tensor,
    inner: Callable[[Tensor], Tensor],
    answers: Tensor,
    *,
    blend: bool = False,
) -> TwoPasses:
    """Derivatives of posteriors with weights along directions, by two scans.

    Args:
        problem: The problem.
        directions: Directions [K, B, C, H, W].
        weights: Weights of the inputs in the distances, [Q, D].
        inner: Maps products of direction and values [n, D] to their sums per query, [n, Q].
        answers: Where and how much every query's coefficients count, [Q, D].
        blend: Whether the posterior weights themselves are applied to the values, too; they are
            then those of values as they are, if the columns of `answers` sum to 1.
    """
    x, shape, (queries, values) = problem.x.flatten(1), problem.x.shape[1:], weights.shape
    alpha, centre = problem.alpha.to(x.dtype), centre_of(problem).flatten(1)
    per_image = 6 * values + (4 * len(x) + 3) * max(queries, values)
    fixed = dense_bytes(weights) + (answers is not weights) * dense_bytes(answers)
    chunk = problem.images_at_a_time(per_image * x.element_size(), fixed)

    def pieces() -> Iterator[Piece]:
        for images in problem.chunks(chunk):
            flat = images.flatten(1)

            def products(b: int, u: Tensor, flat: Tensor = flat) -> Tensor:
                return inner(u.flatten() * (flat - centre[b]))

            def sums(b: int, coefficients: Tensor, flat: Tensor = flat) -> Tensor:
                return ((coefficients @ answers) * (flat - centre[b])).sum(0).reshape(shape)

            yield Piece(weighted_distances(x, flat, alpha, weights.T), products, sums)
            del images, flat, products, sums

    result = two_passes(problem, directions, queries, pieces, blend=blend)
    if result.blend is None:
        return result
    return TwoPasses(result.derivatives, result.blend + centre.reshape(result.blend.shape))


def _distances(
    problem: PosteriorProblem, by_input: Tensor, values_per_image: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """The images in chunks, [n, D], and their distances [B, n, Q]."""
    x, queries = problem.x.flatten(1), by_input.shape[1]
    # And for the whole batch distances, weights and two temporaries of that shape.
    per_image = (values_per_image + 4 * len(x) * queries) * x.element_size()
    chunk = problem.images_at_a_time(per_image, dense_bytes(by_input))
    alpha = problem.alpha.to(x.dtype)
    for images in problem.chunks(chunk):
        yield images.flatten(1), weighted_distances(x, images.flatten(1), alpha, by_input)
        del images


def dense_bytes(weights: Tensor) -> int:
    """Working memory of a dense matrix of weights, and of the mask that it may come from."""
    return weights.nbytes + weights.numel()


def weighted_distances(x: Tensor, values: Tensor, alpha: Tensor, by_input: Tensor) -> Tensor:
    """Weighted squared distances of [B, D] to [n, D] under weights [D, Q]: [B, n, Q].

    Squares of differences enter the product, not an expanded square: every term is of one sign
    and nothing cancels.
    """
    rows = [(xb - ab * values).square() @ by_input for xb, ab in zip(x, alpha, strict=True)]
    return torch.stack(rows) if rows else x.new_zeros(0, len(values), by_input.shape[1])
