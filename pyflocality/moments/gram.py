r"""Principal components of fewer images than values, through the products of the images.

With the centred images in the rows of A, [N, D], the covariance is
:math:`S = A^\top A / (N - 1)`, and

.. math::
    K = \frac{A A^\top}{N - 1} = Q \operatorname{diag}(\lambda) Q^\top
    \quad\Rightarrow\quad
    S = V \operatorname{diag}(\lambda) V^\top, \qquad
    V = \frac{A^\top Q}{\sqrt{N - 1}} \operatorname{diag}(\lambda)^{-1/2} .

Both products are taken over bands of values, of which all images are at hand at once. Those of
8-bit images are sums of integers and exact: K is the same to the bit for every band.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.progress import progress_bar
from pyflocality.moments.eigen import Eigen
from pyflocality.moments.sums import (
    BLOCK_BYTES,
    covariance_of_bytes,
    images_per_block,
    mean_of_bytes,
    shift_of_bytes,
)
from pyflocality.ops.covariance import accumulate_covariance
from pyflocality.reference.covariance import add_upper_product
from pyflocality.storage.reader import BYTES_PER_UNIT, Reader

# Bytes of a band as stored: a mapped set that is read from its file is read once for each.
BAND_BYTES = 128 * 2**20
# Components whose variances lie this far apart disturb each other's directions: by some
# eps sqrt(largest / smallest), where vectors are made of those of K.
_SPREAD = 1e6


class Gram(NamedTuple):
    """Products of the images of a set about their mean, which the mean and variances go with.

    Attributes:
        mean: Mean in [-1, 1], float64, [D].
        variance: Variance of each value (N - 1 in the denominator), float64, [D].
        matrix: K, float64, [N, N]; zero for one image.
    """

    mean: Tensor
    variance: Tensor
    matrix: Tensor


def gram_of(reader: Reader, *, progress: bool) -> Gram:
    """Mean, variances and products of all images, copies included."""
    sums: _Sums = (_ByteSums if reader.images.dtype == torch.uint8 else _FloatSums)(reader)
    for rows, band in progress_bar(
        _bands(reader), description="products of images", total=_bands_of(reader), enabled=progress
    ):
        sums.add(rows, band)
    return Gram(sums.mean, sums.variance, sums.matrix())


def components_of(reader: Reader, eigen: Eigen, *, progress: bool) -> Eigen:
    """Principal components from those of K: variances [r], descending, and vectors [D, r].

    The variances are those of the images along the vectors, and their rounding errors are relative
    to each; directions of less than D eps of the largest variance are left out.

    Args:
        reader: The images.
        eigen: Eigenvalues and eigenvectors of K.
        progress: Whether to show a progress bar.
    """
    values, images = reader.images[0].numel(), len(reader)
    floor = values * torch.finfo(torch.float64).eps * eigen.values[0]
    kept = int((eigen.values[: images - 1] > floor).sum())
    # The vectors of K in columns, each row in one piece.
    inner = eigen.vectors[:, :kept].contiguous()
    result = inner.new_empty(values, kept)
    norms = inner.new_zeros(kept)
    for rows, band in progress_bar(
        _bands(reader), description="components", total=_bands_of(reader), enabled=progress
    ):
        for some, centred in _centred(band):
            part = result[rows][some]
            torch.mm(centred, inner, out=part)
            norms += part.square().sum(0)
    result /= norms.sqrt()
    found = norms / max(1, images - 1)
    order = found.argsort(descending=True, stable=True)
    order = order[found[order] > floor]
    if not torch.equal(order, torch.arange(kept, device=order.device)):
        for part in _parts(result):
            part[:, : len(order)] = part[:, order]
        result, found = result[:, : len(order)].contiguous(), found[order]
    if len(found) > 0 and found[0] > _SPREAD * found[-1]:
        orthonormalize(result)
    return Eigen(found, result)


def orthonormalize(vectors: Tensor) -> None:
    """Make columns that nearly are orthonormal so, in place, the first ones moved least: [D, r]."""
    upper = torch.linalg.cholesky(vectors.T @ vectors).T
    for part in vectors.split(max(1, BLOCK_BYTES // (8 * max(1, vectors.shape[1])))):
        part.copy_(torch.linalg.solve_triangular(upper, part, upper=True, left=False))


class _Sums:
    """What is added up over bands of values."""

    def __init__(self, reader: Reader) -> None:
        device, values = reader.images.device, reader.images[0].numel()
        self.count = len(reader)
        self.mean = torch.empty(values, dtype=torch.float64, device=device)
        self.variance = torch.zeros_like(self.mean)

    def add(self, rows: slice, band: Tensor) -> None:
        """Count some values of all images, as stored, [w, N]."""
        raise NotImplementedError

    def matrix(self) -> Tensor:
        """K, float64, [N, N]."""
        raise NotImplementedError


class _ByteSums(_Sums):
    """Of bytes: integers about the bytes m nearest to the mean, which count as one more image."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        size = self.count + 1
        self._gram = torch.zeros(size, size, dtype=torch.int64, device=reader.images.device)
        self._total = self._gram.new_zeros(size)

    def add(self, rows: slice, band: Tensor) -> None:
        """Count some values of all images, as stored, [w, N]."""
        whole = band.new_empty(len(band), self.count + 1)
        whole[:, :-1] = band
        totals, squares = [], []
        for part in _parts(band):
            numbers = part.double().sub_(128.0)
            totals.append(numbers.sum(1).long())
            shift, _ = shift_of_bytes(totals[-1], self.count)
            squares.append(numbers.sub_(shift[:, None]).square_().sum(1).long())
        total = torch.cat(totals)
        shift, rest = shift_of_bytes(total, self.count)
        whole[:, -1] = shift + 128
        accumulate_covariance(whole, self._gram, self._total)
        self.mean[rows] = mean_of_bytes(total, self.count)
        if self.count > 1:
            self.variance[rows] = covariance_of_bytes(torch.cat(squares), rest * rest, self.count)

    def matrix(self) -> Tensor:
        r"""K, float64, [N, N].

        With :math:`c' = c - m` the products :math:`G' = c' c'^\top` are integers, and so are their
        sums over a row, r, and over all, t. Those about the mean are
        :math:`G'_{ij} - (N (r_i + r_j) - t) / N^2`, where little is left to cancel.
        """
        count, gram = self.count, self._gram
        result = torch.zeros(count, count, dtype=torch.float64, device=gram.device)
        if count == 1:
            return result
        shifted, square = gram[:-1, -1], gram[-1, -1]
        centred = gram[:-1, :-1]
        height = max(1, BLOCK_BYTES // (8 * count))
        for first in range(0, count, height):
            rows = slice(first, first + height)
            centred[rows, first:] += square - shifted[rows, None] - shifted[None, first:]
            corner = centred[rows, rows]
            corner.copy_(corner.triu() + corner.triu(1).T)
            centred[first + height :, rows] = centred[rows, first + height :].T
        sums = centred.sum(1)
        whole = sums.sum()
        divisors = sums.new_tensor(
            [count * count, (count - 1) * BYTES_PER_UNIT**2], dtype=torch.float64
        )
        for first in range(0, count, height):
            rows = slice(first, first + height)
            shifts = count * (sums[rows, None] + sums) - whole
            products = centred[rows].double().sub_(shifts.double().div_(divisors[0]))
            result[rows] = products.div_(divisors[1])
        return result


class _FloatSums(_Sums):
    """Of floats: products in float64 about the mean."""

    def __init__(self, reader: Reader) -> None:
        super().__init__(reader)
        self._gram = self.mean.new_zeros(self.count, self.count)

    def add(self, rows: slice, band: Tensor) -> None:
        """Count some values of all images, as stored, [w, N]."""
        for some, centred in _centred(band):
            # What is the same in all images is so to the bit.
            first = band[some, :1].double() - centred[:, :1]
            self.mean[rows][some] = first[:, 0]
            if self.count > 1:
                self.variance[rows][some] = centred.square().sum(1) / (self.count - 1)
                add_upper_product(self._gram, centred)

    def matrix(self) -> Tensor:
        """K, float64, [N, N]."""
        whole = self._gram.triu_()
        whole += whole.triu(1).T
        return whole.div_(max(1, self.count - 1))


def _band_height(reader: Reader) -> int:
    """Values of a band: as many as its bytes hold of all images."""
    return max(1, BAND_BYTES // (reader.images.element_size() * len(reader)))


def _bands_of(reader: Reader) -> int:
    return -(-reader.images[0].numel() // _band_height(reader))


def _bands(reader: Reader) -> Iterator[tuple[slice, Tensor]]:
    """Which values, and these of all images as stored, [w, N]; of use until the next is made."""
    height, values = _band_height(reader), reader.images[0].numel()
    size = images_per_block(reader.images)
    whole = reader.images.new_empty(min(height, values), len(reader))
    for first in range(0, values, height):
        rows = slice(first, min(first + height, values))
        band, start = whole[: rows.stop - first], 0
        for block in reader.blocks(size):
            band[:, start : start + len(block)] = block.flatten(1)[:, rows].T
            start += len(block)
        yield rows, band


def _parts(band: Tensor) -> Iterator[Tensor]:
    """Some values at a time, of a bounded size also as float64."""
    return iter(band.split(max(1, BLOCK_BYTES // (8 * band.shape[1]))))


def _centred(band: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Which values of a band, and these about their means, float64, [w, N]."""
    first, count = 0, band.shape[1]
    for part in _parts(band):
        numbers = part.double()
        if band.dtype == torch.uint8:
            numbers.sub_(128.0)
            shift, rest = shift_of_bytes(numbers.sum(1).long(), count)
            numbers.sub_(shift[:, None]).sub_((rest / count)[:, None]).div_(BYTES_PER_UNIT)
        else:
            # What is the same in all images is 0 to the bit.
            numbers = numbers - numbers[:, :1]
            numbers -= numbers.mean(1, keepdim=True)
        yield slice(first, first + len(part)), numbers
        first += len(part)
