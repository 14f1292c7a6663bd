r"""Synthetic images whose geometry is known.

Disks form a manifold of five dimensions: position (two), radius, foreground and background.
A C^alpha image is made of two regular functions on either side of a regular contour; the best
achievable denoising error of such images falls with the noise level at a known rate,
:math:`\mathrm{MSE} \sim \sigma^{2 \alpha / (\alpha + 1)}`.

Values are float32 in [-1, 1]: rounding them to 8 bits would leave the manifold.

`inject_pattern` adds to a real set what is known: one pattern in every image.

References:
    Generalization in diffusion models arises from geometry-adaptive harmonic representations,
    Kadkhodaie, Guth, Simoncelli and Mallat, ICLR 2024 (https://arxiv.org/abs/2310.02557).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from pyflocality._support.checks import (
    check_count,
    check_flag,
    check_float_tensor,
    check_generator,
    check_instance,
    check_real,
    check_size,
    check_within_memory,
    describe,
)
from pyflocality.autograd.forward_mode import derivative_along
from pyflocality.data import TrainingSet
from pyflocality.sources import drawn
from pyflocality.storage.reader import values_to_bytes


@dataclass(frozen=True)
class DiskParameters:
    """Coordinates of n disks on their manifold.

    Attributes:
        x: Column of the centre, in pixels from the left border of the image, [n].
        y: Row of the centre, in pixels from its upper border, [n].
        radius: Radius in pixels, [n].
        foreground: Value inside, in [-1, 1], [n].
        background: Value outside, in [-1, 1], [n].
    """

    x: Tensor
    y: Tensor
    radius: Tensor
    foreground: Tensor
    background: Tensor

    def stacked(self) -> Tensor:
        """All coordinates in that order, [5, n]."""
        return torch.stack([getattr(self, field.name) for field in fields(self)])


def draw_disks(n: int, size: int, generator: torch.Generator) -> DiskParameters:
    """Draw disks that lie inside an image of `size` x `size` pixels.

    The radius is uniform in [size / 10, size / 4], each coordinate of the centre in
    [size / 4, 3 size / 4] and both values in [-1, 1], all independent, float64.
    """
    n, size = _check_sizes(n, size)
    check_instance(generator, "generator", torch.Generator)
    return DiskParameters(*drawn.disk_coordinates(n, size, generator))


def render_disks(parameters: DiskParameters, size: int) -> Tensor:
    """Images of disks, differentiable in every parameter: [n, 1, size, size] float64.

    A pixel whose centre lies r from the centre of the disk is covered to the share
    clip(radius - r + 1/2, 0, 1), which is the exact share for a straight edge along the grid.
    """
    parameters = _check_parameters(parameters)
    _, size = _check_sizes(len(parameters.x), size)
    return drawn.disks(parameters.stacked(), size)


def disk_tangents(parameters: DiskParameters, size: int) -> Tensor:
    """Tangent vectors of the manifold of disks: derivatives of its images.

    Args:
        parameters: Coordinates of n disks.
        size: Height and width in pixels.

    Returns:
        Derivatives with respect to x, y, radius, foreground and background, float64
        [n, 5, 1, size, size]. They are linearly independent where foreground and background
        differ and the disk lies inside the image.
    """
    parameters = _check_parameters(parameters)
    _, size = _check_sizes(len(parameters.x), size)
    coordinates = parameters.stacked()
    rows = []
    for row in range(len(coordinates)):
        direction = torch.zeros_like(coordinates)
        direction[row] = 1.0
        rows.append(
            derivative_along(lambda values: drawn.disks(values, size), coordinates, direction)[1]
        )
    return torch.stack(rows, 1)


def disks(
    n: int,
    size: int = 32,
    *,
    centred: bool = False,
    generator: torch.Generator | None = None,
) -> TrainingSet:
    """Antialiased disks, one an image, with everything about them drawn at random.

    Args:
        n: Number of images.
        size: Height and width in pixels.
        centred: Put every disk in the middle of its image. Pixels that always lie on the same
            side of the edge then vary together however far apart they are, so that what a model
            of them listens to is not local.
        generator: Source of randomness, on the CPU; None always gives the same images.

    Returns:
        A set of float32 images [n, 1, size, size] in [-1, 1]. `draw_disks` with the same
        generator state gives the parameters of the images, and `render_disks` the images.

    Raises:
        ValueError: `n` or `size` is not positive.
    """
    n, size = _check_sizes(n, size)
    centred = check_flag(centred, "centred")
    check_generator(generator)
    parameters = draw_disks(n, size, drawn.seeded(generator))
    if centred:
        middle = torch.full_like(parameters.x, size / 2)
        parameters = replace(parameters, x=middle, y=middle)
    return TrainingSet._of_valid(render_disks(parameters, size).float(), "disks")


def c_alpha(
    n: int, size: int = 32, alpha: float = 2.0, *, generator: torch.Generator | None = None
) -> TrainingSet:
    r"""Geometrically regular images: two C^alpha backgrounds on either side of a C^alpha contour.

    Both backgrounds are random Fourier series whose amplitudes fall as
    :math:`|k|^{-(\alpha + 1)}`, the contour :math:`y = g(x)` crosses the image from left to
    right and its amplitudes fall as :math:`k^{-(\alpha + 1/2)}`. The series have twice the
    period of the image, which is therefore not periodic. A background is a mean uniform in
    [-0.6, 0.6] plus the series scaled to a largest value of 0.4; the contour stays in the middle
    half of the image.

    Args:
        n: Number of images.
        size: Height and width in pixels.
        alpha: Regularity, positive.
        generator: Source of randomness, on the CPU; None always gives the same images.

    Returns:
        A set of float32 images [n, 1, size, size] in [-1, 1].

    Raises:
        ValueError: `n`, `size` or `alpha` is not positive.
    """
    n, size = _check_sizes(n, size)
    # Beyond it every series is its first wave, to the last digit of float64.
    alpha = check_real(alpha, "alpha", low=0.0, high=100.0, above=True)
    check_generator(generator)
    images = drawn.c_alpha(n, size, alpha, drawn.seeded(generator))
    return TrainingSet._of_valid(images, "c_alpha")


def inject_pattern(
    data: TrainingSet,
    pattern: Tensor,
    gamma: float,
    *,
    generator: torch.Generator | None = None,
) -> TrainingSet:
    r"""Blend one pattern into every image of a set, in a random colour.

    .. math:: v_i' [c] = (1 - \gamma) v_i[c] + \gamma \, a_{i,c} W, \qquad
        a_{i,c} \sim U(-1, 1)

    so the data's variance along the pattern grows by gamma^2 |W|^2 / 3 in every channel. 8-bit
    images are rounded to 8 bits again.

    Args:
        data: The set; it is not changed.
        pattern: W with values in [-1, 1], floating point, [H, W].
        gamma: Weight of the pattern, in (0, 1].
        generator: Source of randomness, on the CPU; None always gives the same colours.

    Returns:
        A set of the same size, dtype and labels.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The pattern has another shape or range, or gamma is out of range.

    References:
        Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from
        data statistics, 2025 (figure 4).
    """
    if not isinstance(data, TrainingSet):
        raise TypeError(f"`data` must be a TrainingSet, got {describe(data)}")
    if data.augmentation is not None:
        raise ValueError("`data` must not be augmented yet: inject the pattern first")
    # Values are computed in the precision in which they are stored.
    kind = torch.promote_types(
        data.dtype if data.dtype.is_floating_point else torch.float32, torch.float32
    )
    pattern = check_float_tensor(pattern, "pattern").detach().to(kind)
    channels, height, width = data.image_shape
    if pattern.shape != (height, width) or pattern.abs().max() > 1:
        raise ValueError(
            f"`pattern` must have shape [{height}, {width}] and values in [-1, 1], got "
            f"{describe(pattern)}"
        )
    gamma = check_real(gamma, "gamma", low=0.0, high=1.0, above=True)
    check_generator(generator)
    source = drawn.seeded(generator)
    images = torch.empty_like(data.images)
    for start in range(0, len(data), drawn.CHUNK):
        part = images[start : start + drawn.CHUNK]
        colour = (
            2.0 * torch.rand(len(part), channels, 1, 1, generator=source, dtype=torch.float32) - 1.0
        )
        values = data.values(start, start + len(part), dtype=kind)
        mixed = (1 - gamma) * values + gamma * (colour * pattern).to(values.device)
        if images.dtype == torch.uint8:
            mixed = values_to_bytes(mixed).round()
        part.copy_(mixed)
    return TrainingSet(
        images, data.labels, name=f"{data.name} with a pattern", label_names=data.label_names
    )


def _check_sizes(n: object, size: object) -> tuple[int, int]:
    """A number of images and their side, whose values fit into memory."""
    n, size = check_count(n, "n"), check_size(size, "size")
    check_within_memory(size * size, 8, "size")
    return check_within_memory(n, 8 * size * size, "n"), size


def _check_parameters(parameters: DiskParameters) -> DiskParameters:
    """Coordinates of disks: floating-point tensors [n], one n for all."""
    check_instance(parameters, "parameters", DiskParameters)
    count = None
    for field in fields(parameters):
        value = check_float_tensor(getattr(parameters, field.name), f"parameters.{field.name}")
        count = value.shape if count is None else count
        if value.ndim != 1 or value.shape != count:
            raise ValueError(
                f"`parameters.{field.name}` must have shape [n] like the others, got "
                f"{describe(value)}"
            )
    return parameters
