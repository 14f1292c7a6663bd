"""Distances between images and how sharp they are, one number per image.

For images a and b of D values each: `mse` = sum (a - b)^2 / D, `psnr` = 10 log10(range^2 / mse),
and `r2` = 1 - sum (u - y)^2 / (D var(y)), the share of a target's variance that a prediction
explains. All are computed and returned in float64.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyflocality._support.checks import check_float_tensor, check_positive, describe


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of each image: sum (a - b)^2 / D.

    Args:
        a: Images [n, ...].
        b: Images [n, ...].

    Returns:
        Float64 [n], at least 0.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes or devices differ, or a value is NaN or infinite.
    """
    return (_values(a, "a") - _values(b, "b", a)).square().mean(dim=1)


def psnr(a: Tensor, b: Tensor, data_range: float = 2.0) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels: 10 log10(data_range^2 / mse).

    Args:
        a: Images [n, ...].
        b: Images [n, ...].
        data_range: Width of the range of the values: 2 for [-1, 1].

    Returns:
        Float64 [n]; infinite where two images are equal.

    Raises:
        TypeError: An image argument is not a floating-point tensor, or `data_range` not a number.
        ValueError: The shapes or devices differ, a value is NaN or infinite, or `data_range` is
            not positive.
    """
    data_range = check_positive(data_range, "data_range")
    # The square of the range need not be a number.
    return 20.0 * math.log10(data_range) - 10.0 * torch.log10(mse(a, b))


def r2(prediction: Tensor, target: Tensor) -> Tensor:
    """Share of the target's variance that the prediction explains, of each image.

    r2 = 1 - sum (u - y)^2 / (D var(y)) for a prediction u and a target y of D values, with the
    unbiased variance (divisor D - 1) of the target's own values: the definition behind the
    figures of Lukoianov et al. (2025). 1 is perfect; a constant prediction at the target's mean
    gives 1 / D; it has no lower bound.

    Args:
        prediction: Images u [n, ...].
        target: Images y [n, ...], at least two values each.

    Returns:
        Float64 [n]. Where a target is constant: minus infinity, or NaN for an equal prediction.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes or devices differ, a value is NaN or infinite, or an image has
            fewer than two values.
    """
    u = _values(prediction, "prediction")
    y = _values(target, "target", prediction)
    if y.shape[1] < 2:
        raise ValueError(f"`target` must have two or more values an image, got {describe(target)}")
    return 1.0 - (u - y).square().mean(dim=1) / y.var(dim=1, correction=1)


def cosine_similarity(a: Tensor, b: Tensor, mean: Tensor | None = None) -> Tensor:
    """Cosine of the angle between two images from a mean image, of each pair.

    <a - m, b - m> / (|a - m| |b - m|): 1 for images that differ from the mean in the same way,
    0 where they have nothing in common but the mean.

    Args:
        a: Images [n, ...].
        b: Images [n, ...].
        mean: Image m [...]; by default 0.

    Returns:
        Float64 [n]; 0 where one of the two is the mean itself.

    Raises:
        TypeError: An argument is not a floating-point tensor.
        ValueError: The shapes or devices differ, or a value is NaN or infinite.
    """
    one = _values(a, "a")
    other = _values(b, "b", a)
    if mean is not None:
        centre = check_float_tensor(mean, "mean")
        if centre.shape != a.shape[1:]:
            raise ValueError(f"`mean` must have shape {list(a.shape[1:])}, got {describe(mean)}")
        centre = centre.to(one).flatten()
        one, other = one - centre, other - centre
    return torch.nn.functional.cosine_similarity(one, other, dim=1, eps=0.0).nan_to_num(0.0)


def gradient_energy(images: Tensor) -> Tensor:
    """How sharp each image is: the mean square of the differences of neighbouring values.

    Of the values below one another and of those beside one another, both means together. An image
    of one row or one column has no such differences along it, which count as 0.

    Args:
        images: Images [n, C, H, W].

    Returns:
        Float64 [n], at least 0.

    Raises:
        TypeError: `images` is not a floating-point tensor.
        ValueError: Its shape is another, or a value is NaN or infinite.
    """
    images = check_float_tensor(images, "images")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"`images` must have shape [n, C, H, W] without a 0, got {describe(images)}"
        )
    values = images.double()
    steps = (values.diff(dim=axis).square().flatten(1) for axis in (-2, -1))
    means = [one.sum(1) / max(1, one.shape[1]) for one in steps]
    return means[0] + means[1]


def _values(images: Tensor, name: str, like: Tensor | None = None) -> Tensor:
    """Images as float64 rows [n, D], checked, and against the shape and device of `like`."""
    images = check_float_tensor(images, name)
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"`{name}` must have shape [n, ...] without a 0, got {describe(images)}")
    if like is not None and (images.shape, images.device) != (like.shape, like.device):
        raise ValueError(
            f"`{name}` must have the shape and device of the other images, "
            f"{describe(like)}, got {describe(images)}"
        )
    return images.to(torch.float64).flatten(start_dim=1)
