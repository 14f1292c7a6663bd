"""The equivariant local score models: patches from anywhere."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyflocality._support.checks import check_choice
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import Asked, DenoiserOptions, check_set
from pyflocality.denoisers.window import Window, WindowDenoiser, window_rule
from pyflocality.ops.equivariant_posterior import (
    BOUNDARIES,
    EQUIVARIANT_POSTERIOR,
    check_patch_window,
)
from pyflocality.ops.operation import Kind

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EquivariantDenoiser(WindowDenoiser):
    r"""Equivariant local score model: every pixel has a posterior over patches from anywhere.

    .. math::
        \hat x_0[c, q] = \sum_{i, p} p_{q, (i, p)} \, v_i[c, p], \qquad
        p_q = \operatorname{softmax}_{(i, p)} \left( -\frac{1}{2 \sigma^2 \tau}
            \sum_{c, \delta} (x[c, q + \delta] - \alpha v_i[c, p + \delta])^2 \right)

    with :math:`\delta` over a k x k window.

    `boundary="circular"` (ELS): x goes on periodically, and p is every pixel of a training image
    whose window fits inside; the model commutes with circular shifts. `boundary="broken"`
    (bbELS): windows are cut at the border, and patches come from positions of the same class:
    for an interior pixel all interior pixels, near an edge all pixels along that edge at the
    same depth, near a corner the same pixel only.

    Args:
        data: The training set.
        window: Side k of the window in pixels, odd, at most min(H, W) for "circular" and
            2 max(H, W) - 1 for "broken"; or a function (alpha, sigma) -> k; or a table of pairs
            (sigma / alpha, k), of which the nearest in log(sigma / alpha) counts.
        boundary: "circular" or "broken".
        temperature: Divides the logits.
        options: Backend, dtype, memory and precision: see `pyflocality.denoisers.DenoiserOptions`.

    Raises:
        TypeError: `window` has none of the three forms.
        ValueError: A window is even or out of range, or there is no such boundary.

    References:
        Kamb and Ganguli, An analytic theory of creativity in convolutional diffusion models,
        2025.
    """

    def __init__(
        self,
        data: TrainingSet,
        window: Window = 7,
        boundary: str = "circular",
        *,
        temperature: float = 1.0,
        **options: Unpack[DenoiserOptions],
    ) -> None:
        _, height, width = check_set(data).image_shape
        check_choice(boundary, "boundary", BOUNDARIES)
        super().__init__(
            data,
            window,
            functools.partial(check_patch_window, height=height, width=width, boundary=boundary),
            temperature=temperature,
            **options,
        )
        self.boundary = boundary

    def _questions(self, kind: Kind) -> Callable[[float, float], Asked]:
        window_at, circular = (
            window_rule(self.window, self._check_window),
            self.boundary == "circular",
        )
        return lambda alpha, sigma: Asked(
            EQUIVARIANT_POSTERIOR, (window_at(alpha, sigma), circular)
        )
