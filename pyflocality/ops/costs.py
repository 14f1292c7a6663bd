"""What an operation costs: the sizes that formulas are about, and what they answer.

One rule for all formulas: an addition, a multiplication and an exponential count as one each, a sum
of n terms as n - 1, and a sum over a square window as 4, since a running sum takes in one value and
lets go of another along either axis. Sums over all images count one for each image. What is done
once for an image, a noisy image or a pair of them is left out beside what is done for their values,
and so is what only keeps numbers in range: the smallest distance and its subtraction.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Size:
    """What an operation runs on: N images [C, H, W], B noisy images.

    Attributes:
        images: N.
        shape: C, H and W.
        batch: B.
        directions: Tangents or cotangents K of a derivative.
        window: Side of the window, where there is one.
        terms: Inputs that are added up for all outputs of a pair of images together, where
            outputs have inputs of their own.
        image_bytes: Bytes of a stored value.
        value_images: Value images R of each training image, float32.
        with_image: Whether the image is answered beside its value images, too.
    """

    images: int
    shape: tuple[int, int, int]
    batch: int
    directions: int = 0
    window: int = 1
    terms: float = 0
    image_bytes: int = 1
    value_images: int = 0
    with_image: bool = False

    @property
    def values(self) -> int:
        """Values D of an image."""
        return math.prod(self.shape)

    @property
    def answered(self) -> int:
        """Images A that are answered for a noisy one: the image, its value images, or both."""
        return self.value_images + self.with_image if self.value_images else 1

    @property
    def answers(self) -> int:
        """Values that are answered for a noisy image, A D."""
        return self.answered * self.values

    @property
    def pixels(self) -> int:
        """Pixels of an image, H W."""
        return self.shape[1] * self.shape[2]


@dataclass(frozen=True)
class Work:
    """What one run of an operation takes.

    Attributes:
        flops: Operations.
        bytes: Least memory traffic: the images as often as they are scanned, everything else that
            is given or answered once.
        scans: How often the images are read.
    """

    flops: float
    bytes: int
    scans: int
