r"""Sensitivity fields: how much an output pixel listens to every input.

The field of an output value m at a noisy image x is the absolute row of the Jacobian,
:math:`|\partial \hat x_0[m] / \partial x|`. For the Wiener filter the rows are those of
:math:`\alpha S (\alpha^2 S + \sigma^2 I)^{-1}`: it keeps the principal components whose
signal-to-noise ratio :math:`\alpha^2 \lambda / \sigma^2` is high and drops the others, and its
fields are close to those of trained networks.

References:
    Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from data
    statistics, 2025 (figures 1 to 4).
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._support.checks import (
    LevelLike,
    NoiseLevel,
    Pixel,
    as_pair,
    check_count,
    check_flag,
    check_float_tensor,
    check_level,
    check_one_level,
    check_pixel,
    check_positive,
    check_rounds,
    check_sequence,
    check_tensor,
    describe,
)
from pyflocality._support.progress import progress_bar
from pyflocality.analysis._rows import jacobian_row
from pyflocality.denoisers.base import Denoiser, check_denoiser
from pyflocality.moments import Basis, Moments
from pyflocality.noise import DDPMSchedule, NoiseSchedule
from pyflocality.sampling import sample


def sensitivity(
    denoiser: Denoiser,
    x: Tensor,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    pixel: Pixel,
) -> Tensor:
    r"""The field :math:`|\partial \hat x_0[c, h, w] / \partial x|` of one output value.

    One product with the transposed Jacobian; where an output has a neighbourhood of its own, a
    scan of that neighbourhood alone.

    Args:
        denoiser: Any denoiser of this library.
        x: Noisy images, [B, C, H, W].
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        pixel: Channel, row and column (c, h, w) of the output value; negative ones count from
            the end.

    Returns:
        Fields, not negative, dtype of x, [B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape, device or range.
    """
    check_denoiser(denoiser)
    pixel = check_pixel(pixel, denoiser.image_shape)
    return jacobian_row(denoiser, x, pixel, sigma, alpha).abs()


@dataclass(frozen=True, eq=False)
class SensitivityRun:
    """Mean sensitivity fields along a sampling run.

    Attributes:
        fields: Mean over the samples of the absolute Jacobian rows, [steps, P, C, H, W].
        timesteps: Time of each step, [steps].
        alpha: Signal coefficient of each step, [steps].
        sigma: Noise level of each step, [steps].
        pixels: The P output values, (c, h, w) each.
    """

    fields: Tensor
    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    pixels: tuple[Pixel, ...]

    def scaled(self) -> Tensor:
        """Every field scaled to [0, 1] by its own smallest and largest value."""
        low = self.fields.amin((-3, -2, -1), keepdim=True)
        span = self.fields.amax((-3, -2, -1), keepdim=True) - low
        return (self.fields - low) / torch.where(span > 0, span, 1.0)


def sensitivity_along_run(
    denoiser: Denoiser,
    pixels: Pixel | Sequence[Pixel],
    *,
    n: int | None = None,
    steps: int = 1000,
    every: int = 1,
    schedule: NoiseSchedule | None = None,
    x_T: Tensor | None = None,  # noqa: N803
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> SensitivityRun:
    """Mean sensitivity fields at the states of a DDIM run (figure 2 of the paper).

    Args:
        denoiser: Any denoiser of this library.
        pixels: One output value (c, h, w), or several.
        n: Number of samples whose fields are averaged: by default those of `x_T`, or 32.
        steps: Number of steps of the run.
        every: Fields are taken at each `every`-th step, the first included.
        schedule: Noise schedule; by default `DDPMSchedule()`.
        x_T: Starting states [n, C, H, W]; by default drawn.
        generator: Source of randomness, as for `sample`.
        progress: Show a progress bar.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape or range.
    """
    check_denoiser(denoiser)
    chosen = _check_pixels(pixels, denoiser.image_shape)
    every = check_count(every, "every")
    steps = check_rounds(steps, "steps")
    progress = check_flag(progress, "progress")
    schedule = DDPMSchedule() if schedule is None else schedule
    out = sample(
        denoiser,
        32 if n is None and x_T is None else n,
        schedule=schedule,
        steps=steps,
        x_T=x_T,
        generator=generator,
        progress=progress,
    )
    visited = range(0, steps, every)
    times = out.timesteps[list(visited)]
    alpha, sigma = schedule(times)
    fields = out.x_t.new_zeros(len(visited), len(chosen), *denoiser.image_shape)
    visits = list(enumerate(visited))
    for row, step in progress_bar(visits, description="sensitivity", enabled=progress):
        level = NoiseLevel(float(alpha[row]), float(sigma[row]))
        for column, pixel in enumerate(chosen):
            rows = sensitivity(denoiser, out.x_t[step], level, pixel=pixel)
            fields[row, column] = rows.mean(0)
    return SensitivityRun(fields, times, alpha, sigma, tuple(chosen))


def high_snr_projection(
    moments: Moments | Basis,
    sigma: float | NoiseLevel,
    alpha: float = 1.0,
    *,
    pixel: Pixel,
    ratio: float = 1.0,
) -> Tensor:
    r"""Absolute row of the projection on the principal components of high signal-to-noise ratio.

    .. math:: P = \sum_{k : \alpha^2 \lambda_k > c \, \sigma^2} u_k u_k^\top

    is what the Wiener filter tends to where its shrinkage factors are nearly 0 or 1.

    Args:
        moments: Moments or components of the training set.
        sigma: Noise level, positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.
        pixel: Output value (c, h, w).
        ratio: The smallest ratio c that counts as high, positive.

    Returns:
        Float64 [C, H, W].

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
    """
    check_moments(moments)
    shape = tuple(moments.image_shape)
    row = _flat(check_pixel(pixel, shape), shape)
    ratio = check_positive(ratio, "ratio")
    noise, signal = as_pair(sigma, alpha)
    noise = check_one_level(noise, "sigma", allow_zero=False)
    noise /= check_one_level(signal, "alpha", allow_zero=False)
    whole = moments.basis() if isinstance(moments, Moments) else moments
    # As a ratio: the squares of large levels leave the range of float64.
    basis = whole.vectors[:, : int((whole.values > ratio * noise * noise).sum())]
    return (basis @ basis[row]).abs().reshape(shape)


def pattern_variance(moments: Moments | Basis, pattern: Tensor) -> float:
    r"""Variance of the data along a pattern, :math:`\lambda_W = W^\top S W / |W|^2`.

    Args:
        moments: Moments or components of the training set.
        pattern: W, floating point, [C, H, W], not zero.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: The pattern has another shape or is zero.
    """
    check_moments(moments)
    direction = check_float_tensor(pattern, "pattern").detach().double().cpu()
    if tuple(direction.shape) != tuple(moments.image_shape) or not direction.any():
        raise ValueError(
            f"`pattern` must be a non-zero tensor of shape {list(moments.image_shape)}, got "
            f"{describe(pattern)}"
        )
    # In two steps: the squares of large values leave the range of float64.
    direction = direction.flatten() / direction.abs().max()
    direction = direction / direction.norm()
    if isinstance(moments, Moments):
        return float(direction @ (moments.covariance.cpu() @ direction))
    return float((moments.vectors.cpu().T @ direction).square() @ moments.values.cpu())


def snr_ruler(
    moments: Moments | Basis, pattern: Tensor, sigma: LevelLike, alpha: float | Tensor = 1.0
) -> Tensor:
    r"""Signal-to-noise ratio :math:`\alpha^2 \lambda_W / \sigma^2` of a pattern, float64 [L].

    The paper's figure 4 marks the levels where it exceeds 0.1 as those where the pattern shows
    in the sensitivity fields.

    Args:
        moments: Moments or components of the training set.
        pattern: W, [C, H, W].
        sigma: Noise levels, a number or [L], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficients, a number or [L], positive.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument has the wrong shape or range.
    """
    check_moments(moments)
    sigma, alpha = as_pair(sigma, alpha)
    levels = 1
    for name, level in (("sigma", sigma), ("alpha", alpha)):
        if isinstance(level, Tensor) and check_tensor(level, name).ndim:
            levels = max(levels, len(level))
    device = torch.device("cpu")
    sigma = check_level(sigma, levels, device, "sigma", allow_zero=False)
    alpha = check_level(alpha, levels, device, "alpha", allow_zero=False)
    return pattern_variance(moments, pattern) * (alpha / sigma) ** 2


def check_moments(moments: object) -> None:
    """Moments or components of a training set."""
    if not isinstance(moments, (Moments, Basis)):
        raise TypeError(f"`moments` must be Moments or a Basis, got {describe(moments)}")


def _check_pixels(pixels: object, image_shape: Sequence[int]) -> list[Pixel]:
    """One output value or several, at least one."""
    chosen = check_sequence(pixels, "pixels", "one output value (c, h, w) or several")
    if len(chosen) == 0:
        raise ValueError("`pixels` must hold at least one output value (c, h, w), got none")
    several = [chosen] if any(map(_is_whole, chosen)) else chosen
    return [check_pixel(pixel, image_shape, "pixels") for pixel in several]


def _is_whole(number: object) -> bool:
    return isinstance(number, numbers.Integral) and not isinstance(number, bool)


def _flat(pixel: Pixel, image_shape: tuple[int, ...]) -> int:
    _, height, width = image_shape
    return (pixel[0] * height + pixel[1]) * width + pixel[2]
