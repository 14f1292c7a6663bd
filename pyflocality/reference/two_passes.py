r"""Derivatives that take two scans of the training images, in plain torch.

Vector-Jacobian products, and derivatives of posteriors that answer many values each, are sums over
the queries of

.. math::
    \sum_i p_{q,i} \, (c_{q,i} - \mathbb E_q[c]) \, v_i[d]

spread over the inputs or outputs d of query q, with some inner product :math:`c_{q,i}` of a
direction and image i. The first scan finds every query's posterior and :math:`\mathbb E_q[c]`, the
second adds up the coefficients of every image over the queries and multiplies them with its
values: neither holds an image per query.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality.posterior import state as posterior
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.posterior.tangents import jacobian_factor


class Piece(NamedTuple):
    """A chunk of n images as the queries see it.

    Attributes:
        distance: Weighted squared distances, [B, n, Q]; infinite where a query is not compared
            with an image.
        inner: Maps a batch element b and a direction of it to its inner products c with the
            images or their values, counted from any origin of the query, [n, Q].
        apply: Maps a batch element b and coefficients [n, Q] to the sum over images and queries
            of coefficient times values, where the query's values belong: one row of the result.
            The values may be counted from any origin of the query and the place.
    """

    distance: Tensor
    inner: Callable[[int, Tensor], Tensor]
    apply: Callable[[int, Tensor], Tensor]


class TwoPasses(NamedTuple):
    """Results of two scans.

    Attributes:
        derivatives: Derivatives along the K directions, the factor alpha / (sigma^2 temperature)
            included, [K, B, *shape].
        blend: The posterior weights themselves applied to the values, [B, *shape]; None if it
            was not asked for.
    """

    derivatives: Tensor
    blend: Tensor | None


def two_passes(
    problem: PosteriorProblem,
    directions: Tensor,
    queries: int,
    pieces: Callable[[], Iterable[Piece]],
    shape: tuple[int, ...],
    *,
    blend: bool = False,
) -> TwoPasses:
    """Derivatives along directions [K, B, ..] by two scans, which `pieces` starts.

    `shape` is that of what a piece applies; `blend` tells whether the posterior weights themselves
    are applied to the values, too.
    """
    scale = posterior.finite_factor(problem.scale, problem.x.dtype)
    batch, count = len(problem.x), len(directions)
    state = posterior.init(batch, queries, count, problem.x.double())
    empty = torch.zeros_like(state.weighted.mT)
    for piece in pieces():

        def weigh(weights: Tensor, piece: Piece = piece) -> Tensor:
            sums = [
                (weights[b] * piece.inner(b, direction[b])).sum(0, dtype=torch.float64)
                for b in range(batch)
                for direction in directions
            ]
            return _stacked(sums, empty).mT

        state = posterior.update(state, piece.distance, scale, weigh)
        del piece, weigh
    state = problem.merged(state, scale)
    means = posterior.finalize(state)
    result = directions.new_zeros(count, batch, *shape)
    blended = problem.x.new_zeros(batch, *shape) if blend else None
    for piece in pieces():
        share = posterior.posterior_weights(piece.distance, state, scale)
        sums = [
            piece.apply(b, share[b] * _gaps(piece.inner(b, directions[k, b]), means[b, :, k]))
            for k in range(count)
            for b in range(batch)
        ]
        result = result + _stacked(sums, result)
        if blended is not None:
            sums = [piece.apply(b, share[b]) for b in range(batch)]
            blended = blended + _stacked(sums, blended)
        del piece, share
    result = problem.summed(result)
    blended = None if blended is None else problem.summed(blended)
    factor = jacobian_factor(problem).reshape(-1, *(1 for _ in shape))
    return TwoPasses((result.double() * factor).to(directions.dtype), blended)


def _gaps(inner: Tensor, means: Tensor) -> Tensor:
    """Differences that are right where products agree in most digits: means are float64."""
    return (inner - means).to(inner.dtype)


def _stacked(terms: list[Tensor], like: Tensor) -> Tensor:
    """Terms in the shape of a tensor that may be empty."""
    return torch.stack(terms).reshape(like.shape) if terms else like
