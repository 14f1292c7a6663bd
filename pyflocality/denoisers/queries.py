"""Denoisers whose posteriors can be looked at: one for each query, over weighted inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor

from pyflocality._support.checks import (
    LevelLike,
    NoiseLevel,
    check_pixel,
    check_positive,
    check_single_level,
    describe,
)
from pyflocality.denoisers.base import Asked, PosteriorDenoiser
from pyflocality.denoisers.levels import join_rows, split_levels


class QueryDenoiser(PosteriorDenoiser):
    """Base class of the denoisers with one posterior for all values, for a pixel or for a value.

    Its operations answer one posterior for each query.
    """

    def log_sum_exp(
        self,
        x: Tensor,
        sigma: LevelLike,
        alpha: float | Tensor = 1.0,
        *,
        temperature: float | None = None,
    ) -> Tensor:
        r"""Log of the sum that normalises each posterior: a log-density up to a constant.

        Args:
            x: Noisy images, [B, C, H, W].
            sigma: Noise level, a number or [B], positive; or a `NoiseLevel` for both.
            alpha: Signal coefficient, a number or [B], positive.
            temperature: Divides the logits; by default the denoiser's own.

        Returns:
            Float64 [B, Q]: one query for the whole image, for each pixel or for each value.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: An argument has the wrong shape, device or range; there is no image.
        """
        x, levels, _, _ = self._checked(x, sigma, alpha)
        if len(x) == 0:
            raise ValueError(f"`x` must hold at least one image, got {describe(x)}")
        tau = self.temperature
        if temperature is not None:
            tau = check_positive(temperature, "temperature")
        split, question = split_levels(levels, len(x)), self._looked_at()
        results = []
        for level in split:
            # Also where the square of a small one is no number above 0.
            noise = 2.0 * level.sigma * level.sigma * tau
            if noise == 0 or math.isinf(1.0 / noise):
                raise ValueError(f"`sigma` must be positive, got {describe(sigma)}")
            operation, query = question(level.alpha, level.sigma)
            images, augmentation = self.data.images, self.data.augmentation
            problem = self._problem(
                x[level.rows], levels.of(level.rows), images, augmentation, temperature=tau
            )
            results.append(operation.log_sum_exp_of(problem, query, self.backend))
        return join_rows(results, [level.rows for level in split])

    def neighbourhood(
        self,
        pixel: tuple[int, int, int],
        sigma: float | NoiseLevel,
        alpha: float = 1.0,
    ) -> Tensor | None:
        """Inputs that the posterior of an output value compares, bool [C, H, W].

        Args:
            pixel: Channel, row and column (c, h, w) of the output value.
            sigma: Noise level, not negative; or a `NoiseLevel` for both.
            alpha: Signal coefficient, positive.

        Returns:
            The inputs; None where they count with different weights.

        Raises:
            TypeError: An argument has the wrong type.
            ValueError: The pixel lies outside the image, or a level is out of range.
        """
        pixel = check_pixel(pixel, self.image_shape)
        operation, query = self._looked_at()(*check_single_level(sigma, alpha))
        return operation.inputs(pixel, self.image_shape, *query)

    def _looked_at(self) -> Callable[[float, float], Asked]:
        """What is asked at a noise level, by a denoiser whose posteriors may be looked at."""
        return self._questions("scan")
