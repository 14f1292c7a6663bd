"""Warnings of models that a set determines in part only."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from pyflocality.data import TrainingSet
from pyflocality.moments.moments import Moments
from pyflocality.moments.sums import Blend
from pyflocality.posterior.sharded import plain
from pyflocality.storage.reader import Reader


def warn_of_few_images(moments: Moments, what: str, rank: int | None = None) -> None:
    """Say so where a covariance is that of the images rather than that of their distribution.

    N images span N - 1 directions about their mean. Where no more images than varying values are
    there, some directions in which the data varies have no variance. Values that are the same in
    all images are no fault, nor are moments that were blended with others.

    Args:
        moments: Moments of the training set.
        what: What is made of them.
        rank: Components that are used; None for all.
    """
    count = moments.count
    few = count <= moments.mean.numel() and (rank is None or rank > count - 1)
    if not few or isinstance(moments._totals, Blend):
        return
    varying = int(_varying(moments).sum())
    if count <= varying:
        warnings.warn(
            f"{count} images are too few for {what} of {varying} values that vary: their "
            f"covariance has variance in {count - 1} directions at most and none in the others; "
            "give more images, moments of more images, or `Moments.blended` ones "
            "(LedoitWolfDenoiser shrinks the covariance instead)",
            stacklevel=3,
        )


def warn_of_missing_inputs(
    without: Tensor, moments: Moments, level: tuple[float, float], place: str
) -> bool:
    """Say so where values that the noisy image tells of listen to no input; whether there are any.

    With S the covariance, the best linear estimate of value d lies off the mean by at most the
    square root of S_dd, and of alpha^2 (S S)_dd / sigma^2: where that is less than half a step of
    8-bit images the mean is the answer, as for values that seldom vary, in much noise.

    Args:
        without: Which values have no input, bool [D].
        moments: Moments of the training set.
        level: alpha and sigma.
        place: Where that is so.
    """
    if not without.any():
        return False
    (alpha, sigma), covariance = level, moments.covariance
    moves = covariance.diagonal()
    if sigma > 0:
        moves = moves.minimum((alpha / sigma) ** 2 * covariance.square().sum(1))
    told = _varying(moments) & (moves > 1.0 / 255.0**2)
    return _warn_of_blind(without & told.to(without.device), place)


def warn_of_blind_values(without: Tensor, data: TrainingSet, place: str) -> None:
    """The same for values of a set whose moments are not known; reads the set where need be."""
    if without.any():
        first, varying = None, torch.zeros_like(without)
        for block in Reader(plain(data.images)).blocks(1024):
            values = block.flatten(1)
            first = values[0] if first is None else first
            varying |= (values != first).any(0).to(without.device)
        _warn_of_blind(without & varying, place)


def _warn_of_blind(blind: Tensor, place: str) -> bool:
    number = int(blind.sum())
    if number > 0:
        warnings.warn(
            f"{number} of {len(blind)} values vary in the set and have no input {place}: they are "
            "answered by the mean over all images, whatever the noisy image is",
            stacklevel=4,
        )
    return number > 0


def _varying(moments: Moments) -> Tensor:
    """Which values are not the same in all images, bool [D]."""
    variance = moments.covariance.diagonal()
    # Sums of floats leave rounding errors where a value is the same in all images.
    return variance > 1e-12 * variance.max()
