"""Posterior mean of each value over its own weighted set of inputs, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor

from pyflocality._support.budget import ALWAYS_ALLOWED, memory_budget_bytes
from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.state import PosteriorState
from pyflocality.posterior.tangents import answer_centre_of, centre_of
from pyflocality.posterior.tiles import joined, output_bands
from pyflocality.reference.two_passes import Piece, TwoPasses, two_passes
from pyflocality.weights import QueryWeights

# Outputs of a tile: places among all, int64 [n], or all of them.
Outputs = slice | Tensor


def scan(problem: PosteriorProblem, weights: QueryWeights) -> PosteriorState:
    """Scan of all images with a query per output value, Q = D, that answers A values there."""
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
    """Vector-Jacobian products [K, B, C, H, W] along cotangents of what is answered."""
    parts = []
    for outputs, by_query in _tiles(problem, weights):

        def inner(products: Tensor, outputs: Outputs = outputs) -> Tensor:
            return products[:, outputs]

        found = weighted_derivatives("vjp", problem, cotangents, by_query, inner, by_query)
        parts.append(found.derivatives)
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _scan(problem: PosteriorProblem, outputs: Outputs, by_query: Tensor) -> PosteriorState:
    """The scan of some outputs, whose weights are [n, D]."""
    by_input = by_query.T
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    state = posterior.init(len(problem.x), by_input.shape[1], problem.answered, problem.x)
    # One chunk holds its values and the squared differences of one query.
    for images, values, distance in _distances(problem, by_input, 3 * len(by_input)):

        def weigh(posterior_weights: Tensor, values: Tensor = values) -> Tensor:
            sums = [
                (posterior_weights * values[:, a, outputs]).sum(1) for a in range(values.shape[1])
            ]
            return torch.stack(sums, dim=-1)

        state = posterior.update(state, distance, scale, weigh)
        del images, values, distance, weigh
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
    answered = problem.answered
    state = posterior.init_tangents(len(centre), queries, answered, count, problem.x)
    # And the centred values, a product for every tangent, and temporaries.
    held = (6 + 3 * answered + count) * inputs
    for flat, values, distance in _distances(problem, by_input, held):

        def terms(
            b: int, flat: Tensor = flat, values: Tensor = values
        ) -> tuple[list[Tensor], Tensor]:
            centred = flat - centre[b]
            return [(u * centred) @ by_input for u in directions[b]], values[:, :, outputs]

        state = posterior.update_tangents(state, distance, scale, answered, terms)
        del flat, values, distance, terms
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
    kind: Literal["jvp", "vjp"],
    problem: PosteriorProblem,
    directions: Tensor,
    weights: Tensor,
    inner: Callable[[Tensor], Tensor],
    answers: Tensor,
) -> TwoPasses:
    """Derivatives of posteriors with weights along directions, by two scans.

    Args:
        kind: Whether directions are in the space of the noisy images, and what is answered is
            added up for them ("jvp", with the blend of it, which is right where the columns of
            `answers` sum to 1), or the other way round ("vjp").
        problem: The problem.
        directions: Directions, K for each noisy image.
        weights: Weights of the inputs in the distances, [Q, D].
        inner: Maps products of direction and values [n, D] to their sums per query, [n, Q].
        answers: Where and how much every query's coefficients count, [Q, D].
    """
    x, along_x, (queries, values) = problem.x.flatten(1), kind == "jvp", weights.shape
    alpha, shape = problem.alpha.to(x.dtype), problem.x.shape[1:]
    # [B, 1, D] and [B, A, D]: of the images, and of what is answered.
    centres = centre_of(problem).flatten(1)[:, None], answer_centre_of(problem).flatten(2)
    given_centre, applied_centre = centres if along_x else reversed(centres)
    per_image = (4 + 2 * problem.answered) * values + (4 * len(x) + 3) * max(queries, values)
    fixed = dense_bytes(weights) + (answers is not weights) * dense_bytes(answers)
    chunk = problem.images_at_a_time(per_image * x.element_size(), fixed)
    answered_shape = problem.answer_shape if along_x else tuple(shape)

    def pieces() -> Iterator[Piece]:
        for images, answered in problem.pairs(chunk):
            both = images.flatten(1)[:, None], answered.flatten(2)
            given, applied = both if along_x else reversed(both)

            def products(b: int, u: Tensor, given: Tensor = given) -> Tensor:
                return inner((u.reshape(given_centre.shape[1:]) * (given - given_centre[b])).sum(1))

            def sums(b: int, coefficients: Tensor, applied: Tensor = applied) -> Tensor:
                shares = (coefficients @ answers)[:, None]
                return (shares * (applied - applied_centre[b])).sum(0).reshape(answered_shape)

            distance = weighted_distances(x, images.flatten(1), alpha, weights.T)
            yield Piece(distance, products, sums)
            del images, answered, both, given, applied, products, sums, distance

    result = two_passes(problem, directions, queries, pieces, answered_shape, blend=along_x)
    if result.blend is None:
        return result
    return TwoPasses(result.derivatives, result.blend + applied_centre.reshape(result.blend.shape))


def _distances(
    problem: PosteriorProblem, by_input: Tensor, values_per_image: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The images in chunks, [n, D], their answers [n, A, D], and distances [B, n, Q]."""
    x, queries = problem.x.flatten(1), by_input.shape[1]
    # And for the whole batch distances, weights and two temporaries of that shape.
    per_image = (values_per_image + 4 * len(x) * queries) * x.element_size()
    chunk = problem.images_at_a_time(per_image, dense_bytes(by_input))
    alpha = problem.alpha.to(x.dtype)
    for images, values in problem.pairs(chunk):
        flat = images.flatten(1)
        yield flat, values.flatten(2), weighted_distances(x, flat, alpha, by_input)
        del images, values, flat


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
