"""Posterior mean over a square window around each pixel: the local score model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyflocality._support.checks import LevelLike, Pixel, check_count
from pyflocality.ops.costs import Size
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair, unproven
from pyflocality.ops.path import Query
from pyflocality.posterior.problem import PosteriorOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


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


def inputs_of_window(pixel: Pixel, image_shape: Sequence[int], window: int) -> Tensor:
    """Inputs inside the window around a pixel, bool [C, H, W]."""
    inputs = torch.ones(tuple(image_shape), dtype=torch.bool)
    for axis in (1, 2):
        size = image_shape[axis]
        far = (torch.arange(size) - pixel[axis] % size).abs() > window // 2
        inputs.index_fill_(axis, far.nonzero()[:, 0], False)
    return inputs


def odd_window(size: Size, generator: torch.Generator) -> Query:
    """The window of a size, or the largest odd one inside the image."""
    return (min(size.window, *(side - (side + 1) % 2 for side in size.shape[1:])),)


def pair_flops(size: Size) -> int:
    """Operations of a pair of images: 3 D + 6 H W + 2 A D.

    Differences, their squares and the sums of these over the channels, 3 D - H W, and over the
    windows, 4 H W, whatever their side; factor, exponential and sum of the weights, 3 H W; weighted
    values and their sum, 2 D for each of A answered images.
    """
    return 3 * size.values + 6 * size.pixels + 2 * size.answers


def pair_jvp_flops(size: Size) -> int:
    """As `pair_flops`, with K tangents.

    Each has products with the values, and their sums over channels and windows, 2 D + 3 H W; the
    weighted sum of these, 2 H W, and of their products with the values, 2 D for each of A images.
    """
    further = 2 * size.values + 5 * size.pixels + 2 * size.answers
    return pair_flops(size) + size.directions * further


def pair_vjp_flops(size: Size) -> int:
    """Operations of a pair of images for K cotangents, in two passes.

    Distances and weights twice, 3 D + 6 H W each. For a cotangent the products with the values of A
    answered images and their sum over these and over channels twice, 4 A D - 2 H W, and their
    weighted sum, 2 H W; what is left of the mean and its product with the weight, 2 H W; the sum
    over windows, 4 H W; and the product with the values and its sum, 2 D.
    """
    passes = 6 * size.values + 12 * size.pixels
    return passes + size.directions * (2 * size.values + 4 * size.answers + 6 * size.pixels)


_SCAN = {
    "cuda": unproven("window_posterior_limits"),
    "cpu": Served("float32_limits", answers_values=True),
    "reference": Served(),
}
WINDOW_POSTERIOR = declare(
    Operation(
        "window_posterior",
        {
            "scan": Variant(_SCAN, per_pair(pair_flops)),
            "jvp": Variant(_SCAN, per_pair(pair_jvp_flops)),
            "vjp": Variant(
                {**_SCAN, "cuda": unproven("window_vjp_limits")},
                per_pair(pair_vjp_flops),
                scans=2,
            ),
        },
        answers_values=True,
        parameters=("window",),
        check=lambda shape, window: (check_window(window, *shape[1:]),),
        facts=lambda window: {"window": window},
        inputs=inputs_of_window,
        example=odd_window,
        model="local",
    )
)


def window_posterior_mean(
    x: Tensor,
    images: Tensor,
    window: int,
    sigma: LevelLike,
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
        Kamb and Ganguli, An analytic theory of creativity in convolutional diffusion models,
        2025 (the local score model, LS).
    """
    return WINDOW_POSTERIOR.mean(x, images, (window,), sigma, alpha, backend, options)


def window_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    window: int,
    sigma: LevelLike,
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
    return WINDOW_POSTERIOR.jvp(x, tangents, images, (window,), sigma, alpha, backend, options)


def window_posterior_vjp(
    x: Tensor,
    cotangents: Tensor,
    images: Tensor,
    window: int,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Vector-Jacobian products of `window_posterior_mean` along K cotangents, in two passes.

    .. math::
        (J^\top g)[c, d] = \frac{\alpha}{\sigma^2 \tau} \sum_{q : d \in \Omega_q}
            \operatorname{Cov}_{p_q} \Bigl( v[c, d], \sum_e g[e, q] \, v[e, q] \Bigr)

    Args:
        x: Noisy images, [B, C, H, W].
        cotangents: Directions g in the space of the result, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        window: Side of the window in pixels, odd, at most 2 max(H, W) - 1.
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
    return WINDOW_POSTERIOR.vjp(x, cotangents, images, (window,), sigma, alpha, backend, options)
