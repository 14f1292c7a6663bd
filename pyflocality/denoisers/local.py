"""The local score model: one posterior per pixel and window."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyflocality._checks import describe
from pyflocality.data import TrainingSet
from pyflocality.denoisers.base import PosteriorDenoiser, by_level
from pyflocality.ops import window_posterior_mean
from pyflocality.ops.window_posterior import check_window

Window = int | Callable[[float, float], int] | Sequence[tuple[float, int]]


def window_rule(window: Window, height: int, width: int) -> Callable[[float, float], int]:
    """A window given in any form, as a function (alpha, sigma) -> size.

    Args:
        window: An odd size; a function (alpha, sigma) -> size; or a table of pairs
            (sigma / alpha, size), of which the nearest in log(sigma / alpha) counts.
        height: Height of the images; sizes reach at most 2 max(H, W) - 1.
        width: Width of the images.

    Raises:
        TypeError: `window` has none of these forms.
        ValueError: A size is even or out of range, or the table is empty or holds a noise level
            that is not positive.
    """
    if callable(window):
        return lambda alpha, sigma: check_window(window(alpha, sigma), height, width)
    if isinstance(window, int):
        size = check_window(window, height, width)
        return lambda alpha, sigma: size
    if not isinstance(window, Sequence) or isinstance(window, str):
        raise TypeError(
            "`window` must be an odd integer, a function (alpha, sigma) -> integer or a table "
            f"of (sigma / alpha, integer) pairs, got {describe(window)}"
        )
    if len(window) == 0:
        raise ValueError("`window` must be a table of at least one pair, got none")
    table = []
    for row in window:
        if not isinstance(row, Sequence) or len(row) != 2:
            raise TypeError(f"`window` must hold pairs (sigma / alpha, integer), got {row!r}")
        ratio, size = row
        if not (math.isfinite(ratio) and ratio > 0):
            raise ValueError(f"`window` must hold positive noise levels, got {row!r}")
        table.append((math.log(ratio), check_window(size, height, width)))

    def nearest(alpha: float, sigma: float) -> int:
        if sigma == 0:
            return min(table)[1]
        level = math.log(sigma / alpha)
        return min(table, key=lambda entry: abs(entry[0] - level))[1]

    return nearest


class LocalDenoiser(PosteriorDenoiser):
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
    ) -> None:
        super().__init__(
            data,
            temperature=temperature,
            backend=backend,
            dtype=dtype,
            memory_budget=memory_budget,
        )
        self.window = window
        self._window_rule()

    def _window_rule(self) -> Callable[[float, float], int]:
        return window_rule(self.window, *self.image_shape[1:])

    def _denoise(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        window_at = self._window_rule()

        def denoise(part: Tensor, level_sigma: float, level_alpha: float) -> Tensor:
            return window_posterior_mean(
                part,
                self.data.images,
                window_at(level_alpha, level_sigma),
                level_sigma,
                level_alpha,
                temperature=self.temperature,
                **self._options,
            )

        return by_level(denoise, x, sigma, alpha)

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{super().extra_repr()}, window={self.window}"
