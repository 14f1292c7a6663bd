"""Conversion of one image: size and channels, by Pillow."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

# Weights of red, green and blue in luma (ITU-R BT.601), for images that are not 8-bit.
LUMA = (0.299, 0.587, 0.114)


def resize(image: Image.Image, resolution: tuple[int, int]) -> Image.Image:
    """Bring an image to a height and width.

    The largest centred rectangle of the target's aspect ratio is cut out first. Shrinking by a
    whole factor averages blocks of pixels; anything else is Lanczos resampling, antialiased.
    """
    from PIL import Image

    height, width = resolution
    scale = min(image.height / height, image.width / width)
    crop_height, crop_width = max(1, round(height * scale)), max(1, round(width * scale))
    top, left = (image.height - crop_height) // 2, (image.width - crop_width) // 2
    if (crop_height, crop_width) != (image.height, image.width):
        image = image.crop((left, top, left + crop_width, top + crop_height))
    if crop_height % height == 0 and crop_width % width == 0:
        factors = (crop_width // width, crop_height // height)
        # One rounding only: resize(BOX) rounds 8-bit values after each of its two passes.
        return image if factors == (1, 1) else image.reduce(factors)
    return image.resize((width, height), Image.Resampling.LANCZOS)


def convert_array(
    image: np.ndarray, resolution: tuple[int, int] | None, channels: int | None
) -> np.ndarray:
    """Bring an image [C, H, W], 8-bit or float in [-1, 1], to a size and a number of channels."""
    from PIL import Image

    if channels is not None and channels != len(image):
        image = _convert_channels(image, channels)
    if resolution is None or image.shape[1:] == resolution:
        return image
    if image.dtype == np.uint8:
        planes = [np.asarray(resize(Image.fromarray(plane), resolution)) for plane in image]
        return np.stack(planes)
    # Pillow resamples floats in single precision, and Lanczos overshoots at edges.
    planes = [
        np.asarray(resize(Image.fromarray(plane.astype(np.float32)), resolution)) for plane in image
    ]
    return np.stack(planes).clip(-1.0, 1.0).astype(image.dtype)


def _convert_channels(image: np.ndarray, channels: int) -> np.ndarray:
    from PIL import Image

    if channels == 3:
        return np.repeat(image, 3, axis=0)
    if image.dtype == np.uint8:
        pixels = np.ascontiguousarray(image.transpose(1, 2, 0))
        return np.asarray(Image.fromarray(pixels).convert("L"))[None]
    return np.tensordot(np.array(LUMA, image.dtype), image, axes=1)[None]
