"""The local score model: one posterior per pixel and window."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Asked, DenoiserOptions, check_set
from pyflocality.denoisers.queries import QueryDenoiser
from pyflocality.denoisers.window import Window, WindowDenoiser, window_rule
from pyflocality.ops.operation import Kind
from pyflocality.ops.window_posterior import WINDOW_POSTERIOR, check_window

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LocalDenoiser(WindowDenoiser, QueryDenoiser):
    r"""Local score model (LS): every pixel has a posterior over the window around it.

    .. math::
        \hat x_0[c, q] = \sum_i p_{q,i} \, v_i[c, q], \qquad
        p_q = \operatorname{softmax}_i \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_{d \in \Omega_q} (x[d] - \alpha v_i[d])^2 \right)

    with :math:`\Omega_q` the pixels of a k x k window around q, all channels, cut at the border.
    A window that covers the image from every pixel is the optimal denoiser.

    Args:
        data: The training set.
        window: Side k of the window in pixels, odd, at most 2 max(H, W) - 1; or a function
            (alpha, sigma) -> k; or a table of pairs (sigma / alpha, k), of which the nearest in
            log(sigma / alpha) counts.
        temperature: Divides the logits.
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.

    Raises:
        TypeError: `window` has none of the three forms.
        ValueError: A window is even or out of range.

    References:
        Kamb and Ganguli, An analytic theory of creativity in convolutional diffusion models,
        2025.
    """

    def __init__(
        self,
        data: TrainingSet,
        window: Window = 7,
        *,
        temperature: float = 1.0,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        _, height, width = check_set(data).image_shape
        super().__init__(
            data,
            window,
            functools.partial(check_window, height=height, width=width),
            temperature=temperature,
            **options,
        )

    def _questions(self, kind: Kind) -> Callable[[float, float], Asked]:
        window_at = window_rule(self.window, self._check_window)
        return lambda alpha, sigma: Asked(WINDOW_POSTERIOR, (window_at(alpha, sigma),))
