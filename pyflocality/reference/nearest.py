r"""The training images nearest to a query, exactly.

Of :math:`|x - \alpha v|^2` what differs from image to image is :math:`\alpha` times

.. math:: e(v) = \alpha |v|^2 - 2 \langle x, v \rangle .

Products of matrices tell it but for their rounding: with u the unit roundoff and D values each is
off by at most :math:`2 (D + 16) \, u \, (\alpha |v|^2 + 2 |x| |v|)`. Of the images that may be
among the nearest by that bound, and of these alone, e is computed without rounding: numbers are
written as sums of integers of few bits times powers of two, whose products float64 adds up exactly
in any order. So images are told apart, and ties are ties, however little noise or signal there is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.precision import plain_products
from pyflocality.posterior.problem import PosteriorProblem
from pyflocality.storage.reader import training_values

# Bits of integers that float64 holds, and the smallest exponent of two that its numbers have.
_EXACT_BITS, _LOWEST = 53, -1074
# Values of images that are looked at in float64 at a time.
_VALUES = 2**16
# Candidates for which no better bound is looked for.
_FEW = 64


def scan(problem: PosteriorProblem, k: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances of the k nearest images, [B, k] each."""
    x, values = problem.x.flatten(1), problem.images[0].numel()
    # A chunk as values and half as much again, bounds for all queries; some images in float64.
    per_image = (2 * values + 4 * len(x)) * x.element_size()
    chunk = problem.images_at_a_time(per_image, 6 * 8 * max(_VALUES, values))
    nearest = nearest_of(x, problem.alpha, problem.reader.blocks(chunk), k)
    if problem.ranks is None:
        return nearest.indices, nearest.distances
    return problem.ranks.nearest(*nearest, len(problem.images))


class Nearest(NamedTuple):
    """The nearest images of B queries, nearest first and the earlier image first among equals.

    Attributes:
        indices: Their positions, int64 [B, k].
        distances: Their squared distances, [B, k].
        keys: Integers that are in the order of their exact distances, [B, k].
    """

    indices: Tensor
    distances: Tensor
    keys: list[list[int]]


def nearest_of(x: Tensor, alpha: Tensor, blocks: Iterable[Tensor], k: int) -> Nearest:
    """The k nearest images of blocks [n, ...]; positions count through all of them.

    Queries x [B, D] are in the dtype of the distances, alpha is float64 [B].
    """
    searches = [_Search(row, float(a), k) for row, a in zip(x, alpha, strict=True)]
    start = 0
    for block in blocks:
        stored = block.detach().flatten(1)
        near = _candidates(x.detach(), stored, alpha, searches, k)
        for search, candidates in zip(searches, near, strict=True):
            search.take_in(stored, candidates, start)
        start += len(stored)
    best = [list(zip(*search.best, strict=True)) for search in searches]
    indices = torch.tensor([row for _, row in best], dtype=torch.int64, device=x.device)
    distances = torch.stack([s.distances for s in searches]) if searches else x.new_empty(0, k)
    return Nearest(indices.reshape(distances.shape), distances, [list(keys) for keys, _ in best])


class _Search:
    """The nearest images of a query so far.

    Attributes:
        best: Their keys and positions, nearest first.
        distances: Their squared distances.
    """

    def __init__(self, x: Tensor, alpha: float, k: int) -> None:
        self._x, self._alpha, self._k = x, alpha, k
        self._query = ExactQuery(x.detach(), alpha)
        self.best: list[tuple[int, int]] = []
        self.distances = x.new_empty(0)

    def bound(self, dtype: torch.dtype) -> float:
        """The e that an image must not exceed to count."""
        if len(self.best) < self._k:
            return math.inf
        return self._query.value(self.best[-1][0], dtype)

    def take_in(self, stored: Tensor, candidates: Tensor, start: int) -> None:
        """Take in some images of a block [n, D] whose first one has the position `start`."""
        if len(candidates) == 0:
            return
        before, known = len(self.best), list(self.best)
        for part in candidates.split(_at_a_time(stored)):
            keys = self._query.keys(stored.index_select(0, part))
            known += zip(keys, [start + place for place in part.tolist()], strict=True)
        order = sorted(range(len(known)), key=known.__getitem__)[: self._k]
        self.best = [known[number] for number in order]
        new = [number for number in order if number >= before]
        distances = [self.distances]
        chosen = candidates[torch.tensor(new, dtype=torch.int64, device=stored.device) - before]
        for rows in chosen.split(_at_a_time(stored)):
            values = training_values(stored.index_select(0, rows), torch.float64)
            gaps = self._x.double() - self._alpha * values
            distances.append(gaps.square().sum(1).to(self._x.dtype))
        # The new ones lie in their order behind those that were known.
        place = {number: before + i for i, number in enumerate(new)}
        places = [place.get(number, number) for number in order]
        self.distances = torch.cat(distances)[torch.tensor(places, device=stored.device)]


class ExactQuery:
    """Computes e of images without rounding, up to a positive factor.

    Args:
        x: The query, [D].
        alpha: Its signal coefficient.
    """

    def __init__(self, x: Tensor, alpha: float) -> None:
        self._x, self._alpha = x.double(), alpha.as_integer_ratio()
        # Bits that the number of terms takes in a sum.
        self._carry = len(x).bit_length()
        self._terms: dict[int, tuple[Tensor, list[int]]] = {}

    def keys(self, stored: Tensor) -> list[int]:
        """One integer for each image as stored, [n, D]: the smaller, the nearer."""
        if stored.dtype == torch.uint8:
            # v = w / 255, w an integer of 8 bits and a sign.
            terms, powers = [stored.double().mul_(2.0).sub_(255.0)], [0]
            bits = _EXACT_BITS - self._carry - 8
        else:
            bits = (_EXACT_BITS - self._carry) // 2
            terms, powers = _split(stored.double(), bits)
        x, shifts = self._of_query(bits)
        squares, products = [0] * len(stored), [0] * len(stored)
        for part, power in zip(terms, powers, strict=True):
            for column, shift in zip((part @ x).T.tolist(), shifts, strict=True):
                _add(products, column, power + shift)
            for other, shift in zip(terms, powers, strict=True):
                _add(squares, (part * other).sum(1).tolist(), power + shift)
        (numerator, denominator), unit = self._alpha, _unit(stored.dtype)
        factor = 2 * unit * denominator
        return [
            numerator * square - factor * product
            for square, product in zip(squares, products, strict=True)
        ]

    def value(self, key: int, dtype: torch.dtype) -> float:
        """The e that the key of an image of a dtype stands for."""
        return key / (_unit(dtype) ** 2 * self._alpha[1] << -2 * _LOWEST)

    def _of_query(self, bits: int) -> tuple[Tensor, list[int]]:
        if bits not in self._terms:
            terms, powers = _split(self._x, bits)
            self._terms[bits] = torch.stack(terms, 1), powers
        return self._terms[bits]


def _unit(dtype: torch.dtype) -> int:
    """What stored images are multiplied by before they are integers or sums of them."""
    return 255 if dtype == torch.uint8 else 1


def _at_a_time(stored: Tensor) -> int:
    return max(1, _VALUES // stored.shape[1])


def _add(sums: list[int], terms: list[float], power: int) -> None:
    """Add integers times a power of two to sums that count in units of 2^(2 _LOWEST)."""
    for number, term in enumerate(terms):
        sums[number] += int(term) << (power - 2 * _LOWEST)


def _split(numbers: Tensor, bits: int) -> tuple[list[Tensor], list[int]]:
    """Integers of some bits, float64, and exponents of two: numbers = sum of their products."""
    terms: list[Tensor] = []
    rest, powers = numbers, []
    power = math.frexp(float(numbers.abs().max()))[1]
    while not terms or (power > _LOWEST and bool(rest.any())):
        power = max(power - bits, _LOWEST)
        # In two steps: the inverse of the power may lie outside the range of float64.
        part = (rest * 2.0 ** -(power // 2) * 2.0 ** (power // 2 - power)).trunc_()
        rest = rest - part * 2.0**power
        terms.append(part)
        powers.append(power)
    return terms, powers


def _candidates(
    x: Tensor, stored: Tensor, alpha: Tensor, searches: list[_Search], k: int
) -> list[Tensor]:
    """For every query the images that may be among the k nearest, ascending: int64 [m] each.

    Args:
        x: Queries [B, D].
        stored: Images of a block, [n, D].
        alpha: Signal coefficients, float64 [B].
        searches: What was found in the blocks before.
        k: Number of neighbours.
    """
    if len(x) == 0:
        return []
    compute = x.dtype if plain_products() else torch.float64
    limits = [search.bound(stored.dtype) for search in searches]
    rough, slack = _rough(x.to(compute), training_values(stored, compute), alpha)
    candidates = []
    for b, limit in enumerate(limits):
        rows = _near(rough[b], slack[b], limit, k)
        if len(rows) > k + _FEW and compute != torch.float64:
            bounds = [
                _rough(
                    x[b : b + 1].double(),
                    training_values(stored.index_select(0, part), torch.float64),
                    alpha[b : b + 1],
                )
                for part in rows.split(_at_a_time(stored))
            ]
            better, slacks = zip(*bounds, strict=True)
            rows = rows[_near(torch.cat(better, 1)[0], torch.cat(slacks).max(), limit, k)]
        candidates.append(rows)
    return candidates


def _rough(x: Tensor, values: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """The e of values [n, D] for queries [B, D], [B, n], and how far off it may be, float64 [B]."""
    squares, count = torch.linalg.vector_norm(values, dim=1).square(), x.shape[1]
    rough = torch.addmm(alpha.to(x.dtype)[:, None] * squares, x, values.T, alpha=-2)
    largest = squares.max().double().sqrt()
    reach = alpha * largest.square() + 2.0 * x.double().norm(dim=1) * largest
    numbers = torch.finfo(x.dtype)
    return rough, (count + 16) * (numbers.eps * reach + numbers.tiny)


def _near(rough: Tensor, slack: Tensor, limit: float, k: int) -> Tensor:
    """Which images may be among the k nearest, given their e but for `slack`: int64 [m]."""
    # Once for the roughness of this e and once for that of the one that decides.
    reach = slack + limit
    if len(rough) > k:
        reach = torch.minimum(reach, rough.kthvalue(k).values.double() + 2.0 * slack)
    return (rough.double() <= reach).nonzero()[:, 0]
