"""Images of known geometry as tensors: what `pyflocality.synthetic` and the builtin sets draw."""

from __future__ import annotations

import torch
from torch import Tensor

# Seeds the generator of a caller who passes none, so that a set is always the same.
_SEED = 0
# Images that are drawn at a time.
CHUNK = 512


def seeded(generator: torch.Generator | None) -> torch.Generator:
    """A generator, or the one of callers who have none."""
    return torch.Generator("cpu").manual_seed(_SEED) if generator is None else generator


def disk_coordinates(n: int, size: int, generator: torch.Generator) -> Tensor:
    """Column, row, radius, foreground and background of random disks, float64 [5, n]."""
    uniform = torch.rand(5, n, generator=generator, dtype=torch.float64, device="cpu")
    place = size * (0.25 + 0.5 * uniform[:2])
    radius = size * (0.1 + 0.15 * uniform[2:3])
    return torch.cat([place, radius, 2.0 * uniform[3:] - 1.0])


def disks(coordinates: Tensor, size: int) -> Tensor:
    """Images of disks with coordinates [5, n]: [n, 1, size, size] float64."""
    column, row, radius, foreground, background = coordinates[:, :, None, None]
    centres = torch.arange(size, dtype=torch.float64, device=coordinates.device) + 0.5
    distance = torch.hypot(centres[None, None, :] - column, centres[None, :, None] - row)
    share = (radius - distance + 0.5).clamp(0.0, 1.0)
    return (background + (foreground - background) * share)[:, None]


def c_alpha(n: int, size: int, alpha: float, generator: torch.Generator) -> Tensor:
    """Geometrically regular images, float32 [n, 1, size, size]: see `pyflocality.synthetic`."""
    images = torch.empty(n, 1, size, size, dtype=torch.float32, device="cpu")
    middle = torch.arange(size, dtype=torch.float64, device="cpu") + 0.5
    for start in range(0, n, CHUNK):
        part = images[start : start + CHUNK]
        contour = size * (0.5 + 0.25 * _regular((len(part), size), alpha + 0.5, generator))
        share = (contour[:, None, :] - middle[None, :, None] + 0.5).clamp(0.0, 1.0)
        above, below = (_background(len(part), size, alpha, generator) for _ in range(2))
        part[:, 0] = below + (above - below) * share
    return images


def _background(n: int, size: int, alpha: float, generator: torch.Generator) -> Tensor:
    uniform = torch.rand(n, 1, 1, generator=generator, dtype=torch.float64, device="cpu")
    return 1.2 * uniform - 0.6 + 0.4 * _regular((n, size, size), alpha + 1.0, generator)


def _regular(shape: tuple[int, ...], decay: float, generator: torch.Generator) -> Tensor:
    """Random series with amplitudes |k|^-decay and largest absolute value 1, per image."""
    axes = tuple(range(1, len(shape)))
    double = [2 * length for length in shape[1:]]
    frequencies = [
        function(length, 1 / length, dtype=torch.float64, device="cpu")
        for function, length in zip(
            [*[torch.fft.fftfreq] * (len(double) - 1), torch.fft.rfftfreq], double, strict=True
        )
    ]
    grid = torch.meshgrid(*frequencies, indexing="ij")
    squared = torch.stack([k**2 for k in grid]).sum(0)
    amplitude = torch.where(squared > 0, squared, torch.inf) ** (-0.5 * decay)
    noise = torch.randn(shape[0], *double, generator=generator, dtype=torch.float64, device="cpu")
    series = torch.fft.irfftn(torch.fft.rfftn(noise, dim=axes) * amplitude, dim=axes)
    inside = (slice(None), *(slice(length) for length in shape[1:]))
    series = series[inside]
    return series / series.abs().amax(dim=axes, keepdim=True)
