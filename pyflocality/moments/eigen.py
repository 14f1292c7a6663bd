"""Eigenvalues and eigenvectors of a covariance, which an interruption need not wait for."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.progress import timed_call

# Values from which on the eigenvectors of a covariance take a good part of a second.
_LONG_EIGH = 512
# Values of the matrix that tells how long another takes: in a twentieth of a second.
_SAMPLE = 400


class Eigen(NamedTuple):
    """Eigendecomposition S = vectors diag(values) vectors^T.

    Attributes:
        values: Eigenvalues, float64, descending, [D].
        vectors: Eigenvectors in columns, float64, [D, D].
    """

    values: Tensor
    vectors: Tensor


def eigen_of(covariance: Tensor, *, progress: bool = False) -> Eigen:
    """The decomposition of a covariance [D, D], with rounding errors of zero set to 0.

    Args:
        covariance: The covariance.
        progress: Whether to show the time it takes, beside an estimate: LAPACK does not tell.
    """
    size = len(covariance)
    # What is quick needs no thread, and a GPU's stream and device are those of this one.
    if size < _LONG_EIGH or covariance.device.type != "cpu":
        values, vectors = torch.linalg.eigh(covariance)
    else:
        values, vectors = timed_call(
            lambda: torch.linalg.eigh(covariance),
            description=f"eigenvectors of {size:,} x {size:,} numbers",
            seconds=eigen_seconds(size) if progress else 0.0,
            enabled=progress,
        )
    values, vectors = values.flip(0), vectors.flip(1)
    floor = len(values) * torch.finfo(torch.float64).eps * values[0]
    return Eigen(torch.where(values > floor, values, 0.0), vectors)


def eigen_seconds(size: int) -> float:
    """About how long the decomposition of a matrix takes on this processor, from a small one."""
    numbers = torch.rand(_SAMPLE, _SAMPLE, generator=torch.Generator().manual_seed(0))
    small = (numbers @ numbers.T).double()
    spent = []
    for _ in range(2):
        start = time.perf_counter()
        torch.linalg.eigh(small)
        spent.append(time.perf_counter() - start)
    return min(spent) * (size / _SAMPLE) ** 3
