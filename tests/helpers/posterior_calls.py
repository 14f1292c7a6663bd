"""Problems for the posterior operations, and their calls by the word that tells them apart."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from native_cpu import needs_cpu
from torch import Tensor
from truth import random_images, values_of

from pyflocality.ops import (
    global_posterior_jvp,
    global_posterior_mean,
    masked_posterior_jvp,
    masked_posterior_mean,
    window_posterior_jvp,
    window_posterior_mean,
)
from pyflocality.weights import QueryWeights

OPS = ("global", "window", "masked")
MEANS = {
    "global": global_posterior_mean,
    "window": window_posterior_mean,
    "masked": masked_posterior_mean,
}
JVPS = {
    "global": global_posterior_jvp,
    "window": window_posterior_jvp,
    "masked": masked_posterior_jvp,
}
BACKENDS = ["reference", pytest.param("cpu", marks=needs_cpu)]
SHAPE = (3, 6, 5)
SIGMA = torch.tensor([0.05, 0.4, 1.2], dtype=torch.float64)
ALPHA = torch.tensor([1.0, 0.8, 0.9], dtype=torch.float64)
# float32 rounding of a sum of some hundred terms, relative.
EPS = 1.2e-7


@functools.lru_cache
def masks(shape: tuple[int, int, int]) -> QueryWeights:
    """Masks that differ a little between neighbours, with an empty, a full and a dense one."""
    generator = torch.Generator().manual_seed(3)
    channels, height, width = shape
    rows, columns = np.divmod(np.arange(height * width), width)
    near = np.abs(rows[:, None] - rows) + np.abs(columns[:, None] - columns) <= 2
    chosen = torch.from_numpy(np.tile(near, (channels, channels)))
    chosen ^= torch.rand(chosen.shape, generator=generator) < 0.05
    chosen[0] = False
    chosen[len(chosen) // 2] = True
    chosen[-1] = torch.rand(chosen.shape[1], generator=generator) < 0.9
    return QueryWeights(chosen)


def extra(op: str, shape: tuple[int, ...]) -> tuple[object, ...]:
    return {"global": (), "window": (3,), "masked": (masks(tuple(shape)),)}[op]


def mean(op: str, x: Tensor, images: Tensor, *levels: object, **options: object) -> Tensor:
    return MEANS[op](x, images, *extra(op, images.shape[1:]), *levels, **options)


def jvp(
    op: str, x: Tensor, tangents: Tensor, images: Tensor, *levels: object, **options: object
) -> tuple[Tensor, Tensor]:
    return JVPS[op](x, tangents, images, *extra(op, images.shape[1:]), *levels, **options)


def problem(
    generator: torch.Generator,
    count: int = 41,
    batch: int = 3,
    tangents: int = 3,
    *,
    shape: tuple[int, int, int] = SHAPE,
    stored: torch.dtype = torch.uint8,
    sigma: Tensor | float = SIGMA,
    alpha: Tensor | float = ALPHA,
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy images near training images, tangents and images, float64."""
    images = random_images(generator, count, shape, stored)
    clean = values_of(images[torch.randint(count, (batch,), generator=generator)])
    level = [torch.as_tensor(value, dtype=torch.float64).expand(batch) for value in (sigma, alpha)]
    sigma, alpha = (value[:, None, None, None] for value in level)
    noise = torch.randn(batch, *shape, generator=generator, dtype=torch.float64)
    directions = torch.randn(tangents, batch, *shape, generator=generator, dtype=torch.float64)
    # Values that float32 holds, so that both precisions see the same problem.
    x = (alpha * torch.from_numpy(clean) + sigma * noise).float().double()
    return x, directions.float().double(), images


def largest(values: Tensor) -> float:
    """Largest absolute value, 0 if there are none."""
    return float(values.abs().max()) if values.numel() > 0 else 0.0


def assert_within_budget(
    found: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    plain: tuple[Tensor, Tensor],
    tangents: Tensor,
    sigma: float,
    alpha: float,
) -> None:
    """Twice the error of the float32 reference, and what float32 sums may cost.

    A logit, about half the number of values where an image fits, has a relative error of EPS,
    which moves an answer by that much of itself. Values and inner products are counted from near
    the image that fits, so their products are of order min(sigma / alpha, 1)^2 |u|; their
    rounding is multiplied by alpha / sigma^2.
    """
    logit = exact[0][0].numel() * (1 + 1 / max(sigma / alpha, 0.1))
    product = alpha / sigma**2 * min(sigma / alpha, 1) ** 2
    size = largest(tangents.flatten(2).norm(dim=-1))
    rounding = (4 * logit, 4 * logit * largest(exact[1]) + 8 * product * size)
    for one, true, near, allowed in zip(found, exact, plain, rounding, strict=True):
        assert one.shape == true.shape
        assert largest(one - true) <= 2 * largest(near - true) + EPS * allowed


@functools.lru_cache
def reference_case(
    op: str,
    stored: torch.dtype,
    shape: tuple[int, int, int],
    count: int,
    tangents: int,
    sigma: float,
    alpha: float,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """A problem and its answers by the reference, in float64 and in float32."""
    generator = torch.Generator().manual_seed(count + tangents)
    given = problem(
        generator, count, 3, tangents, shape=shape, stored=stored, sigma=sigma, alpha=alpha
    )
    x, directions, images = given
    exact = jvp(op, x, directions, images, sigma, alpha, backend="reference")
    narrow = x.float(), directions.float(), images
    return given, exact, jvp(op, *narrow, sigma, alpha, backend="reference")
