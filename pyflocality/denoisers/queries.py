"""Denoisers whose posteriors can be looked at: one for each query, over weighted inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyflocality._support.checks import check_one_level, check_pixel, check_positive, describe
from pyflocality.denoisers.base import PosteriorDenoiser, join_levels, split_levels
from pyflocality.ops.log_sum_exp import posterior_log_sum_exp
from pyflocality.weights import QueryWeights


class QueryDenoiser(PosteriorDenoiser):
    """Base class of the denoisers with one posterior for all values, for a pixel or for a value.

    The queries of a noise level are told by `_queries`.
    """

    def log_sum_exp(
        self,
        x: Tensor,
        sigma: float | Tensor,
        alpha: float | Tensor = 1.0,
        *,
        temperature: float | None = None,
    ) -> Tensor:
        r"""Log of the sum that normalises each posterior: a log-density up to a constant.

        Args:
            x: Noisy images, [B, C, H, W].
            sigma: Noise level, a number or [B], positive.
            alpha: Signal coefficient, a number or [B], positive.
            temperature: Divides the logits; by default the denoiser's own.

        Returns:
            Float64 [B, Q]: one query for the whole image, for each pixel or for each value.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument has the wrong shape, device or range; there is no image.
        """
        x, sigma, alpha = self._checked(x, sigma, alpha)
        if len(x) == 0:
            raise ValueError(f"`x` must hold at least one image, got {describe(x)}")
        options = self._posterior_options
        if temperature is not None:
            options["temperature"] = check_positive(temperature, "temperature")
        levels = split_levels(sigma, alpha)
        parts = []
        for level in levels:
            m, queries = level.members, self._queries(level.sigma, level.alpha)
            options |= queries
            images = self.data.images
            parts.append(posterior_log_sum_exp(x[m], images, sigma[m], alpha[m], **options))
        return join_levels(parts, levels)

    def neighbourhood(
        self, pixel: tuple[int, int, int], sigma: float, alpha: float = 1.0
    ) -> Tensor | None:
        """Inputs that the posterior of an output value compares, bool [C, H, W].

        Args:
            pixel: Channel, row and column (c, h, w) of the output value.
            sigma: Noise level, not negative.
            alpha: Signal coefficient, positive.

        Returns:
            The inputs; None where they count with different weights.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The pixel lies outside the image, or a level is out of range.
        """
        pixel = check_pixel(pixel, self.image_shape)
        sigma = check_one_level(sigma, "sigma", allow_zero=True)
        alpha = check_one_level(alpha, "alpha", allow_zero=False)
        queries = self._queries(sigma, alpha)
        inputs = torch.ones(self.image_shape, dtype=torch.bool)
        place = torch.arange(inputs.numel()).reshape(self.image_shape)[pixel]
        if "window" in queries:
            for axis, (centre, size) in enumerate(zip(pixel, self.image_shape, strict=True)):
                if axis > 0:
                    far = (torch.arange(size) - centre % size).abs() > queries["window"] // 2
                    inputs.index_fill_(axis, far.nonzero()[:, 0], False)
        elif "weights" in queries:
            weights: QueryWeights = queries["weights"]
            if not weights.is_mask:
                return None
            inputs = weights.row(int(place)).reshape(self.image_shape)
        return inputs

    def _queries(self, sigma: float, alpha: float) -> dict[str, Any]:
        """The queries of a noise level, as `posterior_log_sum_exp` takes them."""
        raise AttributeError(f"{type(self).__name__} does not define _queries")
