"""Which inputs each output listens to: the PCA-locality rule."""

from __future__ import annotations

import torch
from torch import Tensor

from pyflocality._support.budget import memory_budget_bytes
from pyflocality._support.checks import (
    LARGEST,
    NoiseLevel,
    check_float_tensor,
    check_real,
    check_single_level,
    describe,
)
from pyflocality.moments import Basis, Moments
from pyflocality.moments.mask_source import MaskSource
from pyflocality.weights import QueryWeights


def wiener_gain(eigenvalues: Tensor, sigma: float | NoiseLevel, alpha: float = 1.0) -> Tensor:
    r"""Share of each principal component that the Wiener filter keeps, [D] in [0, 1].

    .. math:: g_k = \frac{\alpha^2 \lambda_k}{\alpha^2 \lambda_k + \sigma^2}

    Components without variance keep nothing, also at sigma = 0.

    Args:
        eigenvalues: Variances of the components, [D].
        sigma: Noise level, not negative; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: `eigenvalues` is no row of finite numbers, or a level is out of range.
    """
    eigenvalues = check_float_tensor(eigenvalues, "eigenvalues")
    if eigenvalues.ndim != 1 or len(eigenvalues) == 0:
        raise ValueError(f"`eigenvalues` must have shape [D], got {describe(eigenvalues)}")
    alpha, sigma = _check_level(sigma, alpha)
    signal = alpha * alpha * eigenvalues
    return torch.where(signal > 0, signal / (signal + sigma * sigma), 0.0)


def pca_locality_weights(
    moments: Moments | Basis,
    sigma: float | NoiseLevel,
    alpha: float = 1.0,
    threshold: float = 0.02,
    softness: float = 0.0,
) -> QueryWeights:
    r"""Query weights of the PCA-locality model at one noise level.

    With the covariance :math:`S = U \operatorname{diag}(\lambda) U^\top` the Wiener filter's
    projector is

    .. math::
        M = U \operatorname{diag}\left(
            \frac{\alpha^2 \lambda}{\alpha^2 \lambda + \sigma^2} \right) U^\top .

    Row n is divided by :math:`M[n,n]` (by 1 where :math:`|M[n,n]| < 10^{-6}`); output m weighs
    input n by column m of the result. A threshold h > 0 keeps 1 where the entry's magnitude
    reaches h times the largest magnitude of the whole matrix and 0 elsewhere; h = 0 keeps the
    signed values.

    A softness p > 0 weighs what the mask of a threshold h > 0 keeps by the magnitude itself, so
    that inputs far below an output's own count less:

    .. math:: w_m[n] = \min(1, |M[n,m]| / M[n,n])^p .

    All of it is float64, tile by tile: no matrix of D x D numbers but at h = 0. Masks made of
    components and of a covariance are the same but for entries within 1e-6 of the threshold.

    Where the training images are fewer than their values the covariance has a null space.
    Its eigenvalues are exactly zero here (see `Moments.eigh` and `Basis`), so the projector's rows
    lie in the span of the data at every noise level; single-precision codes fill that null space
    with rounding noise at low noise levels and their masks differ there.

    Args:
        moments: Moments of the training set over D = C H W values, or its components (`Basis`).
        sigma: Noise level, not negative; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.
        threshold: h, in [0, 1).
        softness: p, not negative; 0 is the mask itself.

    Returns:
        Weights with the output value in the row and the input value in the column, [D, D]: a mask,
        float64 at threshold 0, float32 where they are soft.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range.
        MemoryError: The memory that is there does not hold what making them takes.

    References:
        Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from
        data statistics, 2025.
    """
    return _made(moments, sigma, alpha, threshold, softness, None, cached=False)


def cached_pca_locality_weights(
    moments: Moments | Basis,
    sigma: float | NoiseLevel,
    alpha: float = 1.0,
    threshold: float = 0.02,
    softness: float = 0.0,
    *,
    memory_budget: int | str | None = None,
) -> QueryWeights:
    """As `pca_locality_weights`, with large masks kept as files in the user's cache folder.

    A file is named by a hash of the moments or components, the way the masks are made, the noise
    level, the threshold, the softness and the version of the rule; it carries a checksum, and a
    damaged one is made anew with a warning. Masks that take a moment (D < 1,024 values) and signed
    weights are not kept.

    Args:
        moments: Moments of the training set over D = C H W values, or its components (`Basis`).
        sigma: Noise level, not negative; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.
        threshold: h, in [0, 1).
        softness: p, not negative; 0 is the mask itself. Soft weights take 4 D^2 bytes, within the
            budget, and as much in the cache.
        memory_budget: Working memory, bytes or a string such as "2GB"; None follows the
            environment variable PYFLOCALITY_MEMORY_BUDGET, else 1 GB. Masks whose bits exceed it
            are read from their file a piece at a time; where none can be kept they are made by
            tiles whenever they are used.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or a budget was given and is less than the making
            takes: the least is named.
        MemoryError: The memory that is there does not hold what making them takes.
    """
    return _made(moments, sigma, alpha, threshold, softness, memory_budget, cached=True)


def _made(
    moments: Moments | Basis,
    sigma: float | NoiseLevel,
    alpha: float,
    threshold: float,
    softness: float,
    memory_budget: int | str | None,
    *,
    cached: bool,
) -> QueryWeights:
    if not isinstance(moments, (Moments, Basis)):
        raise TypeError(f"`moments` must be Moments or a Basis, got {describe(moments)}")
    threshold = check_threshold(threshold, "threshold")
    softness = check_softness(softness, threshold, "threshold")
    alpha, sigma = _check_level(sigma, alpha)
    memory_budget_bytes(memory_budget)
    source = MaskSource(moments, memory_budget=memory_budget)
    return source.masks(alpha, sigma, threshold, softness, cached=cached).weights


def _check_level(sigma: float | NoiseLevel, alpha: float) -> tuple[float, float]:
    """A noise level (alpha, sigma) whose squares are numbers, as the denoisers take it."""
    alpha, sigma = check_single_level(sigma, alpha)
    return check_real(alpha, "alpha", low=0.0, high=LARGEST, above=True), sigma


def check_threshold(threshold: object, name: str) -> float:
    """A mask threshold in [0, 1)."""
    return check_real(threshold, name, low=0.0, high=1.0, below=True)


def check_softness(softness: object, threshold: float, name: str) -> float:
    """A softness of masks, not negative; above 0 where there are masks: at a threshold above 0.

    Args:
        softness: What is given.
        threshold: The threshold.
        name: What error messages call the threshold.
    """
    result = check_real(softness, "softness", low=0.0)
    if result > 0 and threshold == 0:
        raise ValueError(
            f"`softness` must be 0 at `{name}` 0, where weights are signed values, got "
            f"{describe(softness)}"
        )
    return result
