"""Checks of shapes, places and devices."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch

from pyflocality._support.checks import tensors
from pyflocality._support.checks.describing import describe
from pyflocality._support.checks.numeric import check_count
from pyflocality._support.checks.objects import check_sequence

Pixel = tuple[int, int, int]
# Longer sides have values that cannot be counted in 64 bits.
_LONGEST_SIDE = 2**20


def check_size(value: object, name: str) -> int:
    """A side of an image, or its number of channels."""
    return check_count(value, name, maximum=_LONGEST_SIDE)


def check_image_shape(value: object) -> tuple[int, int, int]:
    """A shape (C, H, W)."""
    shape = check_sequence(value, "image_shape", "(C, H, W)", length=3)
    channels, height, width = (check_size(size, "image_shape") for size in shape)
    return channels, height, width


def check_pixel(value: object, image_shape: Sequence[int], name: str = "pixel") -> Pixel:
    """An output value (c, h, w) of an image, counted from the start; negatives from the end."""
    pixel = check_sequence(value, name, "three whole numbers (c, h, w)", length=3)
    places = [check_count(place, name, minimum=-(2**63)) for place in pixel]
    if not all(-size <= place < size for place, size in zip(places, image_shape, strict=True)):
        raise ValueError(
            f"`{name}` must lie in an image of {tuple(image_shape)}, got {describe(value)}"
        )
    channel, row, column = (place % size for place, size in zip(places, image_shape, strict=True))
    return channel, row, column


def check_device(value: object) -> torch.device:
    """A device that holds values: a name such as "cuda:1", a torch.device or a GPU's number."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        value = int(value)
    elif not isinstance(value, (str, torch.device)):
        raise TypeError(
            f"`device` must be a device such as 'cpu' or 'cuda:1', got {describe(value)}"
        )
    try:
        device = torch.device(value)
    except (RuntimeError, OverflowError, ValueError) as error:
        raise ValueError(
            f"`device` must be a device such as 'cpu' or 'cuda:1', got {describe(value)}"
        ) from error
    if tensors.is_without_values(device):
        raise ValueError(f"`device` must be a device that holds values, got {describe(value)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        # Torch was built without it, or there is none of this number.
        first = str(error).partition("\n")[0]
        raise ValueError(
            f"`device` must be a device of this machine, got {describe(value)}: {first}"
        ) from error
    return device
