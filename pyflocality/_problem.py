"""What the posterior operations share: checked arguments in canonical form."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pyflocality._backends import Call
from pyflocality._checks import (
    check_batch,
    check_compute_dtype,
    check_level,
    check_positive,
    describe,
)
from pyflocality.reference import state as posterior


@dataclass(frozen=True)
class PosteriorProblem:
    """A batch of queries against a set of training images.

    Attributes:
        x: Noisy images in the dtype of the computation, [B, C, H, W].
        images: Training images as stored, uint8 or float, [N, C, H, W].
        alpha: Signal coefficients in the dtype of the computation, [B].
        scale: Factors 1 / (2 sigma^2 temperature) of the squared distances, [B].
        memory_budget: Working memory, as `pyflocality._budget.memory_budget_bytes` takes it.
        chunk_size: Training images at a time; None derives it from the budget.
    """

    x: Tensor
    images: Tensor
    alpha: Tensor
    scale: Tensor
    memory_budget: int | str | None = None
    chunk_size: int | None = None

    @property
    def call(self) -> Call:
        """The call as a backend's predicate sees it."""
        return Call(
            self.x.device,
            self.x.dtype,
            torch.is_grad_enabled() and self.x.requires_grad,
            {"images_dtype": self.images.dtype, "image_shape": tuple(self.images.shape[1:])},
        )

    def chunks(self, chunk_size: int) -> Iterator[Tensor]:
        """The training values in [-1, 1], `chunk_size` images at a time: [n, C, H, W]."""
        for start in range(0, len(self.images), chunk_size):
            yield training_values(self.images[start : start + chunk_size], self.x.dtype)


def training_values(images: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored images as values in [-1, 1]: 8-bit u means u / 127.5 - 1."""
    values = images.to(dtype)
    return values / 127.5 - 1.0 if images.dtype == torch.uint8 else values


def check_images(images: object) -> Tensor:
    """A non-empty set of images [N, C, H, W], uint8 or float in [-1, 1]."""
    if not isinstance(images, Tensor):
        raise TypeError(f"`images` must be a torch.Tensor [N, C, H, W], got {describe(images)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"`images` must be uint8 or floating point, got {describe(images)}")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(
            f"`images` must be a non-empty tensor [N, C, H, W], got {describe(images)}"
        )
    return images


def posterior_problem(
    x: Tensor,
    images: Tensor,
    sigma: float | Tensor,
    alpha: float | Tensor,
    *,
    temperature: float = 1.0,
    dtype: torch.dtype | None = None,
    memory_budget: int | str | None = None,
    chunk_size: int | None = None,
) -> PosteriorProblem:
    """Check the arguments that every posterior operation takes."""
    images = check_images(images)
    x = check_batch(x, images.shape[1:], images.device, "x")
    sigma = check_level(sigma, len(x), x.device, "sigma", allow_zero=True)
    alpha = check_level(alpha, len(x), x.device, "alpha", allow_zero=False)
    temperature = check_positive(temperature, "temperature")
    compute = check_compute_dtype(dtype, x)
    return PosteriorProblem(
        x.to(compute),
        images,
        alpha.to(compute),
        posterior.posterior_scale(sigma, temperature, compute),
        memory_budget,
        chunk_size,
    )
