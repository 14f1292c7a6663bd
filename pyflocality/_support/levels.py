"""Noise levels of a batch, in the form in which the library passes them on."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.transforms import outside_transforms, without_derivatives

# Some images of a batch: their positions, int64 [b] on the CPU, or a slice of all.
Rows = Tensor | slice


class Levels(NamedTuple):
    """Noise levels of a batch of B images, checked.

    Numbers stay numbers; tensors are on the CPU, wherever the images are, so that looking at them
    waits for no device.

    Attributes:
        alpha: Signal coefficient: a number for all images, or float64 [B].
        sigma: Noise level: a number for all images, or float64 [B].
    """

    alpha: float | Tensor
    sigma: float | Tensor

    def of(self, rows: Rows) -> Levels:
        """The levels of some images."""
        if isinstance(self.alpha, float) and isinstance(self.sigma, float):
            return self
        return Levels(*(level[rows] if isinstance(level, Tensor) else level for level in self))

    def tensors(self, batch: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Alpha and sigma of each of the images, float64 [B] on a device."""
        alpha, sigma = (
            level.to(device)
            if isinstance(level, Tensor)
            else torch.full((), level, dtype=torch.float64, device=device).expand(batch)
            for level in self
        )
        return alpha, sigma

    def columns(self, axes: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Alpha and sigma beside values with some axes behind their batch: float64 [B, 1, ..]."""
        alpha, sigma = (level.reshape(-1, *(1,) * axes) for level in self.tensors(1, device))
        return alpha, sigma

    def pairs(self, batch: int) -> list[tuple[float, float]]:
        """Pairs (alpha, sigma) of numbers, one for each image."""
        with outside_transforms():
            alpha, sigma = (
                without_derivatives(level).tolist()
                if isinstance(level, Tensor)
                else [level] * batch
                for level in self
            )
        return list(zip(alpha, sigma, strict=True))
