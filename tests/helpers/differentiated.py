"""Denoisers whose derivatives are known."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from every_denoiser import MAKERS
from torch import Tensor
from truth import random_images

import pyflocality as pf

SHAPE = (1, 3, 5)

D = 15

SIGMA = torch.tensor([0.25, 0.45, 0.9], dtype=torch.float64)

ALPHA = torch.tensor([1.0, 0.8, 0.9], dtype=torch.float64)


@functools.lru_cache
def images(count: int = 40) -> pf.TrainingSet:
    generator = torch.Generator().manual_seed(1)
    return pf.TrainingSet(random_images(generator, count, SHAPE, torch.uint8))


@functools.lru_cache
def denoiser_of(name: str, count: int = 40) -> pf.Denoiser:
    return MAKERS[name](images(count))


def noisy(batch: int = 3) -> Tensor:
    noise = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(2))
    column = (slice(3), None, None, None)
    x = ALPHA[column] * images().values(5, 8).double() + SIGMA[column] * noise
    # Values that float32 holds, so that both precisions see the same problem.
    return x[:batch].float().double()


def directions(count: int, batch: int = 3, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, batch, *SHAPE, generator=generator).double()


@functools.lru_cache
def jacobians(name: str) -> Tensor:
    """One Jacobian for each of three noisy images: backward passes of the reference, [3, D, D]."""
    x = noisy().requires_grad_()
    with pf.use_backend("reference"):
        denoiser = denoiser_of(name)
        levels = denoiser._checked(x, SIGMA, ALPHA).levels
        out = denoiser._denoise(x, levels).flatten(1).sum(0)
    if not out.requires_grad:
        return torch.zeros(3, D, D, dtype=torch.float64)
    rows = [torch.autograd.grad(value, x, retain_graph=True)[0].flatten(1) for value in out]
    return torch.stack(rows, 1)


def along(name: str, tangents: Tensor) -> Tensor:
    batch = tangents.shape[1]
    product = torch.einsum("bmd,kbd->kbm", jacobians(name)[:batch], tangents.flatten(2))
    return product.reshape(tangents.shape)


def against(name: str, cotangents: Tensor) -> Tensor:
    batch = cotangents.shape[1]
    product = torch.einsum("bmd,kbm->kbd", jacobians(name)[:batch], cotangents.flatten(2))
    return product.reshape(cotangents.shape)


def call(name: str, batch: int = 3) -> Callable[[Tensor], Tensor]:
    denoiser = denoiser_of(name)
    return lambda x: denoiser(x, SIGMA[:batch], ALPHA[:batch])


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def largest(values: Tensor) -> float:
    return float(values.abs().max())
