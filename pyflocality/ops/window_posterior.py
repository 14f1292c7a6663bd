"""Posterior mean over a square window around each pixel: the local score model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyflocality._support.checks import check_count
from pyflocality.backends.selection import UNPROVEN, Implementation, register, select
from pyflocality.kernels.limits import (
    float32_limits,
    window_adjoint_limits,
    window_posterior_limits,
)
from pyflocality.posterior.problem import PosteriorOptions, posterior_problem
from pyflocality.posterior.state import finalize, finalize_jvp
from pyflocality.posterior.tangents import check_tangents, jacobian_factor, tangent_call

if TYPE_CHECKING:
    from typing_extensions import Unpack

register(
    "window_posterior",
    {
        "cuda": Implementation(
            "pyflocality.kernels.cuda.window_posterior",
            "window_posterior_state",
            window_posterior_limits,
            by_name_only=UNPROVEN,
        ),
        "cpu": Implementation(
            "pyflocality.kernels.cpu.posterior", "window_posterior_state", float32_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.window_posterior", "window_posterior_state"
        ),
    },
)
register(
    "window_posterior_vjp",
    {
        "cuda": Implementation(
            "pyflocality.kernels.cuda.window_adjoint",
            "window_posterior_vjp",
            window_adjoint_limits,
            by_name_only=UNPROVEN,
        ),
        "cpu": Implementation(
            "pyflocality.kernels.cpu.window_adjoint", "window_posterior_vjp", float32_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.window_posterior", "window_posterior_vjp"
        ),
    },
)
register(
    "window_posterior_jvp",
    {
        "cuda": Implementation(
            "pyflocality.kernels.cuda.window_posterior",
            "window_posterior_jvp_state",
            window_posterior_limits,
            by_name_only=UNPROVEN,
        ),
        "cpu": Implementation(
            "pyflocality.kernels.cpu.jvp", "window_posterior_jvp_state", float32_limits
        ),
        "reference": Implementation(
            "pyflocality.reference.window_posterior", "window_posterior_jvp_state"
        ),
    },
)


def check_window(window: object, height: int, width: int, name: str = "window") -> int:
    """An odd window no larger than what already covers the image from every pixel."""
    size = check_count(window, name)
    largest = 2 * max(height, width) - 1
    if size % 2 == 0:
        raise ValueError(f"`{name}` must be odd so that it has a centre pixel, got {size}")
    if size > largest:
        raise ValueError(
            f"`{name}` must be at most {largest}, which covers a {height}x{width} image from "
            f"every pixel, got {size}"
        )
    return size


def window_posterior_mean(
    x: Tensor,
    images: Tensor,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""One posterior per pixel, over the window around it, at the same place of every image.

    .. math::
        \hat x_0[c, q] = \sum_i p_{q,i} \, v_i[c, q], \qquad
        p_q = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_{d \in \Omega_q} (x[d] - \alpha v_i[d])^2 \right)

    with :math:`\Omega_q` the window x window pixels around pixel q in all channels, cut at the
    border.

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        window: Side of the window in pixels, odd, at most 2 max(H, W) - 1.
        sigma: Noise level, a number or [B]; 0 gives the nearest image per window.
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
        Kamb and Ganguli, An analytic theory of creativity in convolutional diffusion models,
        2025 (the local score model, LS).
    """
    problem = posterior_problem(x, images, sigma, alpha, **options)
    window = check_window(window, *x.shape[-2:])
    run = select("window_posterior", problem.call(window=window), backend)
    # [B, H W, C] -> [B, C, H, W]
    return finalize(run(problem, window)).transpose(1, 2).reshape(x.shape).to(x.dtype)


def window_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> tuple[Tensor, Tensor]:
    r"""`window_posterior_mean` and its derivatives along K tangents, in one pass over the images.

    .. math::
        (J u)[c, q] = \frac{\alpha}{\sigma^2 \tau} \operatorname{Cov}_{p_q}(v[c, q], c_q), \qquad
        c_{q, i} = \sum_{d \in \Omega_q} u[d] \, v_i[d]

    Args:
        x: Noisy images, [B, C, H, W].
        tangents: Directions u in the space of x, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        window: Side of the window in pixels, odd, at most 2 max(H, W) - 1.
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
    window = check_window(window, *x.shape[-2:])
    call = tangent_call(problem, directions, window=window)
    run = select("window_posterior_jvp", call, backend)
    state = run(problem, directions, window)
    mean, jv = finalize_jvp(state, x.shape[1], jacobian_factor(problem))

    # [.., H W, C] -> [.., C, H, W]
    mean, jv = mean.transpose(-1, -2), jv.transpose(-1, -2)
    return mean.reshape(x.shape).to(x.dtype), jv.reshape(tangents.shape).to(x.dtype)


def window_posterior_vjp(
    x: Tensor,
    cotangents: Tensor,
    images: Tensor,
    window: int,
    sigma: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Transposed derivatives of `window_posterior_mean` along K cotangents, in two passes.

    .. math::
        (J^\top g)[c, d] = \frac{\alpha}{\sigma^2 \tau} \sum_{q : d \in \Omega_q}
            \operatorname{Cov}_{p_q} \Bigl( v[c, d], \sum_e g[e, q] \, v[e, q] \Bigr)

    Args:
        x: Noisy images, [B, C, H, W].
        cotangents: Directions g in the space of the result, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        window: Side of the window in pixels, odd, at most 2 max(H, W) - 1.
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
    window = check_window(window, *x.shape[-2:])
    call = tangent_call(problem, directions, window=window)
    run = select("window_posterior_vjp", call, backend)
    return run(problem, directions, window).reshape(cotangents.shape).to(x.dtype)
