"""The equivariant local score models: patches from anywhere."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.checks import check_choice
from pyflocality._support.precision import Precision
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import check_set
from pyflocality.denoisers.window import Window, WindowDenoiser
from pyflocality.ops.equivariant_posterior import (
    BOUNDARIES,
    check_patch_window,
    equivariant_posterior_jvp,
    equivariant_posterior_mean,
    equivariant_posterior_vjp,
)


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
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype.
        memory_budget: Working memory, bytes or a string such as "2GB".
        precision: "exact"; or "auto", which permits errors of about 1e-3 in [-1, 1], see
            `pyflocality.ops.PosteriorOptions`.

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
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
        precision: Precision = "exact",
    ) -> None:
        _, height, width = check_set(data).image_shape
        check_choice(boundary, "boundary", BOUNDARIES)
        super().__init__(
            data,
            window,
            functools.partial(check_patch_window, height=height, width=width, boundary=boundary),
            temperature=temperature,
            backend=backend,
            dtype=dtype,
            memory_budget=memory_budget,
            precision=precision,
        )
        self.boundary = boundary

    @property
    def _posterior_options(self) -> dict[str, Any]:
        return super()._posterior_options | {"boundary": self.boundary}

    def _mean(self, x: Tensor, window: int, sigma: Tensor, alpha: Tensor) -> Tensor:
        images, options = self.data.images, self._posterior_options
        return equivariant_posterior_mean(x, images, window, sigma, alpha, **options)

    def _mean_jvp(
        self, x: Tensor, tangents: Tensor, window: int, sigma: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        images, options = self.data.images, self._posterior_options
        return equivariant_posterior_jvp(x, tangents, images, window, sigma, alpha, **options)

    def _mean_vjp(
        self, x: Tensor, cotangents: Tensor, window: int, sigma: Tensor, alpha: Tensor
    ) -> Tensor:
        images, options = self.data.images, self._posterior_options
        return equivariant_posterior_vjp(x, cotangents, images, window, sigma, alpha, **options)
