"""The order of images by their distance, in fractions."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def in_exact_order(x: Tensor, images: Tensor, alpha: float) -> list[int]:
    """Positions by |x - alpha v|^2 without rounding; the earlier first among equals."""
    noisy, factor = [Fraction(u) for u in x.flatten().tolist()], Fraction(alpha)

    def distance(image: Tensor) -> Fraction:
        row = image.flatten().tolist()
        if image.dtype == torch.uint8:
            row = [Fraction(2 * u - 255, 255) for u in row]
        gaps = (p - factor * Fraction(v) for p, v in zip(noisy, row, strict=True))
        return sum((gap * gap for gap in gaps), Fraction(0))

    distances = [distance(image) for image in images]
    return sorted(range(len(images)), key=distances.__getitem__)
