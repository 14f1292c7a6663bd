r"""Classical shrinkage: denoisers that damp coefficients in a fixed basis.

With y = x / alpha, of noise level s = sigma / alpha, and an orthonormal basis e_k,

.. math:: \hat x_0 = \sum_k \lambda_k \, \langle y, e_k \rangle \, e_k .

The factors are fixed for a Fourier basis (a linear denoiser) and depend on the coefficients for a
wavelet basis.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflocality._support.budget import images_per_chunk
from pyflocality._support.checks import (
    check_choice,
    check_count,
    check_image_shape,
    check_positive,
    describe,
)
from pyflocality._support.levels import Levels
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, device_after
from pyflocality.moments import Basis, Moments
from pyflocality.storage.reader import Reader
from pyflocality.wavelets import check_sides, decompose, filters, reconstruct

_RULES = ("hard", "soft", "bayes")
_BLOCK_BYTES = 64 * 2**20


class FourierWienerDenoiser(Denoiser):
    r"""Shrinkage by the power spectrum: the best linear denoiser in a Fourier basis.

    .. math::
        \lambda_k = \frac{\alpha^2 P_k}{\alpha^2 P_k + \sigma^2}, \qquad
        P_k = \frac1N \sum_i \langle v_i, e_k \rangle^2

    with :math:`e_k` the orthonormal Fourier basis of each channel and, as in the talk and the
    paper, the second moments about 0 (mid-grey), not about the mean image: the denoiser is linear,
    translates with the image, and falls to 0 as the noise grows. Values may leave [-1, 1]. torch
    takes the Fourier transforms: an image's bits may depend on the others of its batch and on the
    number of threads, by rounding alone.

    Where the power falls as |k|^-p with p > 2, as in images of edges with p = 3, the error falls
    as :math:`\sigma^{2 (1 - 2 / p)}` with the noise.

    Args:
        data: A training set, of which nothing but the spectrum is kept, or `Moments` or `Basis`
            (the power of components that it leaves out is not counted).

    Attributes:
        spectrum: Mean power P_k, float64 [C, H, W], frequencies in the order of `torch.fft.fft2`.

    Raises:
        TypeError: `data` is none of them.

    References:
        Wiener, Extrapolation, interpolation and smoothing of stationary time series, 1949.

        Kadkhodaie, Guth, Simoncelli and Mallat, Generalization in diffusion models arises from
        geometry-adaptive harmonic representations, 2024.
    """

    spectrum: Tensor

    symmetric_jacobian = True

    def __init__(self, data: TrainingSet | Moments | Basis) -> None:
        if isinstance(data, TrainingSet):
            spectrum = _power_of_images(data)
        elif isinstance(data, Moments):
            spectrum = _power_of_moments(data)
        elif isinstance(data, Basis):
            spectrum = _power_of_basis(data)
        else:
            raise TypeError(
                f"`data` must be a TrainingSet, Moments or a Basis, got {describe(data)}"
            )
        super().__init__(data.image_shape)
        self.register_buffer("spectrum", spectrum)

    @property
    def device(self) -> torch.device:
        """Device of the spectrum, where inputs must be."""
        return self.spectrum.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> FourierWienerDenoiser:
        # Follows moves between devices; stays in float64 whatever dtype the module is cast to.
        device = device_after(fn, self.device)
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        return self._filtered(x, levels)

    def _filtered(self, values: Tensor, levels: Levels) -> Tensor:
        """The filter applied to values [..., B, C, H, W]."""
        height, width = self.image_shape[1:]
        compute = torch.float64 if values.dtype == torch.float64 else torch.float32
        alpha, sigma = levels.columns(3, values.device)
        # The values are real: half of the frequencies tell the rest.
        power = self.spectrum[..., : width // 2 + 1]
        total = torch.where(power > 0, alpha.square() * power + sigma.square(), 1.0)
        gain = (alpha * power / total).to(compute)
        coefficients = torch.fft.rfft2(values.to(compute))
        return torch.fft.irfft2(coefficients * gain, s=(height, width)).to(values.dtype)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        return self._filtered(x, levels), self._filtered(tangents, levels)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        # The filter is symmetric.
        return self._filtered(cotangents, levels)


class WaveletShrinkageDenoiser(Denoiser):
    r"""Thresholding of wavelet coefficients: shrinkage that adapts to the image.

    Of y = x / alpha with noise s = sigma / alpha, the coefficients c of the details become

    .. math::
        \text{hard:} \; c \, [\, |c| > a s \,], \qquad
        \text{soft:} \; \operatorname{sign}(c) \max(|c| - a s, 0), \qquad
        \text{bayes:} \; \operatorname{sign}(c) \max(|c| - s^2 / \sigma_c, 0),

    and the low-pass image is left as it is. The default threshold
    :math:`a = \sqrt{2 \ln (H W)}` is the universal one, above which pure noise has no coefficient
    with a probability that goes to 1. "bayes" (BayesShrink) has a threshold for each band, channel
    and image, from :math:`\sigma_c^2 = \max(\overline{c^2} - s^2, 0)`, the variance of the clean
    coefficients as the noisy ones tell it; where it is 0 the whole band is set to 0.

    It needs no training set. Values may leave [-1, 1].

    Args:
        image_shape: Shape (C, H, W) of the images, sides divisible by 2^levels.
        levels: Levels of the pyramid, at least 1.
        wavelet: "haar", or another orthogonal wavelet of PyWavelets.
        rule: "hard", "soft" or "bayes".
        threshold: Threshold a of "hard" and "soft", in units of the noise, positive; None is the
            universal one.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a threshold is given for "bayes".
        ImportError: The wavelet needs PyWavelets.

    References:
        Donoho and Johnstone, Ideal spatial adaptation by wavelet shrinkage, 1994 (hard, soft and
        the universal threshold).

        Chang, Yu and Vetterli, Adaptive wavelet thresholding for image denoising and compression,
        2000 (BayesShrink).
    """

    _place: Tensor

    def __init__(
        self,
        image_shape: Sequence[int],
        levels: int = 3,
        *,
        wavelet: str = "haar",
        rule: str = "hard",
        threshold: float | None = None,
    ) -> None:
        super().__init__(check_image_shape(image_shape))
        self.levels = check_count(levels, "levels")
        check_sides(self.image_shape, self.levels, "image_shape")
        filters(wavelet)
        self.wavelet = wavelet
        self.rule = check_choice(rule, "rule", _RULES)
        if threshold is not None and rule == "bayes":
            raise ValueError("`threshold` belongs to the rules 'hard' and 'soft', not to 'bayes'")
        _, height, width = self.image_shape
        universal = math.sqrt(2.0 * math.log(height * width))
        self.threshold = universal if threshold is None else check_positive(threshold, "threshold")
        # Says where a denoiser without values is.
        self.register_buffer("_place", torch.empty(0), persistent=False)

    @property
    def device(self) -> torch.device:
        """Device the denoiser was moved to, where inputs must be."""
        return self._place.device

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        alpha, sigma = levels.columns(3, x.device)
        noise = sigma / alpha
        low, details = decompose(x.to(compute) / alpha.to(compute), self.levels, self.wavelet)
        shrunk = [self._shrunk(bands, noise) for bands in details]
        return reconstruct(low, shrunk, self.wavelet).to(x.dtype)

    def _shrunk(self, bands: Tensor, noise: Tensor) -> Tensor:
        """Details of a level, [B, 3 C, h, w], for noise levels [B, 1, 1, 1] in double precision."""
        if self.rule == "bayes":
            power = bands.double().square().mean((2, 3), keepdim=True)
            # Far below the noise a band is no more than noise by rounding.
            variance = power - noise.square()
            clean = torch.where(variance > 0, variance, 1.0).sqrt()
            # Nothing reaches an infinite threshold.
            limit = torch.where(variance > 0, noise.square() / clean, torch.inf)
        else:
            limit = self.threshold * noise
        limit = limit.clamp(max=torch.finfo(bands.dtype).max).to(bands.dtype)
        size = bands.abs()
        kept = bands if self.rule == "hard" else bands.sign() * (size - limit)
        return torch.where(size > limit, kept, 0.0)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        rule = self.rule if self.rule == "bayes" else f"{self.rule}, threshold={self.threshold:g}"
        return f"levels={self.levels}, wavelet={self.wavelet!r}, rule={rule}"


def _power_of_images(data: TrainingSet) -> Tensor:
    """Mean power of the images of a set, its copies included: float64 [C, H, W]."""
    total = torch.zeros(data.image_shape, dtype=torch.float64, device=data.device)
    # Values and their complex coefficients, in double precision.
    size = images_per_chunk(_BLOCK_BYTES, 40 * data.num_values, len(data))
    for values in Reader.of(data).values(size, torch.float64):
        total += torch.fft.fft2(values, norm="ortho").abs().square().sum(0)
    return total / (len(data) * data.copies)


def _power_of_moments(moments: Moments) -> Tensor:
    """The same from mean and covariance: the power is that of the mean plus the variance."""
    channels, height, width = moments.image_shape
    power = torch.fft.fft2(moments.mean, norm="ortho").abs().square()
    covariance = moments.covariance.reshape(channels, height, width, channels, height, width)
    share = (moments.count - 1) / moments.count
    for c in range(channels):
        # Variance of a coefficient: both sides of the covariance in the basis, on the diagonal.
        columns = torch.fft.fft2(covariance[c, :, :, c], norm="ortho")
        both = torch.fft.ifft2(columns, dim=(0, 1), norm="ortho").flatten(2).flatten(0, 1)
        power[c] += share * both.diagonal().real.reshape(height, width).clamp(min=0.0)
    return power


def _power_of_basis(basis: Basis) -> Tensor:
    """The same from the components: that of the mean, and each component's times its variance."""
    power = torch.fft.fft2(basis.mean, norm="ortho").abs().square()
    share = (basis.count - 1) / basis.count
    size = images_per_chunk(_BLOCK_BYTES, 40 * basis.mean.numel(), max(1, basis.rank))
    for start in range(0, basis.rank, size):
        some = slice(start, start + size)
        images = basis.vectors[:, some].T.reshape(-1, *basis.image_shape)
        squares = torch.fft.fft2(images, norm="ortho").abs().square()
        power += share * torch.tensordot(basis.values[some], squares, 1)
    return power
