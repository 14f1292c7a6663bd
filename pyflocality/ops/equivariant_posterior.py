"""Posterior mean over the patches of all images at all positions: the equivariant model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from pyflocality._support.checks import LevelLike, check_choice
from pyflocality.ops.costs import Size
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair, unproven
from pyflocality.ops.path import Query
from pyflocality.ops.window_posterior import (
    check_window,
    odd_window,
    pair_flops,
    pair_jvp_flops,
    pair_vjp_flops,
)
from pyflocality.posterior.problem import PosteriorOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack

BOUNDARIES = ("circular", "broken")


def check_patch_window(window: object, height: int, width: int, boundary: str) -> int:
    """A window that the boundary rule allows for images of this size."""
    size = check_window(window, height, width)
    if boundary == "circular" and size > min(height, width):
        raise ValueError(
            f"`window` must be at most {min(height, width)}, so that a patch fits inside a "
            f"{height}x{width} image, got {size}"
        )
    return size


def _check(image_shape: Sequence[int], window: object, boundary: object) -> Query:
    rule = check_choice(boundary, "boundary", BOUNDARIES)
    _, height, width = image_shape
    return check_patch_window(window, height, width, rule), rule == "circular"


def _at_all_places(flops: Callable[[Size], int]) -> Callable[[Size], float]:
    """Operations of a window posterior, at all places of the windows inside a training image."""

    def everywhere(size: Size) -> int:
        height, width = (max(side - size.window + 1, 1) for side in size.shape[1:])
        return height * width * flops(size)

    return per_pair(everywhere)


EQUIVARIANT_POSTERIOR = declare(
    Operation(
        "equivariant_posterior",
        {
            "scan": Variant(
                {
                    "triton": unproven("patch_limits"),
                    "cpu": Served("float32_limits"),
                    "reference": Served(),
                },
                _at_all_places(pair_flops),
            ),
            "jvp": Variant({"reference": Served()}, _at_all_places(pair_jvp_flops)),
            "vjp": Variant({"reference": Served()}, _at_all_places(pair_vjp_flops), scans=2),
        },
        parameters=("window", "boundary"),
        check=_check,
        facts=lambda window, circular: {"window": window},
        inputs=lambda pixel, shape, window, circular: None,
        example=lambda size, generator: (*odd_window(size, generator), "circular"),
        model="equivariant",
    )
)


def equivariant_posterior_mean(
    x: Tensor,
    images: Tensor,
    window: int,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    boundary: str = "circular",
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""One posterior per pixel, over the patches of all images at all positions.

    .. math::
        \hat x_0[c, q] = \sum_{i, p} p_{q, (i, p)} \, v_i[c, p], \qquad
        p_q = \operatorname{softmax}_{(i, p)} \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_{c, \delta} (x[c, q + \delta] - \alpha v_i[c, p + \delta])^2 \right)

    with :math:`\delta` over a window x window square.

    `boundary="circular"`: x goes on periodically, and p is every pixel whose window fits inside
    the training image; the answer commutes with circular shifts of x. `boundary="broken"`:
    windows are cut at the border (x and v are zero beyond it), and patches come from positions
    of the same class: for an interior pixel all interior pixels, near one edge all pixels along
    it at the same depth, near a corner the same pixel only.

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        window: Side of the window in pixels, odd; at most min(H, W) for "circular" and
            2 max(H, W) - 1 for "broken".
        sigma: Noise level, a number or [B]; 0 gives the centre of the nearest patch.
            Or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        boundary: "circular" or "broken".
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
        2025 (the equivariant local score models, ELS and bbELS).
    """
    return EQUIVARIANT_POSTERIOR.mean(x, images, (window, boundary), sigma, alpha, backend, options)


def equivariant_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    window: int,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    boundary: str = "circular",
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> tuple[Tensor, Tensor]:
    r"""`equivariant_posterior_mean` and its derivatives along K tangents, in one pass.

    .. math::
        (J u)[c, q] = \frac{\alpha}{\sigma^2 \tau} \operatorname{Cov}_{p_q}(v[c, p], c_q), \qquad
        c_{q, (i, p)} = \sum_{e, \delta} u[e, q + \delta] \, v_i[e, p + \delta]

    Args:
        x: Noisy images, [B, C, H, W].
        tangents: Directions u in the space of x, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        window: Side of the window in pixels, odd, as in `equivariant_posterior_mean`.
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        boundary: "circular" or "broken".
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, precision, memory and copies: see `PosteriorOptions`.

    Returns:
        Posterior means [B, C, H, W] and Jacobian-vector products J u [K, B, C, H, W], dtype of x.

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range; `sigma` is 0.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    return EQUIVARIANT_POSTERIOR.jvp(
        x, tangents, images, (window, boundary), sigma, alpha, backend, options
    )


def equivariant_posterior_vjp(
    x: Tensor,
    cotangents: Tensor,
    images: Tensor,
    window: int,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    boundary: str = "circular",
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Vector-Jacobian products of `equivariant_posterior_mean` along K cotangents, in two passes.

    .. math::
        (J^\top g)[c, d] = \frac{\alpha}{\sigma^2 \tau} \sum_\delta
            \operatorname{Cov}_{p_{d - \delta}} \Bigl( v[c, p + \delta],
            \sum_e g[e, d - \delta] \, v[e, p] \Bigr)

    with :math:`\delta` over the window x window square, and (i, p) the patch that the covariance is
    over.

    Args:
        x: Noisy images, [B, C, H, W].
        cotangents: Directions g in the space of the result, dtype of x, [K, B, C, H, W].
        images: Training images, [N, C, H, W].
        window: Side of the window in pixels, odd, as in `equivariant_posterior_mean`.
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        boundary: "circular" or "broken".
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, precision, memory and copies: see `PosteriorOptions`.

    Returns:
        The derivatives of sum(g * mean) with respect to x, dtype of x, [K, B, C, H, W].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range; `sigma` is 0.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    return EQUIVARIANT_POSTERIOR.vjp(
        x, cotangents, images, (window, boundary), sigma, alpha, backend, options
    )
