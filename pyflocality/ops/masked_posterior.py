"""Posterior mean of each value over its own weighted set of inputs: PCA locality."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyflocality._support.checks import LevelLike, Pixel
from pyflocality._support.transforms import outside_transforms
from pyflocality.ops.costs import Size
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair, unproven
from pyflocality.posterior.problem import PosteriorOptions
from pyflocality.weights import QueryWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def square_weights(weights: Tensor | QueryWeights, values: int) -> QueryWeights:
    """Weights with a row for every one of an image's values."""
    if not isinstance(weights, QueryWeights):
        with outside_transforms():
            weights = QueryWeights(weights)
    if weights.shape != (values, values):
        raise ValueError(
            f"`weights` must have shape [{values}, {values}] for images of {values} values, got "
            f"{list(weights.shape)}"
        )
    return weights


def _inputs(pixel: Pixel, image_shape: Sequence[int], weights: QueryWeights) -> Tensor | None:
    if not weights.is_mask:
        return None
    shape = tuple(image_shape)
    place = torch.arange(math.prod(shape)).reshape(shape)[pixel]
    return weights.row(int(place)).reshape(shape)


def random_mask(size: Size, generator: torch.Generator) -> QueryWeights:
    """Masks of all values, with about as many ones as the size has terms."""
    random = torch.rand(size.values, size.values, generator=generator)
    return QueryWeights(random < size.terms / size.values**2)


_WEIGHTS = {"cpu": Served("weight_limits", answers_values=True), "reference": Served()}
_SCAN = {"triton": unproven("uint8_limits", answers_values=True), **_WEIGHTS}
# The kernels' sums with tangents are those of images alone.
_TANGENTS = {"triton": unproven("uint8_limits"), **_WEIGHTS, "cpu": Served("mask_limits")}
MASKED_POSTERIOR = declare(
    Operation(
        "masked_posterior",
        {
            # Differences and their squares, 2 D; a sum for every term; factor, exponential and sum
            # of the weights, 3 D; weighted values and their sum, 2 D for each of A answered images.
            "scan": Variant(_SCAN, per_pair(lambda s: 5 * s.values + 2 * s.answers + s.terms)),
            # And for a tangent its products with the values, D, a sum for every term, their
            # weighted sums, 2 D, and those of their products with the values, 2 D for each of A.
            "jvp": Variant(
                _TANGENTS,
                per_pair(
                    lambda s: (
                        (5 + 3 * s.directions) * s.values
                        + (1 + s.directions) * (2 * s.answers + s.terms)
                    )
                ),
            ),
            # Distances and weights twice; for a cotangent products with the values and their sums
            # over A images, twice, and the weighted sum of these, 4 A D; what is left of the mean
            # and its product with the weight, 2 D; a sum for every term; the product with the
            # values and its sum, 2 D.
            "vjp": Variant(
                # With value images a float32 mean leaves a remainder where one image and its
                # twins hold the posterior, times 1 / sigma^2.
                {"cpu": Served("mask_limits"), "reference": Served()},
                per_pair(
                    lambda s: (
                        (10 + 4 * s.directions) * s.values
                        + 4 * s.directions * s.answers
                        + (2 + s.directions) * s.terms
                    )
                ),
                scans=2,
            ),
        },
        answers_values=True,
        parameters=("weights",),
        check=lambda shape, weights: (square_weights(weights, math.prod(shape)),),
        facts=lambda weights: {"is_mask": weights.is_mask, "is_signed": weights.is_signed},
        inputs=_inputs,
        example=lambda size, generator: (random_mask(size, generator),),
        model="pca-locality",
    )
)


def masked_posterior_mean(
    x: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""One posterior per output value, over its own weighting of the inputs.

    .. math::
        \hat x_0[m] = \sum_i p_{m,i} \, v_i[m], \qquad
        p_m = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_d w_m[d] (x[d] - \alpha v_i[d])^2 \right)

    A row of weights without any entry gives a uniform posterior: the plain mean.

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        weights: Weights of the D = C H W inputs (columns) for each of the D outputs (rows):
            bool or float [D, D], or a `QueryWeights` that is used again and again.
        sigma: Noise level, a number or [B]; 0 gives the nearest image per output value.
            Or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, memory, copies, value images: see `PosteriorOptions`.

    Returns:
        Posterior means in [-1, 1], dtype of x, [B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The backend asked for cannot serve this call.

    References:
        Lukoianov, Yuan, Solomon and Sitzmann, Locality in image diffusion models emerges from
        data statistics, 2025, proposition A.7.
    """
    return MASKED_POSTERIOR.mean(x, images, (weights,), sigma, alpha, backend, options)


def masked_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> tuple[Tensor, Tensor]:
    r"""`masked_posterior_mean` and its derivatives along K tangents, in one pass over the images.

    .. math::
        (J u)[m] = \frac{\alpha}{\sigma^2 \tau} \operatorname{Cov}_{p_m}(v[m], c_m), \qquad
        c_{m, i} = \sum_d w_m[d] \, u[d] \, v_i[d]

    Args:
        x: Noisy images, [B, C, H, W].
        tangents: Directions u in the space of x, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        weights: Weights of the D = C H W inputs for each of the D outputs: bool or float [D, D],
            or a `QueryWeights`.
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, memory, copies, value images: see `PosteriorOptions`.

    Returns:
        Posterior means [B, C, H, W] and Jacobian-vector products J u [K, B, C, H, W], dtype of x.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range; `sigma` is 0.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    return MASKED_POSTERIOR.jvp(x, tangents, images, (weights,), sigma, alpha, backend, options)


def masked_posterior_vjp(
    x: Tensor,
    cotangents: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Vector-Jacobian products of `masked_posterior_mean` along K cotangents, in two passes.

    .. math::
        (J^\top g)[d] = \frac{\alpha}{\sigma^2 \tau} \sum_m w_m[d] \, g[m]
            \operatorname{Cov}_{p_m}(v[m], v[d])

    Args:
        x: Noisy images, [B, C, H, W].
        cotangents: Directions g in the space of the result, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        weights: Weights of the D = C H W inputs for each of the D outputs: bool or float [D, D],
            or a `QueryWeights`.
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, memory, copies, value images: see `PosteriorOptions`.

    Returns:
        The derivatives of sum(g * mean) with respect to x, dtype of x, [K, B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range; `sigma` is 0.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    return MASKED_POSTERIOR.vjp(x, cotangents, images, (weights,), sigma, alpha, backend, options)
