"""The global posterior: what it alone shows."""

from __future__ import annotations

import pytest
import torch

from pyflocality import BackendUnavailableError, ops
from pyflocality.ops import (
    global_posterior_mean,
)


@pytest.mark.parametrize("chunk_size", [0, -1, 2.5, "a"])
def test_wrong_chunk_sizes(chunk_size, problem):
    x, images = problem()
    with pytest.raises((ValueError, TypeError), match="`chunk_size` must be"):
        global_posterior_mean(x, images, 0.5, chunk_size=chunk_size)


@pytest.mark.filterwarnings("error")
def test_images_that_are_differentiated_go_to_the_reference():
    """Kernels asked torch for the memory of parameters, which it refuses."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(9, 1, 4, 4, generator=generator, dtype=torch.float64)
    x, step = torch.rand(2, 2, 1, 4, 4, generator=generator, dtype=torch.float64)
    step = step[:1]

    def energy(values: torch.Tensor) -> torch.Tensor:
        return ops.global_posterior_mean(x, values, 0.5).square().sum()

    given = images.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(energy(given), given)
    difference = (energy(images + 1e-5 * step) - energy(images - 1e-5 * step)) / 2e-5
    torch.testing.assert_close((gradient * step).sum(), difference, rtol=1e-6, atol=1e-9)
    # What kernels take but for that.
    single = images.float().requires_grad_()
    with pytest.raises(BackendUnavailableError, match="derivative"):
        ops.global_posterior_mean(x.float(), single, 0.5, backend="cpu")
    assert ops.global_posterior_mean(x.float(), single, 0.5).requires_grad
    with torch.no_grad():
        torch.testing.assert_close(energy(given), energy(images), rtol=0, atol=0)
