"""The local score model: one posterior per pixel and window."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from pyflocality._support.precision import Precision
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import check_set
from pyflocality.denoisers.queries import QueryDenoiser
from pyflocality.denoisers.window import Window, WindowDenoiser, window_rule
from pyflocality.ops import window_posterior_jvp, window_posterior_mean, window_posterior_vjp
from pyflocality.ops.window_posterior import check_window


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
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype.
        memory_budget: Working memory, bytes or a string such as "2GB".
        precision: "exact"; or "auto", which permits errors of about 1e-3 in [-1, 1], see
            `pyflocality.ops.PosteriorOptions`.

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
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
        precision: Precision = "exact",
    ) -> None:
        _, height, width = check_set(data).image_shape
        super().__init__(
            data,
            window,
            functools.partial(check_window, height=height, width=width),
            temperature=temperature,
            backend=backend,
            dtype=dtype,
            memory_budget=memory_budget,
            precision=precision,
        )

    def _mean(self, x: Tensor, window: int, sigma: Tensor, alpha: Tensor) -> Tensor:
        images, options = self.data.images, self._posterior_options
        return window_posterior_mean(x, images, window, sigma, alpha, **options)

    def _mean_jvp(
        self, x: Tensor, tangents: Tensor, window: int, sigma: Tensor, alpha: Tensor
    ) -> tuple[Tensor, Tensor]:
        images, options = self.data.images, self._posterior_options
        return window_posterior_jvp(x, tangents, images, window, sigma, alpha, **options)

    def _mean_vjp(
        self, x: Tensor, cotangents: Tensor, window: int, sigma: Tensor, alpha: Tensor
    ) -> Tensor:
        images, options = self.data.images, self._posterior_options
        return window_posterior_vjp(x, cotangents, images, window, sigma, alpha, **options)

    def _queries(self, sigma: float, alpha: float) -> dict[str, Any]:
        return {"window": window_rule(self.window, self._check_window)(alpha, sigma)}
