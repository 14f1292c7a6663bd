"""Native window posteriors transposed against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from instruction_sets import ISAS
from native_cpu import needs_cpu
from truth import noisy_batch, random_images

from pyflocality.kernels.cpu import window_posterior as native
from pyflocality.ops.window_posterior import window_posterior_vjp
from pyflocality.posterior.problem import posterior_problem


@needs_cpu
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize(
    ("shape", "window"), [((1, 7, 5), 13), ((3, 6, 6), 3), ((2, 1, 9), 5), ((1, 1, 1), 1)]
)
@pytest.mark.parametrize("count", [1, 49, 1700])
def test_transposed_derivatives(isa, dtype, shape, window, count, rng):
    images = random_images(rng, count, shape, dtype)
    x = noisy_batch(images, 3, 0.4, 0.9, rng)
    cotangents = torch.randn(2, *x.shape, generator=rng, dtype=torch.float64)
    exact = window_posterior_vjp(x, cotangents, images, window, 0.4, 0.9, backend="reference")
    problem = posterior_problem(x.float(), images, 0.4, 0.9)
    found = native.vjp(problem, cotangents.float(), window, instruction_set=isa)
    # The factor alpha / sigma^2 of 5.6 times products of two values, over the windows.
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=2e-4)


@needs_cpu
@pytest.mark.parametrize("level", [(0.02, 1.0), (0.3, 0.5), (2.0, 1.0), (50.0, 1.0)])
def test_transposed_derivatives_at_every_noise_level(level, rng):
    images = random_images(rng, 300, (3, 6, 6), torch.uint8)
    x = noisy_batch(images, 2, *level, rng)
    cotangents = torch.randn(1, *x.shape, generator=rng, dtype=torch.float64)
    exact = window_posterior_vjp(x, cotangents, images, 3, *level, backend="reference")
    found = window_posterior_vjp(
        x.float(), cotangents.float(), images, 3, *level, backend="cpu", chunk_size=77
    )
    scale = exact.abs().max()
    assert (found.double() - exact).abs().max() <= 1e-3 * scale
    none = window_posterior_vjp(x.float(), cotangents[:0].float(), images, 3, *level)
    assert none.shape == (0, *x.shape)
