"""The totals behind `pyflocality.Moments`: exact for bytes, float64 otherwise, or of a blend."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyflocality.ops.covariance import accumulate_covariance
from pyflocality.posterior.ranks import Ranks
from pyflocality.reference.covariance import add_upper_product
from pyflocality.storage.reader import BYTES_PER_UNIT

# Working memory of one step of a stream or of a finalisation; several such arrays live at once.
BLOCK_BYTES = 32 * 2**20


class ByteSums:
    """Exact totals of uint8 images: s [D] and the upper triangle of G [D, D], int64."""

    kind = "uint8"
    # Dtype and number of dimensions of its tensors.
    layout = {"total": (torch.int64, 1), "gram": (torch.int64, 2)}

    def __init__(self, count: int, total: Tensor, gram: Tensor) -> None:
        self.count, self.total, self.gram = count, total, gram

    @classmethod
    def empty(cls, values: int, device: torch.device) -> ByteSums:
        """Totals of no images of D values."""
        total = torch.zeros(values, dtype=torch.int64, device=device)
        return cls(0, total, total.new_zeros(values, values))

    @property
    def device(self) -> torch.device:
        """Where the totals live."""
        return self.total.device

    def add(self, images: Tensor, backend: str | None) -> None:
        """Count images [n, D]."""
        accumulate_covariance(images, self.gram, self.total, backend=backend)
        self.count += len(images)

    def merged(self, other: ByteSums) -> ByteSums:
        """Totals of the images of both."""
        return ByteSums(self.count + other.count, self.total + other.total, self.gram + other.gram)

    def over(self, ranks: Ranks) -> ByteSums:
        """Totals of the images of all ranks."""
        count = ranks.summed(self.total.new_tensor(self.count))
        return ByteSums(int(count), ranks.summed(self.total), ranks.summed(self.gram))

    def copy(self) -> ByteSums:
        """Totals that change on their own."""
        return ByteSums(self.count, self.total.clone(), self.gram.clone())

    def tensors(self) -> dict[str, Tensor]:
        """The totals by the names that the constructor takes them under."""
        return {"total": self.total, "gram": self.gram}

    def mean(self) -> Tensor:
        """Mean in [-1, 1], float64, [D]."""
        # (s / N + 1/2) / 127.5 with a single rounding: both integers are exact in float64.
        divisor = self.total.new_tensor(255 * self.count, dtype=torch.float64)
        return (2 * self.total + self.count).double() / divisor

    def covariance(self) -> Tensor:
        """Covariance about an integer shift m near the mean, which leaves little to cancel.

        With c' = c - m all of G' = sum c' c'^T = G - m s^T - s m^T + N m m^T and s' = s - N m are
        integers and |s'| <= N / 2, so S = (G' - s' s'^T / N) / (N - 1) / 127.5^2 rounds only at
        its divisions and its difference.
        """
        count, total = self.count, self.total
        # The nearest integer to s / N.
        shift = torch.div(2 * total + count, 2 * count, rounding_mode="floor")
        rest = total - count * shift

        # Divisors are tensors because CUDA multiplies by the reciprocal of a number, which rounds
        # differently.
        divisors = total.new_tensor([count, (count - 1) * BYTES_PER_UNIT**2], dtype=torch.float64)

        def band(rows: slice, columns: slice) -> Tensor:
            centred = self.gram[rows, columns] - shift[rows, None] * total[columns]
            centred -= rest[rows, None] * shift[columns]
            products = (rest[rows, None] * rest[columns]).double().div_(divisors[0])
            return centred.double().sub_(products).div_(divisors[1])

        return _symmetric(band, self.gram, count)


class FloatSums:
    """Mean [D] and upper triangle of the scatter sum (v - mean)(v - mean)^T [D, D], float64."""

    kind = "floating-point"
    layout = {"centre": (torch.float64, 1), "scatter": (torch.float64, 2)}

    def __init__(self, count: int, centre: Tensor, scatter: Tensor) -> None:
        self.count, self.centre, self.scatter = count, centre, scatter

    @classmethod
    def empty(cls, values: int, device: torch.device) -> FloatSums:
        """Totals of no images of D values."""
        centre = torch.zeros(values, dtype=torch.float64, device=device)
        return cls(0, centre, centre.new_zeros(values, values))

    @property
    def device(self) -> torch.device:
        """Where the totals live."""
        return self.centre.device

    def add(self, images: Tensor, backend: str | None) -> None:
        """Count images [n, D]."""
        del backend
        images = images.double()
        centre = images.mean(0)
        add_upper_product(self.scatter, images - centre)
        self._join(len(images), centre)

    def merged(self, other: FloatSums) -> FloatSums:
        """Totals of the images of both."""
        result = self.copy()
        result.scatter += other.scatter
        result._join(other.count, other.centre)
        return result

    def over(self, ranks: Ranks) -> FloatSums:
        """Totals of the images of all ranks."""
        count = ranks.summed(self.centre.new_tensor(self.count, dtype=torch.int64))
        centre = ranks.summed(self.centre * self.count) / count
        scatter = self.scatter.clone()
        add_upper_product(scatter, (self.centre - centre)[None] * self.count**0.5)
        return FloatSums(int(count), centre, ranks.summed(scatter))

    def copy(self) -> FloatSums:
        """Totals that change on their own."""
        return FloatSums(self.count, self.centre.clone(), self.scatter.clone())

    def tensors(self) -> dict[str, Tensor]:
        """The totals by the names that the constructor takes them under."""
        return {"centre": self.centre, "scatter": self.scatter}

    def mean(self) -> Tensor:
        """Mean in [-1, 1], float64, [D]."""
        return self.centre.clone()

    def covariance(self) -> Tensor:
        """Covariance, float64, [D, D]."""

        def band(rows: slice, columns: slice) -> Tensor:
            return self.scatter[rows, columns] / (self.count - 1)

        return _symmetric(band, self.scatter, self.count)

    def _join(self, count: int, centre: Tensor) -> None:
        """Move the mean after the scatter of `count` images about `centre` has been added."""
        together = self.count + count
        difference = centre - self.centre
        scaled = difference * (self.count * count / together) ** 0.5
        add_upper_product(self.scatter, scaled[None])
        self.centre = self.centre + difference * (count / together)
        self.count = together


class Blend:
    """Mean [D] and covariance [D, D], float64, that no images stand behind: they are final."""

    kind = "blended"
    layout = {"centre": (torch.float64, 1), "matrix": (torch.float64, 2)}

    def __init__(self, count: int, centre: Tensor, matrix: Tensor) -> None:
        self.count, self.centre, self.matrix = count, centre, matrix

    @property
    def device(self) -> torch.device:
        """Where the numbers live."""
        return self.centre.device

    def tensors(self) -> dict[str, Tensor]:
        """The numbers by the names that the constructor takes them under."""
        return {"centre": self.centre, "matrix": self.matrix}

    def mean(self) -> Tensor:
        """Mean in [-1, 1], float64, [D]."""
        return self.centre.clone()

    def covariance(self) -> Tensor:
        """Covariance, float64, [D, D]."""
        return self.matrix


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


def kind_of_sums(images: Tensor) -> type[ByteSums] | type[FloatSums]:
    """The totals that images of this dtype are counted in."""
    return ByteSums if images.dtype == torch.uint8 else FloatSums
