r"""The order of images by their distance to a query, exactly, however near they are to each other.

Of :math:`|x - \alpha v|^2` what differs from image to image is :math:`\alpha` times

.. math:: e(v) = \alpha |v|^2 - 2 \langle x, v \rangle .

A search tells it in any unit, rounded, and how far off it may be. Where that leaves the order open
between images, and for these alone, e is computed without rounding: numbers are written as sums of
integers of few bits times powers of two, whose products float64 adds up exactly in any order. So
images are told apart, and ties are ties, however little noise or signal there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from pyflocality._support.transforms import outside_transforms, without_derivatives
from pyflocality.posterior.problem import PosteriorProblem

# Integers in the order of exact distances, one for each of some positions.
Keys = Callable[[np.ndarray], list[int]]

# Bits of integers that float64 holds, and the smallest exponent of two that its numbers have.
_EXACT_BITS, _LOWEST = 53, -1074
# Values of images that are looked at in float64 at a time.
VALUES_AT_A_TIME = 2**16


class Shortlist:
    """The images that may be among the k nearest to a query, of those that were taken in.

    Attributes:
        limit: Images that exceed it by more than their slack are not among the nearest.
    """

    def __init__(self, k: int) -> None:
        self._k, self.limit = k, math.inf
        self._positions = np.empty(0, dtype=np.int64)
        self._values, self._slacks = np.empty(0), np.empty(0)

    def take_in(self, positions: np.ndarray, values: np.ndarray, slacks: np.ndarray) -> None:
        """Take in images behind those that were: positions, their e, and what it may be off by."""
        positions = np.concatenate([self._positions, positions])
        values = np.concatenate([self._values, values])
        slacks = np.concatenate([self._slacks, slacks])
        if len(positions) > self._k:
            largest = np.partition(values + slacks, self._k - 1)[self._k - 1]
            self.limit = min(self.limit, float(largest))
            near = values - slacks <= self.limit
            positions, values, slacks = positions[near], values[near], slacks[near]
        self._positions, self._values, self._slacks = positions, values, slacks

    def nearest(self, keys: Keys, ordered: bool) -> np.ndarray:
        """The k nearest images.

        Nearest first and the earlier one first among equals; if not `ordered`, by position.
        """
        order = self._values.argsort(kind="stable")
        result = self._positions[order]
        for group in self._open(order):
            # Within others it does not matter which is nearer.
            if ordered or group.stop > self._k:
                members = np.sort(result[group])
                exact = keys(members)
                # Among equal keys they stay as they are.
                result[group] = members[sorted(range(len(members)), key=exact.__getitem__)]
        nearest = result[: self._k]
        return nearest if ordered else np.sort(nearest)

    def _open(self, order: np.ndarray) -> Iterator[slice]:
        """Images in a row whose order is left open, as far as it is about the k nearest."""
        values, slacks = self._values[order], self._slacks[order]
        most = np.maximum.accumulate(values + slacks)
        least = np.minimum.accumulate((values - slacks)[::-1])[::-1]
        apart = most[:-1] < least[1:]
        if apart[: self._k].all():
            return
        ends = [0, *(np.flatnonzero(apart) + 1).tolist(), len(order)]
        for start, stop in zip(ends[:-1], ends[1:], strict=True):
            if start < self._k and stop - start > 1:
                yield slice(start, stop)


def blocks_among(problem: PosteriorProblem, size: int, among: Tensor | None) -> Iterator[Tensor]:
    """The images that are searched, all or those at some positions, at most `size` at a time."""
    reader = problem.reader
    return reader.blocks(size) if among is None else reader.blocks_at(among, size)


def positions_of(rows: np.ndarray, start: int, among: Tensor | None) -> np.ndarray:
    """Positions of rows of a block, before which `start` of the searched images come."""
    return rows + start if among is None else among.cpu().numpy()[rows + start]


def ranked(
    problem: PosteriorProblem, shortlists: Sequence[Shortlist], k: int, ordered: bool
) -> Tensor:
    """Positions of the k nearest images of each noisy image, int64 [B, k]; see `Shortlist`."""
    nearest = [one.nearest(_keys(problem, b), ordered) for b, one in enumerate(shortlists)]
    found = np.stack(nearest) if nearest else np.empty((0, k), dtype=np.int64)
    return torch.from_numpy(found).to(problem.x.device)


def of_all_ranks(
    problem: PosteriorProblem, indices: Tensor, distances: Tensor
) -> tuple[Tensor, Tensor]:
    """The nearest images of the whole set and their distances, from those of this rank's part."""
    if problem.ranks is None:
        return indices, distances
    keys = [_keys(problem, b)(row) for b, row in enumerate(indices.cpu().numpy())]
    return problem.ranks.nearest(indices, distances, keys, len(problem.images))


def _keys(problem: PosteriorProblem, b: int) -> Keys:
    """The keys of images, as stored at some positions, for a noisy image."""

    def keys(positions: np.ndarray) -> list[int]:
        with outside_transforms():
            x, alpha = without_derivatives(problem.x)[b], without_derivatives(problem.alpha)[b]
            query = ExactQuery(x.flatten().double().cpu().numpy(), float(alpha))
        known: list[int] = []
        for some in torch.from_numpy(positions).to(x.device).split(_at_a_time(problem)):
            stored = problem.reader.at(some)
            with outside_transforms():
                known += query.keys(without_derivatives(stored).flatten(1))
        return known

    return keys


def _at_a_time(problem: PosteriorProblem) -> int:
    """Images that are looked at in float64 at a time."""
    return max(1, VALUES_AT_A_TIME // problem.images[0].numel())


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
            unit, terms, powers = 255, [values * 2.0 - 255.0], [0]
            bits = _EXACT_BITS - self._carry - 8
        else:
            unit, bits = 1, (_EXACT_BITS - self._carry) // 2
            terms, powers = _split(values, bits)
        x, shifts = self._of_query(bits)
        squares, products = [0] * len(stored), [0] * len(stored)
        for part, power in zip(terms, powers, strict=True):
            for column, shift in zip((part @ x).T.tolist(), shifts, strict=True):
                _add(products, column, power + shift)
            for other, shift in zip(terms, powers, strict=True):
                _add(squares, (part * other).sum(1).tolist(), power + shift)
        numerator, denominator = self._alpha
        factor = 2 * unit * denominator
        return [
            numerator * square - factor * product
            for square, product in zip(squares, products, strict=True)
        ]

    def _of_query(self, bits: int) -> tuple[np.ndarray, list[int]]:
        if bits not in self._terms:
            terms, powers = _split(self._x, bits)
            self._terms[bits] = np.stack(terms, 1), powers
        return self._terms[bits]


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
