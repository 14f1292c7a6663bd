"""Log of the partition sums of posteriors: log-densities up to a constant."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from pyflocality._support.checks import LevelLike
from pyflocality.ops.operation import OPERATIONS
from pyflocality.posterior.problem import PosteriorOptions
from pyflocality.weights import QueryWeights

if TYPE_CHECKING:
    from typing_extensions import Unpack


def posterior_log_sum_exp(
    x: Tensor,
    images: Tensor,
    sigma: LevelLike,
    alpha: float | Tensor = 1.0,
    *,
    window: int | None = None,
    weights: Tensor | QueryWeights | None = None,
    backend: str | None = None,
    **options: Unpack[PosteriorOptions],
) -> Tensor:
    r"""Log of the sum that normalises each posterior.

    .. math::
        L_q = \log \sum_i \exp \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_d w_q[d] (x[d] - \alpha v_i[d])^2 \right)

    With all weights 1 and temperature 1, :math:`L - \log N - \tfrac D2 \log(2 \pi \sigma^2)` is
    the log-density of the noisy image.

    Args:
        x: Noisy images, [B, C, H, W].
        images: Training images, [N, C, H, W].
        sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
        alpha: Signal coefficient, a number or [B], positive.
        window: Side of a window around each pixel, as in `window_posterior_mean`: Q = H W.
        weights: A row of weights for each value, as in `masked_posterior_mean`: Q = C H W.
            With neither, whole images are compared: Q = 1.
        backend: Backend to run on; None follows `pyflocality.use_backend`.
        options: Temperature, dtype, precision, memory and copies: see `PosteriorOptions`.

    Returns:
        Float64 [B, Q].

    Raises:
        TypeError: An argument has the wrong type or dtype.
        ValueError: An argument has the wrong shape, device or range, `sigma` is 0, or both
            `window` and `weights` are given.
        BackendUnavailableError: The backend asked for cannot serve this call.
    """
    asked = {"window": window, "weights": weights}
    query = {name: value for name, value in asked.items() if value is not None}
    if len(query) > 1:
        raise ValueError("give `window` or `weights`, not both")
    operation = next(
        one for one in OPERATIONS.values() if one.answers_state and one.parameters == tuple(query)
    )
    return operation.log_sum_exp(x, images, (*query.values(),), sigma, alpha, backend, options)
