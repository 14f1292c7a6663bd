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

import itertools
import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.precision import plain_products
from pyflocality._support.transforms import outside_transforms, without_derivatives
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
    # Plain tensors, which Python may look at: distances alone are differentiated.
    queries, levels = without_derivatives(x), without_derivatives(alpha)
    with outside_transforms():
        exact = queries.double().cpu().numpy()
        numbers = levels.tolist()
    searches = list(map(_Search, x, exact, numbers, itertools.repeat(k)))
    start = 0
    for block in blocks:
        with outside_transforms():
            stored = without_derivatives(block).flatten(1)
            near = _candidates(queries, stored, levels, searches, k)
        for search, candidates in zip(searches, near, strict=True):
            search.take_in(stored, candidates, start)
        start += len(stored)
    keys, positions, gaps = [], [], []
    for search in searches:
        ordered, rows = zip(*search.best, strict=True)
        keys.append(list(ordered))
        positions.append(rows)
        gaps.append(search.distances)
    indices = torch.tensor(positions, dtype=torch.int64, device=x.device)
    distances = torch.stack(gaps) if gaps else x.new_empty(0, k)
    return Nearest(indices.reshape(distances.shape), distances, keys)


class _Search:
    """The nearest images of a query so far.

    Attributes:
        best: Their keys and positions, nearest first.
        distances: Their squared distances.
    """

    def __init__(self, x: Tensor, exact: np.ndarray, alpha: float, k: int) -> None:
        self._x, self._alpha, self._k = x, alpha, k
        self._query = ExactQuery(exact, alpha)
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
        before, known, size = len(self.best), list(self.best), _at_a_time(stored)
        with outside_transforms():
            for part in candidates.split(size):
                keys = self._query.keys(stored.index_select(0, part))
                known += zip(keys, (part + start).cpu().numpy().tolist(), strict=True)
        order = sorted(range(len(known)), key=known.__getitem__)[: self._k]
        self.best = list(map(known.__getitem__, order))
        # The new ones lie in their order behind those that were known.
        new: list[int] = []
        places: list[int] = []
        for number in order:
            places.append(number if number < before else before + len(new))
            if number >= before:
                new.append(number - before)
        distances = [self.distances]
        chosen = candidates[torch.tensor(new, dtype=torch.int64, device=stored.device)]
        for rows in chosen.split(size):
            values = training_values(stored.index_select(0, rows), torch.float64)
            gaps = self._x.double() - self._alpha * values
            distances.append(gaps.square().sum(1).to(self._x.dtype))
        self.distances = torch.cat(distances)[torch.tensor(places, device=stored.device)]


class ExactQuery:
    """Computes e of images without rounding, up to a positive factor, on the CPU.

    Args:
        x: The query, float64 [D].
        alpha: Its signal coefficient.
    """

    def __init__(self, x: np.ndarray, alpha: float) -> None:
        self._x, self._alpha = x, alpha.as_integer_ratio()
        # Bits that the number of terms takes in a sum.
        self._carry = len(x).bit_length()
        self._terms: dict[int, tuple[np.ndarray, list[int]]] = {}

    def keys(self, stored: Tensor) -> list[int]:
        """One integer for each image as stored, [n, D]: the smaller, the nearer."""
        values = stored.double().cpu().numpy()
        if stored.dtype == torch.uint8:
            # v = w / 255, w an integer of 8 bits and a sign.
            terms, powers = [values * 2.0 - 255.0], [0]
            bits = _EXACT_BITS - self._carry - 8
        else:
            bits = (_EXACT_BITS - self._carry) // 2
            terms, powers = _split(values, bits)
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

    def _of_query(self, bits: int) -> tuple[np.ndarray, list[int]]:
        if bits not in self._terms:
            terms, powers = _split(self._x, bits)
            self._terms[bits] = np.stack(terms, 1), powers
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


def _split(numbers: np.ndarray, bits: int) -> tuple[list[np.ndarray], list[int]]:
    """Integers of some bits, float64, and exponents of two: numbers = sum of their products."""
    terms: list[np.ndarray] = []
    rest, powers = numbers, []
    power = math.frexp(float(abs(numbers).max()))[1]
    while not terms or (power > _LOWEST and rest.any()):
        power = max(power - bits, _LOWEST)
        # In two steps: the inverse of the power may lie outside the range of float64.
        part = np.trunc(rest * 2.0 ** -(power // 2) * 2.0 ** (power // 2 - power))
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
    rough, slack = _rough(x.to(compute), training_values(stored, compute), alpha)
    candidates = []
    for b, search in enumerate(searches):
        limit = search.bound(stored.dtype)
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
