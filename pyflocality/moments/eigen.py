"""Eigenvalues and eigenvectors of a covariance, which an interruption need not wait for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.budget import check_given
from pyflocality._support.memory import check_memory
from pyflocality._support.progress import timed_call
from pyflocality._support.rates import solver_seconds

# Values from which on the eigenvectors of a covariance take a good part of a second.
_LONG_EIGH = 512
_INSTEAD = (
    "a `Basis` of fewer images than values, or with method='randomized', takes no such matrix, and "
    "images of a lower resolution take a smaller one"
)


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
            seconds=solver_seconds(size) if progress else 0.0,
            enabled=progress,
        )
    # Each row of the vectors in one piece.
    values, vectors = values.flip(0), vectors.flip(1).contiguous()
    floor = len(values) * torch.finfo(torch.float64).eps * values[0]
    return Eigen(torch.where(values > floor, values, 0.0), vectors)


def eigen_bytes(side: int) -> int:
    """Most bytes that the decomposition takes beside its matrix [D, D], the vectors included."""
    # A copy of the matrix that becomes the vectors, what the solver works in, and a copy in the
    # other order.
    return 4 * 8 * side**2


def check_fits(
    least: int, what: str, device: torch.device, memory_budget: int | str | None = None
) -> None:
    """Refuse what a budget that somebody gave, or the memory there is, cannot hold.

    Args:
        least: Bytes that it takes.
        what: What takes them.
        device: Whose memory it is; what a GPU has its allocator tells.
        memory_budget: Working memory; None follows the environment variable.

    Raises:
        ValueError: It takes more than the budget; the least is named.
        MemoryError: It takes more than there is.
    """
    check_given(memory_budget, least, what)
    if device.type == "cpu":
        check_memory(least, what, _INSTEAD)
