r"""Orthonormal wavelet pyramids of images, with the filters of PyWavelets.

One level splits images into a low-pass image and three bands of details, each of half the sides:
along an axis of even length N, with a filter f of even length L,

.. math::
    c[k] = \sum_{j=0}^{L-1} f[j] \, x[(2 k + L / 2 - j) \bmod N],

first with the low-pass and the high-pass filter along rows and columns. That is PyWavelets' mode
"periodization" (periodic borders), coefficient for coefficient. The transform is orthonormal:
white noise stays white with the same standard deviation, distances stay what they are, and the
inverse is the transpose.

A pyramid splits the low-pass image again and again. A constant image of value v has the value
2^j v in the low-pass image of level j.

References:
    Mallat, A theory for multiresolution signal decomposition: the wavelet representation, 1989.

    Daubechies, Orthonormal bases of compactly supported wavelets, 1988.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyflocality._support.checks import check_count, check_float_tensor, check_sequence, describe

# Shifted copies of a filter must be orthogonal to this accuracy; some named "orthogonal" are not.
_ORTHONORMAL = 1e-6


class Filters(NamedTuple):
    """The analysis filters of an orthogonal wavelet, both of the same even length.

    Attributes:
        low: Low-pass filter.
        high: High-pass filter.
    """

    low: tuple[float, ...]
    high: tuple[float, ...]


class Pyramid(NamedTuple):
    """A wavelet pyramid of images [B, C, H, W].

    Attributes:
        low: The low-pass image of the coarsest level J, [B, C, H / 2^J, W / 2^J].
        details: Bands of each level j = 1 .. J, the finest first, [B, 3 C, H / 2^j, W / 2^j]: C
            channels that are high-pass down the columns (horizontal edges), then C along the rows
            (vertical edges), then C along both.
    """

    low: Tensor
    details: list[Tensor]


def filters(wavelet: str) -> Filters:
    """The filters of an orthogonal wavelet.

    Args:
        wavelet: "haar", which needs nothing, or the name of another orthogonal wavelet of
            PyWavelets, such as "db2", "sym4" or "coif1".

    Raises:
        TypeError: `wavelet` is not a string.
        ValueError: There is no such wavelet, or it is not orthogonal.
        ImportError: PyWavelets is needed and not installed.
    """
    if not isinstance(wavelet, str):
        raise TypeError(f"`wavelet` must be the name of a wavelet, got {describe(wavelet)}")
    return _filters(str(wavelet))


@functools.lru_cache(maxsize=32)
def _filters(wavelet: str) -> Filters:
    if wavelet == "haar":
        root = 0.5**0.5
        return Filters((root, root), (-root, root))
    try:
        import pywt
    except ImportError as error:
        raise ImportError(
            f"the wavelet {wavelet!r} comes with PyWavelets, which is not installed: "
            "pip install 'pyflocality[wavelets]'; 'haar' needs nothing"
        ) from error
    try:
        result = pywt.Wavelet(wavelet)
    except (ValueError, TypeError) as error:
        # A TypeError where the name is empty.
        raise ValueError(
            f"`wavelet` must be one of pywt.wavelist(kind='discrete'), got {describe(wavelet)}"
        ) from error
    if not result.orthogonal or _defect(result.dec_lo) > _ORTHONORMAL:
        raise ValueError(f"`wavelet` must be orthogonal, got {wavelet!r}")
    return Filters(tuple(result.dec_lo), tuple(result.dec_hi))


def analyse(images: Tensor, wavelet: str = "haar") -> tuple[Tensor, Tensor]:
    """One level of the transform.

    Args:
        images: Images with even sides, floating point, [B, C, H, W].
        wavelet: Name of the wavelet, as `filters` takes it.

    Returns:
        The low-pass images [B, C, H / 2, W / 2] and the details [B, 3 C, H / 2, W / 2], ordered
        as in `Pyramid`.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: A side is odd, or there is no such wavelet.
    """
    chosen = filters(wavelet)
    check_sides(_check_images(images, "images").shape, 1, "images")
    rows = [_filtered(images, -2, f) for f in chosen]
    (low, vertical), (horizontal, diagonal) = ([_filtered(r, -1, f) for f in chosen] for r in rows)
    return low, torch.cat([horizontal, vertical, diagonal], 1)


def synthesise(low: Tensor, details: Tensor, wavelet: str = "haar") -> Tensor:
    """The inverse of `analyse`, which is its transpose.

    Args:
        low: Low-pass images, floating point, [B, C, h, w].
        details: Details, [B, 3 C, h, w].
        wavelet: Name of the wavelet, as `filters` takes it.

    Returns:
        Images [B, C, 2 h, 2 w].

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes do not fit, or there is no such wavelet.
    """
    chosen = filters(wavelet)
    batch, channels, *sides = _check_images(low, "low").shape
    if _check_images(details, "details").shape != (batch, 3 * channels, *sides):
        expected = [batch, 3 * channels, *sides]
        raise ValueError(f"`details` must have shape {expected}, got {describe(details)}")
    horizontal, vertical, diagonal = details.split(channels, 1)
    rows = [
        _spread(smooth, -1, chosen.low) + _spread(rough, -1, chosen.high)
        for smooth, rough in ((low, vertical), (horizontal, diagonal))
    ]
    return _spread(rows[0], -2, chosen.low) + _spread(rows[1], -2, chosen.high)


def decompose(images: Tensor, levels: int, wavelet: str = "haar") -> Pyramid:
    """The pyramid of images.

    Args:
        images: Images whose sides are divisible by 2^levels, floating point, [B, C, H, W].
        levels: Number of levels J, 0 or more.
        wavelet: Name of the wavelet, as `filters` takes it.

    Raises:
        TypeError: `images` is not a floating-point tensor, or `levels` no whole number.
        ValueError: A side is not divisible, `levels` is negative, or there is no such wavelet.
    """
    filters(wavelet)
    levels = check_count(levels, "levels", minimum=0)
    check_sides(_check_images(images, "images").shape, levels, "images")
    low, details = images, []
    for _ in range(levels):
        low, bands = analyse(low, wavelet)
        details.append(bands)
    return Pyramid(low, details)


def reconstruct(low: Tensor, details: Sequence[Tensor], wavelet: str = "haar") -> Tensor:
    """The images of a pyramid: the inverse of `decompose`.

    Args:
        low: Low-pass images of the coarsest level, [B, C, h, w].
        details: Details of each level, the finest first.
        wavelet: Name of the wavelet, as `filters` takes it.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes do not fit, or there is no such wavelet.
    """
    for bands in reversed(check_sequence(details, "details", "a sequence of tensors")):
        low = synthesise(low, bands, wavelet)
    return low


def check_sides(shape: Sequence[int], levels: int, name: str) -> None:
    """Refuse images whose sides cannot be halved that many times.

    Raises:
        TypeError: `shape` is no sequence, or `levels` no whole number.
        ValueError: A side cannot be halved so often, or `levels` is negative.
    """
    if len(check_sequence(shape, "shape")) < 2:
        raise ValueError(f"`shape` must have two sizes or more, got {describe(shape)}")
    height, width = (check_count(side, name, minimum=0) for side in shape[-2:])
    levels = check_count(levels, "levels", minimum=0)
    # No power is computed before it is known to be small: sides have fewer than 64 bits.
    if levels >= 63:
        raise ValueError(f"`levels` must be at most 62, got {levels}")
    if height % 2**levels or width % 2**levels:
        raise ValueError(
            f"`{name}` must have sides divisible by {2**levels} for {levels} `levels`, got "
            f"{height}x{width}"
        )


def _check_images(images: object, name: str) -> Tensor:
    given = check_float_tensor(images, name, finite=False)
    if given.ndim != 4:
        raise ValueError(f"`{name}` must have shape [B, C, H, W], got {describe(given)}")
    return given


def _defect(f: Sequence[float]) -> float:
    """How far the copies of a filter, shifted by even numbers, are from orthonormal."""
    products = [
        sum(a * b for a, b in zip(f, f[shift:], strict=False)) for shift in range(0, len(f), 2)
    ]
    return max(abs(products[0] - 1.0), *(abs(p) for p in products[1:]), 0.0)


def _taps(f: Sequence[float]) -> list[tuple[float, int, int]]:
    """Coefficient, parity p and shift m of every tap, which reads x[2 (k + m) + p]."""
    places = [len(f) // 2 - j for j in range(len(f))]
    return [(tap, place % 2, place // 2) for tap, place in zip(f, places, strict=True)]


def _filtered(x: Tensor, dim: int, f: Sequence[float]) -> Tensor:
    """The coefficients of one filter along an axis."""
    phases = [x[..., p::2, :] if dim == -2 else x[..., p::2] for p in (0, 1)]
    terms = [tap * _rolled(phases[p], -m, dim) for tap, p, m in _taps(f)]
    return sum(terms[1:], start=terms[0])


def _spread(c: Tensor, dim: int, f: Sequence[float]) -> Tensor:
    """The transpose of `_filtered`."""
    phases = []
    for parity in (0, 1):
        terms = [tap * _rolled(c, m, dim) for tap, p, m in _taps(f) if p == parity]
        phases.append(sum(terms[1:], start=terms[0]))
    return torch.stack(phases, dim).flatten(dim - 1, dim)


def _rolled(x: Tensor, shift: int, dim: int) -> Tensor:
    return x if shift == 0 else x.roll(shift, dim)
