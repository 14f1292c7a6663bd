"""The Wiener filter: the best linear denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyflocality._support.checks import check_count, describe
from pyflocality._support.levels import Levels
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Denoiser, device_after
from pyflocality.moments import Moments, check_moments_fit
from pyflocality.moments.undetermined import warn_of_few_images


class WienerDenoiser(Denoiser):
    r"""Wiener filter: the optimal linear denoiser, from mean and covariance alone.

    .. math::
        \hat x_0(x) = \mu + \alpha S (\alpha^2 S + \sigma^2 I)^{-1} (x - \alpha \mu)

    with :math:`\mu` and S the mean and covariance of the training set. It is the posterior
    mean of Gaussian data with these moments; its rows are the sensitivity fields that trained
    networks show. Its values may leave [-1, 1]. torch multiplies the matrices: an image's bits may
    depend on the others of its batch and on the number of threads, by rounding alone.

    Args:
        data: A training set, whose moments are then computed, or `Moments`.
        rank: Leading components of the covariance to keep; None keeps all. The others count as
            without variance.

    Attributes:
        mean: Mean of the data, float64 [D].
        eigenvalues: Eigenvalues of the covariance that are kept, descending, float64 [R].
        eigenvectors: Their eigenvectors in columns, float64 [D, R].

    Raises:
        TypeError: `data` is neither, or `rank` no whole number.
        ValueError: `rank` is not in 1 .. D, or PYFLOCALITY_MEMORY_BUDGET is set to less than the
            48 D^2 bytes that moments and eigenvectors take.

    Warns:
        UserWarning: There are no more images than values that vary, and more components are kept
            than they have.

    References:
        Wiener, Extrapolation, interpolation and smoothing of stationary time series, 1949.

        Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from
        data statistics, 2025.
    """

    mean: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    symmetric_jacobian = True

    def __init__(self, data: TrainingSet | Moments, rank: int | None = None) -> None:
        if not isinstance(data, (TrainingSet, Moments)):
            raise TypeError(f"`data` must be a TrainingSet or Moments, got {describe(data)}")
        super().__init__(data.image_shape)
        # Moments and their eigenvectors may take minutes.
        if rank is not None:
            rank = check_count(rank, "rank", maximum=math.prod(self.image_shape))
        check_moments_fit(None, data)
        if isinstance(data, TrainingSet):
            data = Moments.from_data(data)
        values, vectors = data.eigh()
        if rank is not None:
            values, vectors = values[:rank], vectors[:, :rank].contiguous()
        # Subclasses make something else of the covariance.
        if type(self) is WienerDenoiser:
            warn_of_few_images(data, "the Wiener filter", rank)
        self.register_buffer("mean", data.mean.flatten())
        self.register_buffer("eigenvalues", values)
        self.register_buffer("eigenvectors", vectors)

    @property
    def device(self) -> torch.device:
        """Device of the moments, where inputs must be."""
        return self.mean.device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> WienerDenoiser:
        # Follows moves between devices; stays in float64 whatever dtype the module is cast to,
        # since small eigenvalues do not survive a cast.
        device = device_after(fn, self.mean.device)
        return super()._apply(lambda tensor: tensor.to(device), recurse)

    def _denoise(self, x: Tensor, levels: Levels) -> Tensor:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        mean, values = self.mean.to(compute), x.to(compute).flatten(1)
        alpha, _ = levels.columns(1, x.device)
        result = mean + self._filtered(values - alpha.to(compute) * mean, levels)
        return result.reshape(x.shape).to(x.dtype)

    def _filtered(self, values: Tensor, levels: Levels) -> Tensor:
        """The filter applied to values [B, D] of noise-free mean 0, or to [K, B, D]."""
        variance, (alpha, sigma) = self.eigenvalues, levels.columns(1, values.device)
        # A level of 0 against a variance of 0 answers 0 / 1.
        total = torch.where(variance > 0, alpha**2 * variance + sigma**2, 1.0)
        gain = (alpha * variance.clamp(min=0.0) / total).to(values.dtype)
        vectors = self.eigenvectors.to(values.dtype)
        return (values @ vectors * gain) @ vectors.T

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        # The filter is symmetric.
        return self._denoise(x, levels), self._vjp(x, tangents, levels)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        products = self._filtered(cotangents.to(compute).flatten(2), levels)
        return products.reshape(cotangents.shape).to(x.dtype)
