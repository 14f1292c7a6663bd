"""The totals behind `pyflocality.Moments`: exact for bytes, float64 otherwise, or of a blend."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from pyflocality._support.checks import FLOAT_DTYPES, check_finite, check_tensor, describe
from pyflocality._support.json import POSITIVE, TEXT, shape
from pyflocality.moments.files import Form
from pyflocality.ops.covariance import accumulate_covariance
from pyflocality.posterior.ranks import Ranks
from pyflocality.reference.covariance import add_upper_product
from pyflocality.storage.reader import BYTES_PER_UNIT, Reader

if TYPE_CHECKING:
    from typing_extensions import Self

# Working memory of one step of a stream or of a finalisation; several such arrays live at once.
BLOCK_BYTES = 32 * 2**20


class Totals:
    """A vector [D] and a matrix [D, D] of which mean and covariance are made.

    Attributes:
        kind: What they were counted from, in words.
        layout: Names of vector and matrix in a file, in this order, with dtype and dimensions.
        count: Number of images.
        vector: The vector.
        matrix: The matrix.
    """

    kind: ClassVar[str]
    layout: ClassVar[dict[str, tuple[torch.dtype, int]]]

    def __init__(self, count: int, vector: Tensor, matrix: Tensor) -> None:
        self.count, self.vector, self.matrix = count, vector, matrix

    @property
    def device(self) -> torch.device:
        """Where the numbers live."""
        return self.vector.device

    def tensors(self) -> dict[str, Tensor]:
        """The numbers by their names in a file."""
        return dict(zip(self.layout, (self.vector, self.matrix), strict=True))

    def to(self, device: torch.device) -> Self:
        """These on a device."""
        return type(self)(self.count, self.vector.to(device), self.matrix.to(device))

    def mean(self) -> Tensor:
        """Mean in [-1, 1], float64, [D]."""
        raise NotImplementedError

    def variance(self) -> Tensor:
        """Diagonal of the covariance, to the same bits, float64, [D]."""
        raise NotImplementedError

    def covariance(self) -> Tensor:
        """Covariance, float64, [D, D]; zero for one image."""
        raise NotImplementedError


class Sums(Totals):
    """Totals of images, which take in more of them; of the matrix the upper triangle counts."""

    @classmethod
    def empty(cls, values: int, device: torch.device) -> Self:
        """Totals of no images of D values."""
        vector = torch.zeros(values, dtype=next(iter(cls.layout.values()))[0], device=device)
        return cls(0, vector, vector.new_zeros(values, values))

    def copy(self) -> Self:
        """Totals that change on their own."""
        return type(self)(self.count, self.vector.clone(), self.matrix.clone())

    def add(self, images: Tensor, backend: str | None) -> None:
        """Count images [n, D]."""
        raise NotImplementedError

    def merged(self, other: Self) -> Self:
        """Totals of the images of both."""
        raise NotImplementedError

    def without(self, other: Self) -> Self:
        """Totals of the images but for those of `other`, which are among them."""
        raise NotImplementedError

    def over(self, ranks: Ranks) -> Self:
        """Totals of the images of all ranks."""
        raise NotImplementedError


class ByteSums(Sums):
    """Exact totals of uint8 images: s [D] and the upper triangle of G [D, D], int64."""

    kind = "uint8"
    layout = {"total": (torch.int64, 1), "gram": (torch.int64, 2)}

    def add(self, images: Tensor, backend: str | None) -> None:
        """Count images [n, D]."""
        accumulate_covariance(images, self.matrix, self.vector, backend=backend)
        self.count += len(images)

    def merged(self, other: Self) -> Self:
        """Totals of the images of both."""
        count, vector = self.count + other.count, self.vector + other.vector
        return type(self)(count, vector, self.matrix + other.matrix)

    def without(self, other: Self) -> Self:
        """Totals of the images but for those of `other`, which are among them: exact."""
        count, vector = self.count - other.count, self.vector - other.vector
        return type(self)(count, vector, self.matrix - other.matrix)

    def over(self, ranks: Ranks) -> Self:
        """Totals of the images of all ranks."""
        count = ranks.summed(self.vector.new_tensor(self.count))
        return type(self)(int(count), ranks.summed(self.vector), ranks.summed(self.matrix))

    def mean(self) -> Tensor:
        """Mean in [-1, 1], float64, [D]."""
        return mean_of_bytes(self.vector, self.count)

    def variance(self) -> Tensor:
        """Diagonal of the covariance, to the same bits, float64, [D]."""
        count, total, squares = self.count, self.vector, self.matrix.diagonal()
        if count == 1:
            return torch.zeros_like(total, dtype=torch.float64)
        shift, rest = shift_of_bytes(total, count)
        return covariance_of_bytes(squares - shift * total - rest * shift, rest * rest, count)

    def covariance(self) -> Tensor:
        """Covariance about an integer shift m near the mean, which leaves little to cancel.

        With c' = c - m all of G' = sum c' c'^T = G - m s^T - s m^T + N m m^T and s' = s - N m are
        integers and |s'| <= N / 2, so S = (G' - s' s'^T / N) / (N - 1) / 127.5^2 rounds only at
        its divisions and its difference.
        """
        count, total = self.count, self.vector
        shift, rest = shift_of_bytes(total, count)

        def band(rows: slice, columns: slice) -> Tensor:
            centred = self.matrix[rows, columns] - shift[rows, None] * total[columns]
            centred -= rest[rows, None] * shift[columns]
            return covariance_of_bytes(centred, rest[rows, None] * rest[columns], count)

        return _symmetric(band, self.matrix, count)


class FloatSums(Sums):
    """Mean [D] and upper triangle of the scatter sum (v - mean)(v - mean)^T [D, D], float64."""

    kind = "floating-point"
    layout = {"centre": (torch.float64, 1), "scatter": (torch.float64, 2)}

    def add(self, images: Tensor, backend: str | None) -> None:
        """Count images [n, D]."""
        del backend
        images = images.double()
        centre = images.mean(0)
        add_upper_product(self.matrix, images - centre)
        self._join(len(images), centre)

    def merged(self, other: Self) -> Self:
        """Totals of the images of both."""
        result = self.copy()
        result.matrix += other.matrix
        result._join(other.count, other.vector)
        return result

    def without(self, other: Self) -> Self:
        """Totals of the images but for those of `other`, which are among them: to rounding."""
        count = self.count - other.count
        difference = (self.vector - other.vector) * (self.count / count)
        scaled = difference * (count * other.count / self.count) ** 0.5
        taken = other.matrix - self.matrix
        add_upper_product(taken, scaled[None])
        return type(self)(count, other.vector + difference, taken.neg_())

    def over(self, ranks: Ranks) -> Self:
        """Totals of the images of all ranks."""
        count = ranks.summed(self.vector.new_tensor(self.count, dtype=torch.int64))
        centre = ranks.summed(self.vector * self.count) / count
        scatter = self.matrix.clone()
        add_upper_product(scatter, (self.vector - centre)[None] * self.count**0.5)
        return type(self)(int(count), centre, ranks.summed(scatter))

    def mean(self) -> Tensor:
        """Mean in [-1, 1], float64, [D]."""
        return self.vector.clone()

    def variance(self) -> Tensor:
        """Diagonal of the covariance, to the same bits, float64, [D]."""
        return self.matrix.diagonal() / (self.count - 1) if self.count > 1 else 0.0 * self.vector

    def covariance(self) -> Tensor:
        """Covariance, float64, [D, D]."""

        def band(rows: slice, columns: slice) -> Tensor:
            return self.matrix[rows, columns] / (self.count - 1)

        return _symmetric(band, self.matrix, self.count)

    def _join(self, count: int, centre: Tensor) -> None:
        """Move the mean after the scatter of `count` images about `centre` has been added."""
        together = self.count + count
        difference = centre - self.vector
        scaled = difference * (self.count * count / together) ** 0.5
        add_upper_product(self.matrix, scaled[None])
        self.vector = self.vector + difference * (count / together)
        self.count = together


class Blend(Totals):
    """Mean [D] and covariance [D, D], float64, that no images stand behind: they are final."""

    kind = "blended"
    layout = {"centre": (torch.float64, 1), "matrix": (torch.float64, 2)}

    def mean(self) -> Tensor:
        """Mean in [-1, 1], float64, [D]."""
        return self.vector.clone()

    def variance(self) -> Tensor:
        """Diagonal of the covariance, to the same bits, float64, [D]."""
        return self.matrix.diagonal().clone()

    def covariance(self) -> Tensor:
        """Covariance, float64, [D, D]."""
        return self.matrix


def mean_of_bytes(total: Tensor, count: int) -> Tensor:
    """Mean in [-1, 1] from sums s of N bytes less 128 each, int64: float64, correctly rounded."""
    # (s / N + 1/2) / 127.5 with a single rounding: both integers are exact in float64.
    return (2 * total + count).double() / total.new_tensor(255 * count, dtype=torch.float64)


def shift_of_bytes(total: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The integers m nearest to s / N, and what they leave, s - N m."""
    shift = torch.div(2 * total + count, 2 * count, rounding_mode="floor")
    return shift, total - count * shift


def covariance_of_bytes(products: Tensor, rests: Tensor, count: int) -> Tensor:
    """Covariances, float64, from sums of products about m and products of the rests, int64."""
    # Divisors are tensors because CUDA multiplies by the reciprocal of a number, which rounds
    # differently.
    divisors = products.new_tensor([count, (count - 1) * BYTES_PER_UNIT**2], dtype=torch.float64)
    return products.double().sub_(rests.double().div_(divisors[0])).div_(divisors[1])


def _symmetric(band: Callable[[slice, slice], Tensor], like: Tensor, count: int) -> Tensor:
    """A covariance [D, D] from bands of its upper triangle, mirrored; zero for one image.

    `band(rows, columns)` gives these entries as a new tensor; what it gives below the diagonal is
    not used. Working a band at a time keeps D x D temporaries away.
    """
    values = len(like)
    result = torch.zeros(values, values, dtype=torch.float64, device=like.device)
    if count == 1:
        return result
    height = max(1, BLOCK_BYTES // (8 * values))
    for first in range(0, values, height):
        rows = slice(first, first + height)
        entries = band(rows, slice(first, None))
        corner = entries[:, : len(entries)]
        corner.copy_(corner.triu() + corner.triu(1).T)
        result[rows, first:] = entries
        result[first:, rows] = entries.T
    return result


def kind_of_sums(images: Tensor) -> type[Sums]:
    """The totals that images of this dtype are counted in."""
    return ByteSums if images.dtype == torch.uint8 else FloatSums


def images_per_block(images: Tensor) -> int:
    """Images of a block of bounded size also where it is cast to float64."""
    per_value = 1 if images.dtype == torch.uint8 else 8
    return max(1, BLOCK_BYTES // (per_value * images[0].numel()))


def check_images(images: object, name: str) -> None:
    """Images [n, C, H, W], at least one, uint8 or finite floating-point."""
    images = check_tensor(images, name)
    if images.dtype != torch.uint8 and images.dtype not in FLOAT_DTYPES:
        raise TypeError(f"`{name}` must be uint8 or floating-point, got {describe(images)}")
    if images.ndim != 4:
        raise ValueError(f"`{name}` must have shape [n, C, H, W], got {describe(images)}")
    if images.numel() == 0:
        raise ValueError(f"`{name}` holds no images: {describe(images)}")
    if images.is_floating_point():
        Reader(images).checked(check_finite, images, name)


def check_alike(
    name: str, one: tuple[tuple[int, int, int], Sums], other: tuple[tuple[int, int, int], Sums]
) -> None:
    """Refuse totals, with the shape of their images, that do not go with those of others."""
    for what, expected, got in (
        ("image shape", one[0], other[0]),
        ("kind of dtype", one[1].kind, other[1].kind),
        ("device", one[1].device, other[1].device),
    ):
        if expected != got:
            raise ValueError(f"`{name}` must have {what} {expected}, got {got}")


KINDS: dict[str, type[Totals]] = {sums.kind: sums for sums in (ByteSums, FloatSums, Blend)}


def _layout(header: dict[str, Any]) -> dict[str, tuple[torch.dtype, list[int]]]:
    """Tensors of a file of moments."""
    if header["kind"] not in KINDS:
        raise ValueError(f"it holds moments of an unknown kind, {header['kind']!r}")
    values = math.prod(header["image_shape"])
    layout = KINDS[header["kind"]].layout
    return {name: (dtype, [values] * dimensions) for name, (dtype, dimensions) in layout.items()}


MOMENTS = Form("moments", {"kind": TEXT, "count": POSITIVE, "image_shape": shape(3)}, _layout)
