"""Held-out images, and the set without them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._support.checks import describe
from pyflocality.calibration.candidates import is_thin, made_once
from pyflocality.calibration.counts import FEWEST, folds_of_set
from pyflocality.data import TrainingSet
from pyflocality.moments import Basis, Moments
from pyflocality.posterior.sharded import ranks_of
from pyflocality.storage.mapped import mapped_file, without


@dataclass(frozen=True)
class Fold:
    """Images that are held out, and what is left.

    Attributes:
        images: Values of the images, float32 [n, C, H, W].
        rest: The set without them, whose copies are copies of the images that are left.
        moments: Moments or components of `rest`; None where no model needs them.
    """

    images: Tensor
    rest: TrainingSet
    moments: Moments | Basis | None


def held_out_positions(data: TrainingSet, generator: torch.Generator) -> list[Tensor]:
    """Which images each fold leaves out, int64 in ascending order.

    Half of the images at most, drawn at random; where there are labels every class is drawn from
    in proportion. No image is in two folds.

    Raises:
        ValueError: The set has too few images.
    """
    count = len(data)
    if count < FEWEST:
        raise ValueError(
            f"`data` must have at least {FEWEST} images, of which some are held out, got {count}"
        )
    total, folds = folds_of_set(count)
    chosen = spread_positions(data, total, generator)
    return [chosen[fold::folds].sort().values for fold in range(folds)]


def spread_positions(data: TrainingSet, total: int, generator: torch.Generator) -> Tensor:
    """Some positions at random, where there are labels in proportion of every class, by class."""
    count = len(data)
    order = torch.randperm(count, generator=generator)
    if data.labels is not None:
        order = order[data.labels.cpu()[order].argsort(stable=True)]
    # In the middle of parts of the same size.
    return order[(2 * torch.arange(total) + 1) * count // (2 * total)]


def folds_of(
    data: TrainingSet, positions: Sequence[Tensor], *, moments: bool, progress: bool
) -> list[Fold]:
    """The folds that leave out images at some positions, with moments where these are needed.

    Images of a mapped file are not copied. Moments are those of the whole set less those of the
    fold, which is exact for 8-bit images; where components are made of fewer images than values
    they are made anew of what is left.
    """
    whole = None
    if moments and not is_thin(data):
        whole = Moments.from_data(data, progress=progress)
    folds = []
    for some in positions:
        out, rest = data.subset(some), _left(data, some)
        source: Moments | Basis | None = None
        if whole is not None:
            source = whole.without(Moments.from_data(out))
        elif moments:
            source = made_once(rest, progress=progress)
        folds.append(Fold(out.values(), rest, source))
    return folds


def _left(data: TrainingSet, positions: Tensor) -> TrainingSet:
    """The images but for some, in any order."""
    if mapped_file(data.images) is not None:
        images = without(data.images, positions)
        return TrainingSet._of_valid(images, data.name, None, None, data.augmentation)
    kept = torch.ones(len(data), dtype=torch.bool)
    kept[positions] = False
    return data.subset(kept)


def check_whole(data: TrainingSet) -> None:
    """Refuse a part of a sharded set."""
    if ranks_of(data.images) is not None:
        raise ValueError(
            "`data` must be a whole set, of which images are held out, got "
            f"{describe(data)}: calibrate it before pyflocality.distributed.shard"
        )
