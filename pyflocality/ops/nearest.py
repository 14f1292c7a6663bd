"""The training images nearest to a query."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.checks import check_count
from pyflocality.backends.selection import requested_backend
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair
from pyflocality.posterior.problem import PosteriorProblem, posterior_problem
from pyflocality.storage.augmentation import Augmentation

NEAREST = declare(
    Operation(
        "nearest",
        {
            "scan": Variant(
                {"cpu": Served("bytes_limits"), "reference": Served()},
                # Differences, their squares and the sum of these.
                per_pair(lambda s: 3 * s.values),
            )
        },
        answers_state=False,
        parameters=("k",),
        example=lambda size, generator: (1,),
        # Noisy images in float32, and a position each.
        beside=lambda s: s.batch * (4 * s.values + 8),
    )
)


class Neighbours(NamedTuple):
    """Nearest training images, nearest first.

    Attributes:
        indices: Positions in the training set, int64 [B, k]; with an augmentation, image i of
            copy k, counted from 0 for the images themselves, has position k N + i.
        distances: Squared distances |x - alpha v|^2, [B, k].
    """

    indices: Tensor
    distances: Tensor


def nearest_images(
    x: Tensor,
    images: Tensor,
    alpha: float | Tensor = 1.0,
    *,
    k: int = 1,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
    augmentation: Augmentation | None = None,
) -> Neighbours:
    """The k training images nearest to each query, in squared distance |x - alpha v|^2.

    Which images these are is exact: neither the dtype nor any rounding decides, and images that
    are equally far are known to be.

    Args:
        x: Queries, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        alpha: Signal coefficient, a number or [B], positive.
        k: Number of neighbours, at most N, or the number of images and copies.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to answer distances in; None takes x's own.
        memory_budget: Working memory, bytes or a string such as "2GB".
        chunk_size: Training images at a time; None derives it from the budget.
        augmentation: Copies of the images that are searched too, as `TrainingSet.augmentation`
            tells them; None for the images alone.

    Returns:
        Indices and squared distances; among equal distances the earlier image comes first.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    k = check_count(k, "k")
    problem = posterior_problem(
        x,
        images,
        0.0,
        alpha,
        dtype=dtype,
        memory_budget=memory_budget,
        chunk_size=chunk_size,
        augmentation=augmentation,
    )
    if k > problem.count:
        raise ValueError(f"`k` must be at most the number of images {problem.count}, got {k}")
    return Neighbours(*NEAREST.run("scan", problem, (k,), backend))


def nearest_positions(
    problem: PosteriorProblem, k: int, among: Tensor | None, backend: str | None
) -> Tensor:
    """The k images nearest to each query of a checked problem, in the order of their positions.

    Args:
        problem: The problem, of a set that is not sharded.
        k: Number of images.
        among: Positions of the images that count, ascending, int64 [m]; None for all.
        backend: Backend that was chosen for a model. The reference stays the reference; others
            need not have this operation, and all that do answer the same.

    Returns:
        Their positions, ascending, int64 [B, k].
    """
    chosen = "reference" if requested_backend(backend) == "reference" else "auto"
    indices: Tensor = NEAREST.run("scan", problem, (k, False, among), chosen)[0]
    return indices
