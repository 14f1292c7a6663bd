"""Posterior mean over whole images: the optimal denoiser of a finite training set."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyflocality._support.checks import LevelLike
from pyflocality.ops.operation import Operation, Served, Variant, declare, per_pair, unproven
from pyflocality.posterior.problem import PosteriorOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


_BACKENDS = {
    "triton": unproven("uint8_limits", answers_values=True),
    "cpu": Served("float32_limits", answers_values=True),
    "reference": Served(),
}
# The native kernel's sums with tangents are those of images alone.
_JVP = {**_BACKENDS, "cpu": Served("float32_limits")}
GLOBAL_POSTERIOR = declare(
    Operation(
        "global_posterior",
        {
            # Differences, their squares and the sum of these, 3 D; weighted values and their sum,
            # 2 D for each of A answered images.
            "scan": Variant(_BACKENDS, per_pair(lambda s: 3 * s.values + 2 * s.answers)),
            # And for a tangent the inner product, 2 D, and the sum of its products with the
            # weighted values, 2 D for each of A images.
            "jvp": Variant(
                _JVP,
                per_pair(
                    lambda s: (3 + 2 * s.directions) * s.values + 2 * (1 + s.directions) * s.answers
                ),
            ),
        },
        answers_values=True,
        model="optimal",
    )
)


def global_posterior_mean(
    x: Tensor,
    images: Tensor,
    sigma: LevelLike,
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
    """
    return GLOBAL_POSTERIOR.mean(x, images, (), sigma, alpha, backend, options)


def global_posterior_jvp(
    x: Tensor,
    tangents: Tensor,
    images: Tensor,
    sigma: LevelLike,
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
    return GLOBAL_POSTERIOR.jvp(x, tangents, images, (), sigma, alpha, backend, options)
