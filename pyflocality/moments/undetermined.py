"""Warnings of models that a set determines in part only."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from pyflocality.data import TrainingSet
from pyflocality.moments.basis import Basis
from pyflocality.moments.moments import Moments
from pyflocality.moments.sums import BLOCK_BYTES, Blend
from pyflocality.posterior.sharded import plain
from pyflocality.storage.reader import Reader


def warn_of_few_images(
    source: TrainingSet | Moments | Basis, what: str, rank: int | None = None
) -> None:
    """Say so where a covariance is that of the images rather than that of their distribution.

    N images span N - 1 directions about their mean. Where no more images than varying values are
    there, some directions in which the data varies have no variance. Values that are the same in
    all images are no fault, nor are moments that were blended with others.

    Args:
        source: The training set, its moments or its components.
        what: What is made of them.
        rank: Components that are used; None for all.
    """
    count = _count(source)
    few = count <= math.prod(source.image_shape) and (rank is None or rank > count - 1)
    if not few or _is_blended(source):
        return
    varying = int(_varying(source).sum())
    if count <= varying:
        warnings.warn(
            f"{count} images are too few for {what} of {varying} values that vary: their "
            f"covariance has variance in {count - 1} directions at most and none in the others; "
            "give more images, moments of more images, or `Moments.blended` ones "
            "(LedoitWolfDenoiser shrinks the covariance instead)",
            stacklevel=3,
        )


def blind_values(without: Tensor, source: Moments | Basis, level: tuple[float, float]) -> Tensor:
    """Which values that the noisy image tells of listen to no input, bool [D].

    With S the covariance, the best linear estimate of value d lies off the mean by at most the
    square root of S_dd, and of alpha^2 (S S)_dd / sigma^2: where that is less than half a step of
    8-bit images the mean is the answer, as for values that seldom vary, in much noise.

    Args:
        without: Which values have no input, bool [D].
        source: Moments or components of the training set.
        level: alpha and sigma.
    """
    if not without.any():
        return without
    (alpha, sigma), moves = level, source.variance
    if sigma > 0:
        # Squared last: a square of little noise is no number.
        moves = moves.minimum((alpha / sigma * _squared_rows(source).sqrt()).square())
    told = _varying(source) & (moves > 1.0 / 255.0**2)
    return without & told.to(without.device)


def blind_values_of_set(without: Tensor, data: TrainingSet) -> Tensor:
    """The same for values of a set whose moments are not known; reads the set where need be."""
    return without & _varying(data).to(without.device) if without.any() else without


def warn_of_blind(blind: Tensor, place: str) -> bool:
    """Say so where values listen to no input; whether there are any.

    Args:
        blind: Which these are, bool [D].
        place: Where that is so.
    """
    number = int(blind.sum())
    if number > 0:
        warnings.warn(
            f"{number} of {len(blind)} values vary in the set and have no input {place}: they are "
            "answered by the mean over all images, whatever the noisy image is",
            stacklevel=3,
        )
    return number > 0


def _count(source: TrainingSet | Moments | Basis) -> int:
    """Number of images, copies included."""
    if isinstance(source, TrainingSet):
        return len(source) * source.copies
    return source.count


def _is_blended(source: TrainingSet | Moments | Basis) -> bool:
    """Whether the covariance is not that of the images alone."""
    if isinstance(source, Moments):
        return isinstance(source._totals, Blend)
    return isinstance(source, Basis) and source.rank >= source.count


def _squared_rows(moments: Moments | Basis) -> Tensor:
    """Squared norms of the rows of the covariance, float64 [D]."""
    if isinstance(moments, Moments):
        return moments.covariance.square().sum(1)
    size = max(1, BLOCK_BYTES // (8 * max(1, moments.rank)))
    parts = [(part * moments.values).square().sum(1) for part in moments.vectors.split(size)]
    return torch.cat(parts)


def _varying(source: TrainingSet | Moments | Basis) -> Tensor:
    """Which values are not the same in all images, bool [D]."""
    if not isinstance(source, TrainingSet):
        # Sums of floats leave rounding errors where a value is the same in all images.
        return source.variance > 1e-12 * source.variance.max()
    reader = Reader(plain(source.images), source.augmentation)
    first = reader.at(torch.zeros(1, dtype=torch.int64, device=source.device)).flatten()
    varying = torch.zeros_like(first, dtype=torch.bool)
    for block in reader.blocks(1024):
        varying |= (block.flatten(1) != first).any(0)
    return varying
