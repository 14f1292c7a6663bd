"""Posterior means of all square windows inside an image, laid over one another."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyflocality._support.checks import LevelLike, check_count
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair, unproven
from pyflocality.ops.window_posterior import odd_window
from pyflocality.posterior.problem import PosteriorOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


def check_patch(window: object, height: int, width: int) -> int:
    """A window, odd or even, that fits inside an image."""
    size = check_count(window, "window")
    if size > min(height, width):
        raise ValueError(
            f"`window` must be at most {min(height, width)}, to fit inside the image, got {size}"
        )
    return size


PATCH_SET = declare(
    Operation(
        "patch_set",
        {
            # Two passes of distances and weights, each 3 D - H W for differences, their squares and
            # the sums of these over the channels, 4 H W over the windows, and 3 H W for factor,
            # exponential and the sum of the weights or their share: the first has no values. The
            # second spreads the shares over the windows, 4 H W, and adds up their products with the
            # values, 2 D for each of A answered images.
            "scan": Variant(
                {
                    "cuda": unproven("window_vjp_limits"),
                    "cpu": Served("float32_limits", answers_values=True),
                    "reference": Served(),
                },
                per_pair(lambda s: 6 * s.values + 2 * s.answers + 16 * s.pixels),
                scans=2,
            ),
        },
        answers_state=False,
        answers_values=True,
        parameters=("window",),
        check=lambda shape, window: (check_patch(window, *shape[1:]),),
        facts=lambda window: {"window": window},
        inputs=lambda pixel, shape, window: None,
        example=odd_window,
        model="patch-set",
    )
)


def patch_set_mean(
    x: Tensor,
    images: Tensor,
    window: int,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""One posterior per window that fits inside the image, each answering all of its pixels.

    .. math::
        \hat x_0[d] = \frac{1}{|\{q : d \in P_q\}|} \sum_{q : d \in P_q} \sum_i p_{q,i} v_i[d],
        \qquad
        p_q = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_{d \in P_q} (x[d] - \alpha v_i[d])^2 \right)

    with :math:`P_q` the window x window squares inside the image, in all channels.

    Args:
        x: Noisy images x = alpha x0 + sigma noise, [B, C, H, W].
        images: Training images, uint8 (u means u / 127.5 - 1) or float in [-1, 1],
            [N, C, H, W].
        window: Side of the window in pixels, odd or even, at most min(H, W).
        sigma: Noise level, a number or [B]; 0 gives the nearest image per window.
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
        model generalization, 2025 (patch set posterior composites).
    """
    return PATCH_SET.mean(x, images, (window,), sigma, alpha, backend, options)
