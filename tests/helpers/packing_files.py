"""Folders to pack, and packed sets that are checked."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

COUNT = 23


def png(image: np.ndarray) -> bytes:
    """A PNG file of an image [C, H, W]."""
    file = io.BytesIO()
    plane = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
    Image.fromarray(plane).save(file, "PNG")
    return file.getvalue()
