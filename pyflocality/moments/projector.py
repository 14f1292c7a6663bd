r"""The Wiener filter's projector of a noise level, without a matrix of all pairs of values.

With the covariance :math:`S = U \operatorname{diag}(\lambda) U^\top`, a ratio
:math:`r = \sigma / \alpha` of noise and signal and gains
:math:`g_k = \lambda_k / (\lambda_k + r^2)` it is

.. math::
    P = S (S + r^2 I)^{-1} = U \operatorname{diag}(g) U^\top
      = I - U \operatorname{diag}(1 - g) U^\top = I - r^2 (S + r^2 I)^{-1} ,

the third form where U is square. Every form is a product F diag(c) F^T, perhaps subtracted from the
identity, of which a block takes some rows of F: those of the components, of those whose gain (or
its complement) matters, or of the inverse Cholesky factor of S + r^2 I.

All of it is float64, but for what is asked for in single precision. Of the matrix products nothing
is asked but that an entry's rounding error is a small multiple of eps times the sum of its terms'
magnitudes; the order of its terms is free.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._support.progress import timed_call
from pyflocality._support.rates import product_seconds

# A share of the smallest number that an entry is held against: what errors may come to, where
# entries within 1e-6 of such a number may be taken either way.
_DROPPED, _ROUNDED = 1e-9, 1e-7
# Rows of components looked at together.
_ROWS = 1024
# Terms that single precision adds at a time.
PIECE = 512
# Values whose triangle is inverted as a whole.
_TRIANGLE = 128
# Values whose factor takes a second.
_LONG = 2048
_EPS = torch.finfo(torch.float64).eps

Places = slice | Tensor


@dataclass(frozen=True, eq=False)
class Projector:
    """A projector P = F diag(c) F^T, or I less that.

    Attributes:
        factor: F, [D, K].
        coefficients: c, none negative, [K].
        diagonal: The diagonal of P, [D].
        complement: Whether the product is subtracted from the identity.
        triangular: Whether row n of F begins with n zeros.
        tails: What the last 1, 2, .. terms change an entry by at most, as a share of its row's
            divisor, [K]; None is unknown.
    """

    factor: Tensor
    coefficients: Tensor
    diagonal: Tensor
    complement: bool = False
    triangular: bool = False
    tails: Tensor | None = None

    def block(self, rows: Places, columns: slice) -> Tensor:
        """Entries of some rows (a slice, or int64 [n]) and columns, [n, m]."""
        first = self._first_term(rows, columns)
        left = self.factor[rows, first:] * self.coefficients[first:]
        result = left @ self.factor[columns, first:].T
        if self.complement:
            result.neg_()
            places = torch.arange(len(self.factor), device=result.device)
            # The identity, as far as it lies in the block.
            result += places[rows][:, None] == places[columns]
        return result

    def terms_needed(self, dropped: float) -> int:
        """How many terms, the first ones, give all entries to a share of their row's divisor."""
        count = self.factor.shape[1]
        return count if self.tails is None else count - int((self.tails <= dropped).sum())

    def terms_after(self, count: int) -> Tensor:
        r""":math:`\sum_{k > K} c_k F_{nk}^2` of the terms behind the first K, [D]."""
        return _diagonal(self.factor[:, count:], self.coefficients[count:])

    def single_factor(self, count: int) -> Tensor:
        """F sqrt(c) in single precision, of the first K terms, [D, K]."""
        roots = self.coefficients[:count].sqrt()
        result = self.factor.new_empty(len(self.factor), count, dtype=torch.float32)
        for rows, out in zip(self.factor.split(_ROWS), result.split(_ROWS), strict=True):
            out.copy_(rows[:, :count] * roots)
        return result

    def single_product(self, factor: Tensor, rows: Places, columns: slice) -> Tensor:
        """Entries of the product alone, from `single_factor`, `PIECE` terms at a time, [n, m]."""
        first = self._first_term(rows, columns)
        left, right = factor[rows, first:], factor[columns, first:]
        result = left[:, :PIECE] @ right[:, :PIECE].T
        for start in range(PIECE, left.shape[1], PIECE):
            some = slice(start, start + PIECE)
            result.addmm_(left[:, some], right[:, some].T)
        return result

    def _first_term(self, rows: Places, columns: slice) -> int:
        """The first term that is not zero for all entries of a block."""
        if not self.triangular:
            return 0
        least = rows.start if isinstance(rows, slice) else int(rows.min())
        return max(least, columns.start)

    def weights_of_terms(self) -> Tensor:
        r""":math:`\sum_k c_k F_{nk}^2`, what the terms of an entry on the diagonal come to, [D]."""
        inner = 1.0 - self.diagonal if self.complement else self.diagonal
        return inner.clamp(min=0.0)

    def divisors(self) -> Tensor:
        """What the PCA-locality rule divides rows by: the diagonal, or 1 where it is tiny, [D]."""
        magnitude = self.diagonal.abs()
        return torch.where(magnitude < 1e-6, 1.0, magnitude)

    def largest_on_diagonal(self) -> float:
        """The largest magnitude on the diagonal after that: 1, but where all of it is tiny."""
        return float((self.diagonal.abs() / self.divisors()).max())


def projector_of_components(
    values: Tensor, vectors: Tensor, ratio: float, threshold: float
) -> Projector:
    r"""The projector of the components of a covariance, of as few of them as `threshold` needs.

    With :math:`T_n = \sum_k c_k u_{nk}^2` over components that are left out, no entry changes by
    more than :math:`\sqrt{T_n T_m}`: those are left out that change none by more than 1e-9 of what
    it is held against.

    Args:
        values: Variances of the components, positive, descending, float64 [r].
        vectors: The components in columns, float64 [D, r]; other directions have no variance.
        ratio: sigma / alpha, not negative.
        threshold: Share of a row's divisor that its entries are held against; 0 leaves out nothing.
    """
    noise = ratio * ratio
    gains, losses = values / (values + noise), noise / (values + noise)
    whole = Projector(vectors, gains, _diagonal(vectors, gains))
    divisors, count = whole.divisors(), len(gains)
    if threshold == 0:
        return whole
    # Of what entries are held against: a share of the largest, which is no less than that.
    threshold *= min(1.0, whole.largest_on_diagonal())
    tails = _tails(vectors, gains, divisors, last=True)
    left_out = int((tails <= _DROPPED * threshold).sum())
    square = vectors.shape[0] == vectors.shape[1]
    if square and _rounding(count, 1.0, 1.0) <= _ROUNDED * threshold * float(divisors.min()):
        first = int((_tails(vectors, losses, divisors, last=False) <= _DROPPED * threshold).sum())
        if first > left_out:
            needed = vectors[:, first:], losses[first:]
            return Projector(*needed, whole.diagonal, complement=True)
    kept = slice(0, count - left_out)
    return Projector(vectors[:, kept], gains[kept], whole.diagonal, tails=tails[left_out:])


def projector_by_cholesky(
    covariance: Tensor, ratio: float, threshold: float, *, progress: bool = False
) -> Projector | None:
    r"""The projector of a covariance by the Cholesky factor of S + r^2 I.

    The factor's entries have rounding errors of a few :math:`\varepsilon \sqrt{a_{nn} a_{mm}}` of
    the matrix a that it is of, so those of P are below
    :math:`8 \varepsilon \max_n S_{nn} / r^2`, and on the diagonal, whose sums have terms up to 1,
    :math:`2 \varepsilon \sqrt D` larger.

    Args:
        covariance: S, float64 [D, D].
        ratio: sigma / alpha, not negative.
        threshold: Share of a row's divisor that its entries are held against, positive.
        progress: Whether to show the time it takes.

    Returns:
        None where those errors may exceed 1e-7 of what entries are held against: the noise is too
        little beside the rounding errors of the variances, or so much that no value keeps a
        millionth.
    """
    noise, count = ratio * ratio, len(covariance)
    if noise == 0:
        return None
    rise = float(covariance.diagonal().max()) / noise
    if _rounding(0, rise, 0.0) > _ROUNDED * threshold:
        return None
    # In the solver's order; then the rows of the factor are in one piece.
    lower = covariance.clone(memory_format=torch.contiguous_format).T
    lower.diagonal().add_(noise)
    if covariance.device.type != "cpu":
        is_factored = _factor_and_invert(lower)
    else:
        is_factored = timed_call(
            lambda: _factor_and_invert(lower),
            description=f"inverse factor of {count:,} x {count:,} numbers",
            # D^3 multiply-adds.
            seconds=product_seconds(2.0 * count**3) if progress else 0.0,
            enabled=progress and count >= _LONG,
        )
    if not is_factored:
        return None
    factor, coefficients = lower.T, covariance.new_full((count,), noise)
    diagonal = 1.0 - _diagonal(factor, coefficients)
    result = Projector(factor, coefficients, diagonal, complement=True, triangular=True)
    if result.largest_on_diagonal() < 0.5:
        return None
    least = float(result.divisors().min())
    exact = _rounding(0, rise, 0.0) <= _ROUNDED * threshold * least
    return result if exact and _rounding(count, rise, 1.0) <= _ROUNDED * least else None


def _rounding(terms: int, rise: float, largest: float) -> float:
    """Rounding error of an entry whose sum has terms up to `largest`; see above for the rest."""
    return _EPS * (2.0 * largest * terms**0.5 + 8.0 * rise)


def _diagonal(factor: Tensor, coefficients: Tensor) -> Tensor:
    return torch.cat([rows.square() @ coefficients for rows in factor.split(_ROWS)])


def _tails(vectors: Tensor, weights: Tensor, divisors: Tensor, *, last: bool) -> Tensor:
    """What 1, 2, .. components at an end change an entry by at most, as a share of its divisor.

    Args:
        vectors: Components in columns, [D, r].
        weights: What counts of each, [r].
        divisors: Of the rows, [D].
        last: Whether they are the last ones, or the first.

    Returns:
        Bounds, ascending, [r].
    """
    largest, relative = torch.zeros_like(weights), torch.zeros_like(weights)
    for rows, divisor in zip(vectors.split(_ROWS), divisors.split(_ROWS), strict=True):
        terms = rows.square() * weights
        sums = (terms.flip(1) if last else terms).cumsum(1)
        largest = largest.maximum(sums.amax(0))
        relative = relative.maximum((sums / divisor.square()[:, None]).amax(0))
    return (largest * relative).sqrt()


def _factor_and_invert(matrix: Tensor) -> bool:
    """Put the inverse of a matrix's Cholesky factor in its place; whether there is a factor."""
    failed = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(matrix, out=(matrix, failed))
    if not failed:
        _invert_triangle(matrix)
    return not failed


def _invert_triangle(lower: Tensor) -> None:
    """Invert a lower triangular matrix in its place, by products of its blocks."""
    count = len(lower)
    if count <= _TRIANGLE:
        one = torch.eye(count, dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, one, upper=False))
        return
    half = count // 2
    above, left, below = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    _invert_triangle(above)
    _invert_triangle(below)
    left.copy_((below @ left).neg_() @ above)
