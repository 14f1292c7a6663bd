r"""The training images nearest to a query, exactly.

Products of matrices tell :math:`e(v) = \alpha |v|^2 - 2 \langle x, v \rangle` (see
`shortlists`) but for their rounding: with u the unit roundoff and D values it is off by at most
:math:`2 (D + 16) \, u \, (\alpha |v|^2 + 2 |x| |v|)`, and, values of bytes being off by 2 u each,
by :math:`4 \sqrt D \, u \, (\alpha |v| + |x|)` more. Of the images that may be among the nearest
by that bound it is computed again in float64; what that leaves open is decided without rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.precision import plain_products
from pyflocality._support.transforms import outside_transforms, without_derivatives
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.reference.shortlists import (
    VALUES_AT_A_TIME,
    Shortlist,
    blocks_among,
    of_all_ranks,
    positions_of,
    ranked,
)
from pyflocality.storage.reader import training_values


def scan(
    problem: PosteriorProblem, k: int, distances: bool = True, among: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Indices and squared distances of the k nearest images, [B, k] each.

    Args:
        problem: The problem.
        k: Number of neighbours.
        distances: Whether distances are asked for, and with them the order; without them images
            come in the order of their positions, and of this rank's part alone.
        among: Positions of the images that are searched, ascending; None for all.
    """
    x, values = problem.x.flatten(1), problem.images[0].numel()
    # A chunk as values and half as much again, bounds for all queries; some images in float64.
    per_image = (2 * values + 4 * len(x)) * x.element_size()
    chunk = problem.images_at_a_time(per_image, 6 * 8 * max(VALUES_AT_A_TIME, values))
    # Plain tensors, which Python may look at: distances alone are differentiated.
    queries, levels = without_derivatives(x), without_derivatives(problem.alpha)
    shortlists = [Shortlist(k) for _ in range(len(x))]
    start = 0
    for block in blocks_among(problem, chunk, among):
        with outside_transforms():
            stored = without_derivatives(block).flatten(1)
            candidates = _candidates(queries, stored, levels, shortlists, k)
            for shortlist, (rows, *bounds) in zip(shortlists, candidates, strict=True):
                shortlist.take_in(positions_of(rows, start, among), *bounds)
        start += len(block)
    indices = ranked(problem, shortlists, k, distances)
    if not distances:
        return indices, None
    return of_all_ranks(problem, indices, _distances(problem, indices))


def _candidates(
    x: Tensor, stored: Tensor, alpha: Tensor, shortlists: list[Shortlist], k: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For every query the images that may be among the k nearest.

    Args:
        x: Queries [B, D].
        stored: Images of a block, [n, D].
        alpha: Signal coefficients, float64 [B].
        shortlists: What the blocks before left.
        k: Number of neighbours.

    Yields:
        Rows of the block, ascending, their e, and how far off it may be, [m] each.
    """
    if len(x) == 0:
        return
    compute = x.dtype if plain_products() else torch.float64
    rough, slack = _rough(x.to(compute), stored, alpha)
    for b, shortlist in enumerate(shortlists):
        rows, query = _near(rough[b], slack[b], shortlist.limit, k), slice(b, b + 1)
        bounds = [np.empty((2, 0))]
        for some in rows.split(max(1, VALUES_AT_A_TIME // stored.shape[1])):
            if len(some) > 0:
                exact, off = _rough(x[query].double(), stored.index_select(0, some), alpha[query])
                bounds.append(torch.cat([exact, off.expand_as(exact)]).cpu().numpy())
        values, slacks = np.concatenate(bounds, 1)
        yield rows.cpu().numpy(), values, slacks


def _distances(problem: PosteriorProblem, indices: Tensor) -> Tensor:
    """Squared distances of images at positions [B, k], in the dtype of the noisy images."""
    x, found = problem.x.flatten(1), []
    with outside_transforms():
        alpha = without_derivatives(problem.alpha)
    rows = torch.arange(len(x), device=x.device).repeat_interleave(indices.shape[1])
    size = max(1, VALUES_AT_A_TIME // x.shape[1])
    for places, some in zip(indices.flatten().split(size), rows.split(size), strict=True):
        stored = without_derivatives(problem.reader.at(places))
        values = training_values(stored, torch.float64).flatten(1)
        gaps = x.index_select(0, some).double() - alpha[some, None] * values
        found.append(gaps.square().sum(1).to(x.dtype))
    return torch.cat(found).reshape(indices.shape) if found else x.new_empty(indices.shape)


def _rough(x: Tensor, stored: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The e of images [n, D] for queries [B, D], [B, n], and how far off it may be, float64 [B]."""
    values, count = training_values(stored, x.dtype), x.shape[1]
    squares = torch.linalg.vector_norm(values, dim=1).square()
    rough = torch.addmm(alpha.to(x.dtype)[:, None] * squares, x, values.T, alpha=-2)
    largest, size = squares.max().double().sqrt(), x.double().norm(dim=1)
    numbers = torch.finfo(x.dtype)
    reach = (count + 16) * (alpha * largest.square() + 2.0 * size * largest)
    if stored.dtype == torch.uint8:
        reach = reach + 2.0 * math.sqrt(count) * (alpha * largest + size)
    return rough, numbers.eps * reach + (count + 16) * numbers.tiny


def _near(rough: Tensor, slack: Tensor, limit: float, k: int) -> Tensor:
    """Which images may be among the k nearest, given their e but for `slack`: int64 [m]."""
    reach = slack + limit
    if len(rough) > k:
        # Once for the roughness of this e and once for that of the one that decides.
        reach = torch.minimum(reach, rough.kthvalue(k).values.double() + 2.0 * slack)
    return (rough.double() <= reach).nonzero()[:, 0]
