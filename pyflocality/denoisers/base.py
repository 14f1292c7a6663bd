r"""What every denoiser has in common.

A denoiser maps a noisy image :math:`x = \alpha x_0 + \sigma \epsilon` to an estimate of
:math:`x_0`. It is called as `denoiser(x, sigma, alpha)`; sigma and alpha are numbers or one
value per image of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pyflocality._backends import BACKENDS
from pyflocality._budget import memory_budget_bytes
from pyflocality._checks import (
    check_batch,
    check_choice,
    check_level,
    check_magnitude,
    check_positive,
    describe,
)
from pyflocality.data import TrainingSet


class Denoiser(nn.Module):
    """Base class: checks the call, then asks the subclass for the estimate.

    Args:
        image_shape: Shape (C, H, W) of the images it denoises.
    """

    def __init__(self, image_shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)

    @property
    def device(self) -> torch.device:
        """Device that inputs must be on."""
        raise AttributeError(f"{type(self).__name__} does not say which device it is on")

    def forward(self, x: Tensor, sigma: float | Tensor, alpha: float | Tensor = 1.0) -> Tensor:
        """Estimate the clean images.

        Args:
            x: Noisy images x = alpha x0 + sigma noise, floating point, [B, C, H, W].
            sigma: Noise level, a number or a tensor [B], not negative; 0 is the limit of no
                noise.
            alpha: Signal coefficient, a number or a tensor [B], positive.

        Returns:
            Estimates of x0 in [-1, 1], dtype and device of x, [B, C, H, W].

        Raises:
            TypeError: x is not a floating-point tensor, or a level is not a number.
            ValueError: x has the wrong shape or device or holds NaN, or a level is out of range.
        """
        x = check_batch(x, self.image_shape, self.device, "x")
        sigma = check_level(sigma, len(x), x.device, "sigma", allow_zero=True)
        alpha = check_level(alpha, len(x), x.device, "alpha", allow_zero=False)
        check_magnitude(x, alpha, "x")
        return self._denoise(x, sigma, alpha)

    def _denoise(self, x: Tensor, sigma: Tensor, alpha: Tensor) -> Tensor:
        """The estimate for checked arguments; sigma and alpha are float64 [B]."""
        raise AttributeError(f"{type(self).__name__} does not define _denoise")


def by_level(
    denoise: Callable[[Tensor, float, float], Tensor], x: Tensor, sigma: Tensor, alpha: Tensor
) -> Tensor:
    """Run a function that takes one noise level over a batch with a level per image.

    Args:
        denoise: Maps images [b, C, H, W] and their common sigma and alpha to estimates.
        x: Noisy images, [B, C, H, W].
        sigma: Noise levels, [B].
        alpha: Signal coefficients, [B].
    """
    levels = torch.stack([sigma, alpha], 1)
    distinct, group = levels.unique(dim=0, return_inverse=True)
    if len(distinct) == 1:
        return denoise(x, *distinct[0].tolist())
    result = torch.zeros_like(x)
    for number, (level_sigma, level_alpha) in enumerate(distinct.tolist()):
        members = (group == number).nonzero()[:, 0]
        part = denoise(x[members], level_sigma, level_alpha)
        result = result.index_copy(0, members, part)
    return result


def check_set(data: object) -> TrainingSet:
    """A training set."""
    if not isinstance(data, TrainingSet):
        raise TypeError(
            f"`data` must be a TrainingSet (TrainingSet(images) makes one), got {describe(data)}"
        )
    return data


class PosteriorDenoiser(Denoiser):
    """Base class of the denoisers that scan a training set.

    Args:
        data: The training set.
        temperature: Divides the logits of the posterior, positive.
        backend: Backend of its operations; None follows `pyflocality.use_backend`.
        dtype: float32 or float64 to compute in; None computes in the input's own dtype
            (half precision computes in float32).
        memory_budget: Working memory beyond data and result, bytes or a string such as
            "2GB"; None follows the environment variable PYFLOCALITY_MEMORY_BUDGET, else 1 GB.

    Raises:
        TypeError: `data` is not a TrainingSet, or an option has the wrong type.
        ValueError: An option is out of range.
    """

    def __init__(
        self,
        data: TrainingSet,
        temperature: float = 1.0,
        *,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
        memory_budget: int | str | None = None,
    ) -> None:
        super().__init__(check_set(data).image_shape)
        if backend is not None:
            check_choice(backend, "backend", BACKENDS)
        if dtype not in (None, torch.float32, torch.float64):
            raise ValueError(f"`dtype` must be torch.float32 or torch.float64, got {dtype}")
        memory_budget_bytes(memory_budget)
        self.data = data
        self.temperature = check_positive(temperature, "temperature")
        self.backend = backend
        self.dtype = dtype
        self.memory_budget = memory_budget

    @property
    def device(self) -> torch.device:
        """Device of the training set, where inputs must be."""
        return self.data.device

    @property
    def _options(self) -> dict[str, Any]:
        """Options that every operation takes."""
        return {
            "backend": self.backend,
            "dtype": self.dtype,
            "memory_budget": self.memory_budget,
        }

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PosteriorDenoiser:
        # The set is no buffer: `.half()` must not touch its values and `state_dict` must not
        # hold them. Only a move to another device concerns it.
        super()._apply(fn, recurse)
        self.data = self.data.to(fn(torch.empty(0, device=self.data.device)).device)
        return self

    def extra_repr(self) -> str:
        """What `repr` shows."""
        return f"{self.data!r}, temperature={self.temperature}"
