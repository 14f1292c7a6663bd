"""Posterior mean over whole images: the optimal denoiser of a finite training set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyflocality.backends.selection import UNPROVEN, Implementation, register, select
from pyflocality.kernels.limits import float32_limits, uint8_limits
from pyflocality.posterior.problem import PosteriorOptions, posterior_problem
from pyflocality.posterior.state import finalize, finalize_jvp
from pyflocality.posterior.tangents import check_tangents, jacobian_factor, tangent_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

register(
    "global_posterior",
    {
        "triton": Implementation(
            "pyflocality.kernels.triton.global_posterior",
            "global_posterior_state",
            uint8_limits,
            by_name_only=UNPROVEN,
        ),
        "cpu": Implementation(
            "pyflocality.kernels.cpu.posterior", "global_posterior_state", float32_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.global_posterior", "global_posterior_state"
        ),
    },
)
register(
    "global_posterior_jvp",
    {
        "triton": Implementation(
            "pyflocality.kernels.triton.global_posterior_jvp",
            "global_posterior_jvp_state",
            uint8_limits,
            by_name_only=UNPROVEN,
        ),
        "cpu": Implementation(
            "pyflocality.kernels.cpu.jvp", "global_posterior_jvp_state", float32_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.global_posterior", "global_posterior_jvp_state"
        ),
    },
)


def global_posterior_mean(
    x: Tensor,
    images: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Posterior mean of the clean image given a noisy one.

    .. math::
        \hat x_0 = \sum_i p_i v_i, \qquad
        p = \operatorname{softmax}_i \left(
            -\frac{\lVert x - \alpha v_i \rVert^2}{2 \sigma^2 \tau} \right)

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        sigma: Noise level, a number or [B]; 0 gives the nearest image (ties share weight).
        alpha: Signal coefficient, a number or [B], positive.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, precision, memory and copies: see `PosteriorOptions`.

    Returns:
        Posterior means in [-1, 1], dtype of x, [B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    problem = posterior_problem(x, images, sigma, alpha, **options)
    run = select("global_posterior", problem.call(), backend)
    return finalize(run(problem)).reshape(x.shape).to(x.dtype)


def global_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> tuple[Tensor, Tensor]:
    r"""`global_posterior_mean` and its derivatives along K tangents, in one pass over the images.

    .. math::
        J u = \frac{\alpha}{\sigma^2 \tau} \operatorname{Cov}_p(v, c), \qquad
        c_i = \sum_d u[d] \, v_i[d]

    Args:
        x: Noisy images, [B, C, H, W].
        tangents: Directions u in the space of x, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
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
    run = select("global_posterior_jvp", tangent_call(problem, directions), backend)
    state = run(problem, directions)
    mean, jv = finalize_jvp(state, problem.images[0].numel(), jacobian_factor(problem))

    return mean.reshape(x.shape).to(x.dtype), jv.reshape(tangents.shape).to(x.dtype)
