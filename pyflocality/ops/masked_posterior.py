"""Posterior mean of each value over its own weighted set of inputs: PCA locality."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyflocality._support.transforms import outside_transforms
from pyflocality.backends.selection import UNPROVEN, Implementation, register, select
from pyflocality.kernels.limits import mask_limits, uint8_limits
from pyflocality.posterior.problem import PosteriorOptions, posterior_problem
from pyflocality.posterior.state import finalize, finalize_jvp
from pyflocality.posterior.tangents import check_tangents, jacobian_factor, tangent_call
from pyflocality.weights import QueryWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


register(
    "masked_posterior",
    {
        "triton": Implementation(
            "pyflocality.kernels.triton.masked_posterior",
            "masked_posterior_state",
            uint8_limits,
            by_name_only=UNPROVEN,
        ),
        "cpu": Implementation(
            "pyflocality.kernels.cpu.posterior", "masked_posterior_state", mask_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.masked_posterior", "masked_posterior_state"
        ),
    },
)
register(
    "masked_posterior_vjp",
    {
        "cpu": Implementation(
            "pyflocality.kernels.cpu.masked_adjoint", "masked_posterior_vjp", mask_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.masked_posterior", "masked_posterior_vjp"
        ),
    },
)
register(
    "masked_posterior_jvp",
    {
        "triton": Implementation(
            "pyflocality.kernels.triton.masked_posterior_jvp",
            "masked_posterior_jvp_state",
            uint8_limits,
            by_name_only=UNPROVEN,
        ),
        "cpu": Implementation(
            "pyflocality.kernels.cpu.jvp", "masked_posterior_jvp_state", mask_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.masked_posterior", "masked_posterior_jvp_state"
        ),
    },
)


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


def masked_posterior_mean(
    x: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    sigma: float | Tensor,
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
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, precision, memory and copies: see `PosteriorOptions`.

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
    problem = posterior_problem(x, images, sigma, alpha, **options)
    weights = square_weights(weights, problem.images[0].numel())
    run = select("masked_posterior", problem.call(is_mask=weights.is_mask), backend)
    return finalize(run(problem, weights)).reshape(x.shape).to(x.dtype)


def masked_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    sigma: float | Tensor,
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
        sigma: Noise level, a number or [B], positive.
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, precision, memory and copies: see `PosteriorOptions`.

    Returns:
        Posterior means [B, C, H, W] and Jacobian-vector products J u [K, B, C, H, W], dtype of x.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range; `sigma` is 0.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    problem = posterior_problem(x, images, sigma, alpha, **options)
    directions = check_tangents(tangents, x, sigma, problem)
    weights = square_weights(weights, problem.images[0].numel())
    call = tangent_call(problem, directions, is_mask=weights.is_mask)
    run = select("masked_posterior_jvp", call, backend)
    mean, jv = finalize_jvp(run(problem, directions, weights), 1, jacobian_factor(problem))

    return mean.reshape(x.shape).to(x.dtype), jv.reshape(tangents.shape).to(x.dtype)


def masked_posterior_vjp(
    x: Tensor,
    cotangents: Tensor,
    images: Tensor,
    weights: Tensor | QueryWeights,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Transposed derivatives of `masked_posterior_mean` along K cotangents, in two passes.

    .. math::
        (J^\top g)[d] = \frac{\alpha}{\sigma^2 \tau} \sum_m w_m[d] \, g[m]
            \operatorname{Cov}_{p_m}(v[m], v[d])

    Args:
        x: Noisy images, [B, C, H, W].
        cotangents: Directions g in the space of the result, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        weights: Weights of the D = C H W inputs for each of the D outputs: bool or float [D, D],
            or a `QueryWeights`.
        sigma: Noise level, a number or [B], positive.
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, precision, memory and copies: see `PosteriorOptions`.

    Returns:
        Transposed products, the derivatives of sum(g * mean) by x, dtype of x, [K, B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range; `sigma` is 0.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    problem = posterior_problem(x, images, sigma, alpha, **options)
    directions = check_tangents(cotangents, x, sigma, problem, "cotangents")
    weights = square_weights(weights, problem.images[0].numel())
    call = tangent_call(problem, directions, is_mask=weights.is_mask)
    run = select("masked_posterior_vjp", call, backend)
    return run(problem, directions, weights).reshape(cotangents.shape).to(x.dtype)
