"""Copies of training images that are searched too: mirrored, shifted, never all in memory.

A set of N images with an augmentation counts as a set of c N images: copy 0 are the images as they
are, image i of copy k has position k N + i. A copy is made a block at a time, when the block is
read (`pyflocality.storage.reader`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from pyflocality._support.checks import check_count, check_flag, describe


@dataclass(frozen=True)
class Transform:
    """One copy: images mirrored left to right, then moved, with the border repeated behind them.

    Attributes:
        mirrored: Whether left and right are swapped.
        down: Rows that pixels move down; negative moves them up.
        right: Columns that pixels move to the right; negative moves them to the left.
    """

    mirrored: bool
    down: int
    right: int

    def __call__(self, images: Tensor) -> Tensor:
        """The copies of images [..., H, W], new memory unless they stay as they are."""
        if not (self.mirrored or self.down or self.right):
            return images
        height, width = images.shape[-2:]
        columns = _sources(width, self.right, images.device)
        if self.mirrored:
            columns = width - 1 - columns
        moved = images.index_select(-1, columns)
        if self.down == 0:
            return moved
        return moved.index_select(-2, _sources(height, self.down, images.device))


def _sources(length: int, shift: int, device: torch.device) -> Tensor:
    """Where along an axis each pixel of a shifted copy comes from, [length]."""
    return (torch.arange(length, device=device) - shift).clamp(0, length - 1)


@dataclass(frozen=True)
class Augmentation:
    """Which copies of the images are searched beside the images themselves.

    Attributes:
        flip: Whether images mirrored left to right are.
        shifts: Pixels that copies are shifted by at most, up, down, left and right.

    Raises:
        TypeError: `flip` is not a bool, or `shifts` not a whole number.
        ValueError: `shifts` is negative.
    """

    flip: bool = False
    shifts: int = 0

    def __post_init__(self) -> None:
        """Check the fields."""
        object.__setattr__(self, "flip", check_flag(self.flip, "flip"))
        object.__setattr__(self, "shifts", check_count(self.shifts, "shifts", minimum=0))

    def __str__(self) -> str:
        """What is done to the copies, in words."""
        words = ["flipped"] * self.flip + [f"shifted by up to {self.shifts}"] * (self.shifts > 0)
        return " and ".join(words)

    @cached_property
    def transforms(self) -> tuple[Transform, ...]:
        """All copies, the images as they are first."""
        moves = sorted(range(-self.shifts, self.shifts + 1), key=lambda move: (abs(move), -move))
        sides = (False, True) if self.flip else (False,)
        return tuple(
            Transform(mirrored, down, right)
            for mirrored in sides
            for down in moves
            for right in moves
        )

    @property
    def copies(self) -> int:
        """How many variants of an image there are, the image itself included."""
        return len(self.transforms)


IDENTITY = Augmentation()


def check_augmentation(augmentation: object, image_shape: Sequence[int]) -> Augmentation | None:
    """An augmentation that fits images (C, H, W); None if there are no copies."""
    if augmentation is None:
        return None
    if not isinstance(augmentation, Augmentation):
        raise TypeError(
            "`augmentation` must be that of a TrainingSet (`data.augmented(flip=True)` has one), "
            f"got {describe(augmentation)}"
        )
    height, width = image_shape[-2:]
    if augmentation.shifts >= min(height, width):
        raise ValueError(
            f"`shifts` must be less than {min(height, width)} for images of {height}x{width} "
            f"pixels, got {augmentation.shifts}"
        )
    return augmentation if augmentation.flip or augmentation.shifts else None
