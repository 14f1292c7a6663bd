"""Which inputs each output listens to: the PCA-locality rule."""

from __future__ import annotations

import hashlib
import json
import math

import torch
from torch import Tensor

from pyflocality._support.budget import check_given, memory_budget_bytes
from pyflocality._support.checks import (
    LARGEST,
    NoiseLevel,
    check_float_tensor,
    check_instance,
    check_real,
    check_single_level,
    describe,
)
from pyflocality.moments import Moments, check_moments_fit
from pyflocality.storage.blobs import read_blob, write_blob
from pyflocality.weights import QueryWeights

# Masks over fewer inputs are built in less time than a file takes.
_CACHED_INPUTS = 1024
# Part of the key of cached masks: changes with the rule.
_RULE_VERSION = 1


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
    moments: Moments, sigma: float | NoiseLevel, alpha: float = 1.0, threshold: float = 0.02
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

    Where the training images are fewer than their values the covariance has a null space.
    Its eigenvalues are exactly zero here (see `Moments.eigh`), so the projector's rows lie in
    the span of the data at every noise level; single-precision codes fill that null space with
    rounding noise at low noise levels and their masks differ there.

    Args:
        moments: Moments of the training set over D = C H W values.
        sigma: Noise level, not negative; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.
        threshold: h, in [0, 1).

    Returns:
        Weights with the output value in the row and the input value in the column, [D, D].

    Raises:
        ValueError: An argument is out of range.

    References:
        Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from
        data statistics, 2025.
    """
    check_instance(moments, "moments", Moments, "Moments")
    threshold = check_threshold(threshold, "threshold")
    alpha, sigma = _check_level(sigma, alpha)
    eigenvalues, vectors = moments.eigh()
    projector = (vectors * wiener_gain(eigenvalues, sigma, alpha)) @ vectors.T
    diagonal = projector.diagonal().clone()
    projector /= torch.where(diagonal.abs() < 1e-6, 1.0, diagonal)[:, None]
    if threshold == 0:
        return QueryWeights(projector.T.contiguous(), signed=True)
    magnitude = projector.abs_().T
    return QueryWeights(magnitude >= threshold * magnitude.max())


def cached_pca_locality_weights(
    moments: Moments,
    sigma: float | NoiseLevel,
    alpha: float = 1.0,
    threshold: float = 0.02,
    *,
    memory_budget: int | str | None = None,
) -> QueryWeights:
    """As `pca_locality_weights`, with large masks kept as files in the user's cache folder.

    A file is named by a hash of the moments, the noise level, the threshold and the version of
    the rule; it carries a checksum, and a damaged one is made anew with a warning. Masks that
    take a moment (D < 1,024 values) and signed weights are not kept.

    Args:
        moments: Moments of the training set over D = C H W values.
        sigma: Noise level, not negative; or a `NoiseLevel` for both.
        alpha: Signal coefficient, positive.
        threshold: h, in [0, 1).
        memory_budget: Working memory, bytes or a string such as "2GB"; None follows the
            environment variable PYFLOCALITY_MEMORY_BUDGET. Where neither is given, nothing is
            refused.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of range, or the budget is less than the making takes:
            27 D^2 bytes, or 40 D^2 where the moments have no eigenvectors yet.
    """
    check_instance(moments, "moments", Moments, "Moments")
    threshold = check_threshold(threshold, "threshold")
    alpha, sigma = _check_level(sigma, alpha)
    memory_budget_bytes(memory_budget)
    inputs = math.prod(moments.image_shape)
    if inputs < _CACHED_INPUTS or threshold == 0:
        _check_making_fits(memory_budget, moments)
        return pca_locality_weights(moments, sigma, alpha, threshold)
    level = [_RULE_VERSION, moments.content_key(), sigma, alpha, threshold]
    key = hashlib.sha256(json.dumps(level).encode()).hexdigest()[:32]
    name = f"masks/{key}.bits"
    row = (inputs + 7) // 8
    bits = read_blob(name, inputs * row)
    if bits is not None:
        return QueryWeights.from_bits(bits.reshape(inputs, row), inputs)
    _check_making_fits(memory_budget, moments)
    weights = pca_locality_weights(moments, sigma, alpha, threshold)
    write_blob(name, weights.bits)
    return weights


def _check_making_fits(memory_budget: int | str | None, moments: Moments) -> None:
    """Refuse to make weights that a memory budget which was given cannot hold."""
    check_moments_fit(memory_budget, moments)
    inputs = math.prod(moments.image_shape)
    # The filter, its factors, and its magnitudes in the order of the weights.
    check_given(memory_budget, 27 * inputs**2, f"the weights of {inputs} values")


def _check_level(sigma: float | NoiseLevel, alpha: float) -> tuple[float, float]:
    """A noise level (alpha, sigma) whose squares are numbers, as the denoisers take it."""
    alpha, sigma = check_single_level(sigma, alpha)
    return check_real(alpha, "alpha", low=0.0, high=LARGEST, above=True), sigma


def check_threshold(threshold: object, name: str) -> float:
    """A mask threshold in [0, 1)."""
    return check_real(threshold, name, low=0.0, high=1.0, below=True)
