"""Posterior means with free query and response weights: filtered posteriors and patch sets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyflocality._support.checks import LevelLike
from pyflocality._support.transforms import outside_transforms
from pyflocality.ops.masked_posterior import random_mask
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair
from pyflocality.ops.path import Query
from pyflocality.posterior.problem import PosteriorOptions
from pyflocality.weights import QueryWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _check(
    image_shape: Sequence[int],
    weights: Tensor | QueryWeights,
    responses: Tensor | QueryWeights,
) -> Query:
    with outside_transforms():
        return check_pair(weights, responses, math.prod(image_shape))


# For as many queries as values, and as many terms in the responses as in the weights.
FILTERED_POSTERIOR = declare(
    Operation(
        "filtered_posterior",
        {
            # Two passes of differences and their squares, 2 D, a sum for every term, factor,
            # exponential and sum or share of the weights, 3 D; shares summed over the queries of a
            # value, a sum for every term, their products with the values and the sums, 2 D for each
            # of A answered images.
            "scan": Variant(
                {"cpu": Served("mask_limits", answers_values=True), "reference": Served()},
                per_pair(lambda s: 10 * s.values + 2 * s.answers + 3 * s.terms),
                scans=2,
            ),
            # The shares are sums with weights here, 2 for every term. For a tangent its products
            # with the values and a sum for every term, twice, 2 D; their weighted sum and what is
            # left of it times the weight, 4 D; the sums of that with the weights, 2 for every term;
            # and their products with the values and the sums, 2 D for each of A images.
            "jvp": Variant(
                {"reference": Served()},
                per_pair(
                    lambda s: (
                        (10 + 6 * s.directions) * s.values
                        + (1 + s.directions) * (2 * s.answers + 4 * s.terms)
                    )
                ),
                scans=2,
            ),
            # The same without the shares; a cotangent has products with A images, is summed with
            # weights, twice, and spread without.
            "vjp": Variant(
                {"reference": Served()},
                per_pair(
                    lambda s: (
                        (10 + 4 * s.directions) * s.values
                        + 4 * s.directions * s.answers
                        + (2 + 5 * s.directions) * s.terms
                    )
                ),
                scans=2,
            ),
        },
        answers_state=False,
        answers_values=True,
        parameters=("weights", "responses"),
        check=_check,
        facts=lambda weights, responses: {"is_mask": weights.is_mask and responses.is_mask},
        inputs=lambda pixel, shape, weights, responses: None,
        example=lambda size, generator: (
            random_mask(size, generator),
            random_mask(size, generator),
        ),
    )
)


def filtered_posterior_mean(
    x: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    responses: Tensor | QueryWeights,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Blend of Q posterior means, each over its own weighting of the inputs.

    .. math::
        \hat x_0[d] = \frac{\sum_q r_q[d] \sum_i p_{q,i} v_i[d]}{\sum_q r_q[d]}, \qquad
        p_q = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_d w_q[d] (x[d] - \alpha v_i[d])^2 \right)

    A value that no query answers gets the plain mean of the training images, and so does a query
    without weights.

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        weights: Query weights w, bool or float, [Q, D] with D = C H W.
        responses: Response weights r, bool or float, [Q, D].
        sigma: Noise level, a number or [B]; 0 gives the nearest image per query.
            Or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, memory, copies, value images: see `PosteriorOptions`.

    Returns:
        Blended posterior means in [-1, 1], dtype of x, [B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The backend asked for cannot serve this call.

    References:
        Niedoba, Zwartsenberg, Murphy and Wood, Towards a mechanistic explanation of diffusion
        model generalization, 2025 (patch set posterior composites), and its 2026 sequel
        (filtered posterior mean composites).
    """
    return FILTERED_POSTERIOR.mean(x, images, (weights, responses), sigma, alpha, backend, options)


def filtered_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    responses: Tensor | QueryWeights,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> tuple[Tensor, Tensor]:
    r"""`filtered_posterior_mean` and its derivatives along K tangents, in two passes.

    .. math::
        (J u)[d] = \frac{\alpha}{\sigma^2 \tau} \, \frac{\sum_q r_q[d]
            \operatorname{Cov}_{p_q}(v[d], c_q)}{\sum_q r_q[d]}, \qquad
        c_{q, i} = \sum_e w_q[e] \, u[e] \, v_i[e]

    Args:
        x: Noisy images, [B, C, H, W].
        tangents: Directions u in the space of x, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        weights: Query weights w, bool or float, [Q, D] with D = C H W.
        responses: Response weights r, bool or float, [Q, D].
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
    return FILTERED_POSTERIOR.jvp(
        x, tangents, images, (weights, responses), sigma, alpha, backend, options
    )


def filtered_posterior_vjp(
    x: Tensor,
    cotangents: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    responses: Tensor | QueryWeights,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Vector-Jacobian products of `filtered_posterior_mean` along K cotangents, in two passes.

    .. math::
        (J^\top g)[d] = \frac{\alpha}{\sigma^2 \tau} \sum_q w_q[d]
            \operatorname{Cov}_{p_q}(v[d], a_q), \qquad
        a_{q, i} = \sum_e \frac{r_q[e]}{\sum_{q'} r_{q'}[e]} \, g[e] \, v_i[e]

    Args:
        x: Noisy images, [B, C, H, W].
        cotangents: Directions g in the space of the result, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        weights: Query weights w, bool or float, [Q, D] with D = C H W.
        responses: Response weights r, bool or float, [Q, D].
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
    return FILTERED_POSTERIOR.vjp(
        x, cotangents, images, (weights, responses), sigma, alpha, backend, options
    )


def check_pair(
    weights: Tensor | QueryWeights,
    responses: Tensor | QueryWeights,
    values: int,
    names: tuple[str, str] = ("weights", "responses"),
) -> tuple[QueryWeights, QueryWeights]:
    """Weights and responses of the same queries, with an answer for every value.

    Values that no query answers are left to one more query without weights, whose posterior is
    uniform. Error messages call the two by `names`.
    """
    pair = []
    for name, given in zip(names, (weights, responses), strict=True):
        if not isinstance(given, QueryWeights):
            given = QueryWeights(given, name=name)
        if given.shape[1] != values:
            raise ValueError(
                f"`{name}` must have shape [Q, {values}] for images of {values} values, got "
                f"{list(given.shape)}"
            )
        if not given.is_held:
            raise ValueError(
                f"`{name}` must be held as a whole, got masks that exceed the memory budget and "
                "are made when they are used"
            )
        pair.append(given)
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"`{names[1]}` must have shape {list(pair[0].shape)} like `{names[0]}`, got "
            f"{list(pair[1].shape)}"
        )
    unanswered = ~pair[1].answered
    if not unanswered.any():
        return pair[0], pair[1]
    return pair[0].with_row(torch.zeros_like(unanswered)), pair[1].with_row(unanswered)
