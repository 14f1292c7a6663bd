"""Conversions between what a network may predict.

That is the clean image x0 of x = alpha x0 + sigma noise, the noise, or the velocity
v = alpha noise - sigma x0 (Salimans & Ho 2022); the score of the noisy density at x is
(alpha x0 - x) / sigma^2 with x0 the posterior mean (Tweedie's formula). Each is an affine function
of the others. The images' values are not inspected: conversions run inside networks and under
transforms.
"""

from __future__ import annotations

from torch import Tensor

from pyflocality._support.checks import (
    LevelLike,
    NoiseLevel,
    as_pair,
    check_float_tensor,
    check_level,
    describe,
)


def x0_from_noise(
    x: Tensor, noise: Tensor, alpha: LevelLike, sigma: float | Tensor | None = None
) -> Tensor:
    """The clean image of a noise prediction: x0 = (x - sigma noise) / alpha.

    Args:
        x: Noisy images [B, ...].
        noise: What is predicted [B, ...].
        alpha: Signal coefficient above 0, a number or [B]; or a `NoiseLevel` in place of both
            coefficients.
        sigma: Noise coefficient, a number or [B]: at least 0 in conversions to x0, above 0 in
            those from x0.

    Returns:
        What the prediction implies [B, ...], dtype of x.

    Raises:
        TypeError: An image is not a floating-point tensor, a coefficient not a real number, or
            `sigma` is missing or given beside a level.
        ValueError: The shapes differ, or a coefficient is out of range.
    """
    alpha, sigma = _coefficients(x, noise, "noise", alpha, sigma, clean=True)
    return (x - sigma * noise) / alpha


def x0_from_v(
    x: Tensor, v: Tensor, alpha: LevelLike, sigma: float | Tensor | None = None
) -> Tensor:
    """The clean image of a velocity prediction: x0 = (alpha x - sigma v) / (alpha^2 + sigma^2).

    The denominator is 1 for variance-preserving schedules and makes the conversion right for all
    others. Arguments and errors are those of `x0_from_noise`.
    """
    alpha, sigma = _coefficients(x, v, "v", alpha, sigma, clean=True)
    return (alpha * x - sigma * v) / (alpha**2 + sigma**2)


def noise_from_x0(
    x: Tensor, x0: Tensor, alpha: LevelLike, sigma: float | Tensor | None = None
) -> Tensor:
    """The noise that a clean image implies: noise = (x - alpha x0) / sigma.

    Arguments and errors are those of `x0_from_noise`, sigma above 0.
    """
    alpha, sigma = _coefficients(x, x0, "x0", alpha, sigma)
    return (x - alpha * x0) / sigma


def v_from_x0(
    x: Tensor, x0: Tensor, alpha: LevelLike, sigma: float | Tensor | None = None
) -> Tensor:
    """The velocity that a clean image implies: v = alpha noise - sigma x0.

    With noise = (x - alpha x0) / sigma; the inverse of `x0_from_v`. Arguments and errors are
    those of `x0_from_noise`, sigma above 0.
    """
    alpha, sigma = _coefficients(x, x0, "x0", alpha, sigma)
    return alpha * ((x - alpha * x0) / sigma) - sigma * x0


def score_from_x0(
    x: Tensor, x0: Tensor, alpha: LevelLike, sigma: float | Tensor | None = None
) -> Tensor:
    """The score that a posterior mean implies: (alpha x0 - x) / sigma^2 (Tweedie's formula).

    With x0 = E[x0 | x] it is the gradient with respect to x of the log-density of the noisy
    images. Arguments and errors are those of `x0_from_noise`, sigma above 0.
    """
    alpha, sigma = _coefficients(x, x0, "x0", alpha, sigma)
    # Two divisions: the square of a small sigma leaves the range of half precision.
    return (alpha * x0 - x) / sigma / sigma


def _coefficients(
    x: Tensor,
    prediction: Tensor,
    name: str,
    alpha: LevelLike,
    sigma: float | Tensor | None,
    *,
    clean: bool = False,
) -> tuple[Tensor, Tensor]:
    """Check a conversion; (alpha, sigma) in x's dtype, shaped [B, 1, ..] to multiply images."""
    for image, label in ((x, "x"), (prediction, name)):
        check_float_tensor(image, label, finite=False)
    if prediction.device != x.device:
        raise ValueError(f"`{name}` must be on {x.device} like `x`, got {describe(prediction)}")
    if x.ndim == 0 or prediction.shape != x.shape:
        raise ValueError(
            f"`{name}` must have the shape [B, ...] of `x`, {list(x.shape)}, "
            f"got {describe(prediction)}"
        )
    batch = x.shape[0]
    column = (batch,) + (1,) * (x.ndim - 1)
    sigma, alpha = _pair(alpha, sigma)
    alpha = check_level(alpha, batch, x.device, "alpha", allow_zero=False)
    sigma = check_level(sigma, batch, x.device, "sigma", allow_zero=clean)
    return alpha.to(x.dtype).reshape(column), sigma.to(x.dtype).reshape(column)


def _pair(alpha: LevelLike, sigma: float | Tensor | None) -> tuple[float | Tensor, float | Tensor]:
    """(sigma, alpha) of a call that may have a level whole in place of alpha."""
    if isinstance(alpha, NoiseLevel) and sigma is None:
        return as_pair(alpha)
    if isinstance(alpha, NoiseLevel) or sigma is None:
        raise TypeError(
            "`sigma` must be given beside a number `alpha`, and left out beside a NoiseLevel, got "
            f"{describe(sigma)} beside {describe(alpha)}"
        )
    return as_pair(sigma, alpha)
