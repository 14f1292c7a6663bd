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
from pyflocality.moments import Basis, Moments
from pyflocality.moments.undetermined import warn_of_few_images

# Eigenvectors of another dtype are copied so many bytes at a time.
_COPIED_BYTES = 64 * 2**20


class WienerDenoiser(Denoiser):
    r"""Wiener filter: the optimal linear denoiser, from mean and covariance alone.

    .. math::
        \hat x_0(x) = \mu + \alpha S (\alpha^2 S + \sigma^2 I)^{-1} (x - \alpha \mu)

    with :math:`\mu` and S the mean and covariance of the training set. It is the posterior
    mean of Gaussian data with these moments; its rows are the sensitivity fields that trained
    networks show. Its values may leave [-1, 1]. torch multiplies the matrices: an image's bits may
    depend on the others of its batch and on the number of threads, by rounding alone.

    Args:
        data: A training set, whose principal components are then computed, or `Moments` or `Basis`.
        rank: Leading components of the covariance to keep; None keeps all. The others count as
            without variance.

    Attributes:
        mean: Mean of the data, float64 [D].
        eigenvalues: Eigenvalues of the covariance that are kept, descending and positive, float64
            [R]. N images have N - 1 at most: what x shows in other directions is noise, and
            answered by the mean.
        eigenvectors: Their eigenvectors in columns, float64 [D, R].

    Raises:
        TypeError: `data` is none of them, or `rank` no whole number.
        ValueError: `rank` is not in 1 .. D, or PYFLOCALITY_MEMORY_BUDGET is set to less than the
            components take (see `Basis.from_data`): of moments, 40 D^2 bytes.
        MemoryError: They take more than there is.

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
    # Variance in the directions that no eigenvector has.
    remainder = 0.0

    def __init__(self, data: TrainingSet | Moments | Basis, rank: int | None = None) -> None:
        if not isinstance(data, (TrainingSet, Moments, Basis)):
            raise TypeError(
                f"`data` must be a TrainingSet, Moments or a Basis, got {describe(data)}"
            )
        super().__init__(data.image_shape)
        # The components may take minutes.
        if rank is not None:
            rank = check_count(rank, "rank", maximum=math.prod(self.image_shape))
        if isinstance(data, TrainingSet):
            data = Basis.from_data(data)
        basis = data.basis() if isinstance(data, Moments) else data
        # Subclasses make something else of the covariance.
        if type(self) is WienerDenoiser:
            warn_of_few_images(data, "the Wiener filter", rank)
        if rank is not None and basis.rank > 0:
            basis = basis.leading(rank)
        self.register_buffer("mean", basis.mean.flatten())
        self.register_buffer("eigenvalues", basis.values)
        # In one piece, so that products round as those of the same components from a file.
        self.register_buffer("eigenvectors", basis.vectors.contiguous())

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
        size, rank = self.eigenvectors.shape
        factors, rest = gains(self.eigenvalues, levels), None
        if self.remainder > 0 and rank < size:
            rest = gains(factors.new_tensor([self.remainder]), levels)
        return spectral(values, self.eigenvectors, factors, rest)

    def _jvp(self, x: Tensor, tangents: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
        # The filter is symmetric.
        return self._denoise(x, levels), self._vjp(x, tangents, levels)

    def _vjp(self, x: Tensor, cotangents: Tensor, levels: Levels) -> Tensor:
        compute = torch.float64 if x.dtype == torch.float64 else torch.float32
        products = self._filtered(cotangents.to(compute).flatten(2), levels)
        return products.reshape(cotangents.shape).to(x.dtype)


def gains(variances: Tensor, levels: Levels) -> Tensor:
    """The filter's factors of components with these variances [R]: float64 [1 or B, R]."""
    alpha, sigma = levels.columns(1, variances.device)
    # A level of 0 against a variance of 0 answers 0 / 1.
    total = torch.where(variances > 0, alpha**2 * variances + sigma**2, 1.0)
    return alpha * variances.clamp(min=0.0) / total


def spectral(
    values: Tensor, vectors: Tensor, factors: Tensor, rest: Tensor | float | None = None
) -> Tensor:
    """A symmetric matrix, different for each image, applied to images.

    Args:
        values: The images, [B, D] or [K, B, D].
        vectors: Eigenvectors in columns, [D, R].
        factors: Eigenvalues, [1 or B, R].
        rest: The eigenvalue in all other directions, one or [1 or B, 1]; None for 0.
    """
    result = torch.zeros_like(values)
    if rest is not None:
        factors, result = factors - rest, values * torch.as_tensor(rest).to(values.dtype)
    factors = factors.to(values.dtype)
    # A cast copies them: some at a time.
    width = max(1, _COPIED_BYTES // (values.element_size() * len(vectors)))
    for some in range(0, vectors.shape[1], width):
        columns = slice(some, some + width)
        cast = vectors[:, columns].to(values.dtype)
        result = result + (values @ cast * factors[:, columns]) @ cast.T
    return result
